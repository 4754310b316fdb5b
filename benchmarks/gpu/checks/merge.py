"""A run trained over 4-bit weights, merged twice: compared on the GPU, and in memory beside a GPU that has no room left."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch

from benchmarks.gpu.models import llm_folder
from benchmarks.gpu.setting import Setting
from finetune.common.certificate import Certificate
from finetune.common.progress import console
from finetune.merging.candidates import ROOM
from finetune.merging.merge import merge
from finetune.recipe.load import load_recipe
from finetune.training.shared import Shared
from finetune.training.train import train_in

from tiny import tiny_dataset, tiny_recipe, tiny_vision_folder  # isort: skip

# In 16 bits so much larger than in 4 that what trains fits where the merged model doesn't.
LARGER = {"hidden_size": 1536, "num_hidden_layers": 8, "intermediate_size": 6144}


def check(setting: Setting) -> str:
    console.quiet = True
    run = trained(setting, setting.folder / "merge")
    roomy, seconds = timed_merge(run)
    size = sum(path.stat().st_size for path in (run / "merged").glob("*.safetensors"))
    with filled(setting.device, (1 + ROOM) / 2 * size) as where:
        beside, seconds_beside = timed_merge(run)
    told = []
    for name, one, took in (("with room", roomy, seconds), (where, beside, seconds_beside)):
        told.append(f"{name} agreement {one.saved.agreement:.3f}, KL {one.saved.kl:.1e} in {took:.1f} s")
    return f"{size / 2**20:.0f} MiB into {roomy.merged_into}: {'; '.join(told)}"


def trained(setting: Setting, project: Path) -> Path:
    project.mkdir()
    tiny_vision_folder(project / "encoder")
    tiny_dataset(project / "data", train=8 if setting.toy else 32, test=4 if setting.toy else 16)
    llm = llm_folder(setting, "llama") if setting.toy else llm_folder(setting, "larger", **LARGER)
    (project / "llm").symlink_to(llm)
    stage = {
        "name": "tune",
        "trains": ["projectors", "adapter"],
        "learning_rate": 1e-3,
        "epochs": 2 if setting.toy else 4,
    }
    path = tiny_recipe(
        project,
        model__llm={"name": str(llm), "quantize": "nf4"},
        merge={"rows": 16, "rows_scored": 4},
        train__stages=[stage],
    )
    recipe = load_recipe(path)
    # With components at hand, as a sweep has them, nothing is planned beforehand.
    return train_in(project / "run", recipe, shared=Shared.load(recipe)).path


def timed_merge(run: Path) -> tuple[Certificate, float]:
    begin = perf_counter()
    certificate = merge(run)
    return certificate, perf_counter() - begin


@contextmanager
def filled(device: str, leave: float) -> Iterator[str]:
    """A GPU with no more than so many bytes left."""
    if device == "cpu":
        yield "again (a CPU)"
        return
    torch.cuda.empty_cache()
    held = torch.empty(int(torch.cuda.mem_get_info()[0] - leave), dtype=torch.uint8, device=device)
    yield "beside the full GPU"
    del held
