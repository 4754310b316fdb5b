"""A run trained over 4-bit weights, merged twice: compared on the GPU, and in memory beside a GPU without room."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter

import torch

from benchmarks.gpu.models import llm_folder
from benchmarks.gpu.setting import Setting
from finetune.common.certificate import Certificate
from finetune.common.progress import console
from finetune.common.run_folder import RunFolder
from finetune.merging.candidates import ROOM
from finetune.merging.merge import merge
from finetune.recipe.load import dump_recipe, load_recipe
from finetune.training.prepare import prepare
from finetune.training.shared import Shared
from finetune.training.train import train_stages

from tiny import tiny_dataset, tiny_recipe, tiny_vision_folder  # isort: skip

# In 16 bits so much larger than in 4 that what trains fits where the merged model doesn't.
LARGER = {"hidden_size": 1536, "num_hidden_layers": 4, "intermediate_size": 6144}


def check(setting: Setting) -> str:
    console.quiet = True
    run = trained(setting, setting.folder / "merge")
    roomy, seconds = timed_merge(run)
    size = sum(path.stat().st_size for path in (run / "merged").glob("*.safetensors"))
    figures = [f"{size / 2**20:.0f} MiB into {roomy.merged_into}: with room {closeness(roomy)} in {seconds:.1f} s"]
    with filled((1 + ROOM) / 2 * size) if setting.device == "cuda" else nullcontext():
        beside, seconds = timed_merge(run)
    figures.append(f"beside the full GPU {closeness(beside)} in {seconds:.1f} s")
    return "; ".join(figures)


def closeness(certificate: Certificate) -> str:
    return f"agreement {certificate.saved.agreement:.3f}, KL {certificate.saved.kl:.1e}"


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
    # What `train_in` does, but for a plan beforehand, and plots.
    folder, shared = RunFolder.create(project / "run", dump_recipe(recipe), resume=False), Shared.load(recipe)
    train_stages(prepare(folder, recipe, shared), shared)
    return folder.path


def timed_merge(run: Path) -> tuple[Certificate, float]:
    begin = perf_counter()
    certificate = merge(run)
    return certificate, perf_counter() - begin


@contextmanager
def filled(leave: float) -> Iterator[None]:
    """A GPU with no more than so many bytes left."""
    torch.cuda.empty_cache()
    held = torch.empty(int(torch.cuda.mem_get_info()[0] - leave), dtype=torch.uint8, device="cuda")
    yield
    del held
