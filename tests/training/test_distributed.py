"""Two processes do what one does: rows with many pictures, with one and with none, in the same step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import FUSIONS, tiny_recipe

import finetune

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(finetune.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def recipe_of(folder: Path, distill=False, heads=False, prefer=False, **changes) -> Path:
    """Rows of 0 to 3 pictures, anywhere in the question; some packed rows hold no picture at all."""
    path = tiny_recipe(folder)
    pictures = [f"images/train{number}.png" for number in range(4)]
    with (folder / "data" / "chat.jsonl").open("w") as file:
        for number in range(16):
            content = [{"type": "text", "text": f"Look at {number}: "}]
            for picture in pictures[: 0 if number % 8 < 4 else number % 4]:
                content += [{"type": "image", "image": picture}, {"type": "text", "text": " and "}]
            content.append({"type": "text", "text": "What is this?"})
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "a red square"}]
            file.write(json.dumps({"messages": turns, "rejected": f"blue {number}"}) + "\n")
    data = [
        {"path": str(folder / "data" / "chat.jsonl"), "task": "chat"},
        {"path": str(folder / "data" / "test.csv"), "task": "classify", "split": "test"},
    ]
    stages = [{"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 5e-3}]
    if distill:  # the adapter rests meanwhile, and its weights must not be counted among the gradients
        task = {"kind": "classify", "transcript": "label"}
        data.append({"path": str(folder / "data" / "train.csv"), "task": task})
        first = {"name": "listen", "trains": ["projectors"], "learning_rate": 5e-3, "max_grad_norm": 0.05}
        stages.insert(0, first | {"sources": [2], "objective": {"kind": "distill", "answers": "given"}, "epochs": 3})
    if prefer:  # a reference of which each process measures its share
        stages[0]["objective"] = "dpo"
    if heads:  # some rows have nothing for the LLM to learn, others nothing for the head
        data[1] |= {"split": "validation", "head": "label"}
        test = {"path": str(folder / "data" / "train.csv"), "task": "classify", "head": "label", "loss_weight": 2.0}
        data += [test, data[0] | {"split": "test"}]
        (folder / "data" / "other.jsonl").write_text(
            (folder / "data" / "chat.jsonl").read_text(encoding="utf-8").replace("red", "blue"), encoding="utf-8"
        )
        data[-1]["path"] = str(folder / "data" / "other.jsonl")
        stages[0]["trains"] = ["projectors", "adapter", "heads"]
        changes["train__validation"] = {"every_n_steps": 2}
    return tiny_recipe(folder, data=data, train__stages=stages, adapter={"rank": 2}, **changes) or path


KINDS = {
    "distill": {"distill": True},
    "preferences": {"prefer": True, "train__share_prefixes": False},
    "heads": {"heads": True, "train__cache": False, "train__checkpoint_every_n_layers": 1},
}
CROSS_ATTENTION = ", ".join(f"{key}: {value}" for key, value in FUSIONS["cross_attention"].items())
SETS = {
    "distill": [
        f"model.fusion={{kind: cross_attention, {CROSS_ATTENTION}}}",
        "train.stages.0.trains=[projectors, fusion]",
        "train.stages.1.trains=[projectors, fusion, adapter]",
    ],
    "preferences": ["train.tokens_per_batch=160"],
    "heads": [],
}
TRAIN = """
import sys
from finetune.commands.cli import main

for folder in sys.argv[1:]:
    sys.argv = ["finetune", "train", *open(folder + "/arguments").read().splitlines()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, folder
"""  # both in the same two processes: a start takes far longer than a training


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory) -> dict[str, Path]:
    """Kind -> the folder of its recipe, with the run of two processes in TWO and of one in ONE."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        path = recipe_of(folder, **KINDS[kind])
        sets = ["train.tokens_per_batch=128", *SETS[kind]]
        # The rows of a step are those of one process with twice the accumulation.
        finetune.train(finetune.load_recipe(path, [*sets, "train.accumulate=2"]), folder / "one")
        arguments = [str(path), "--run", str(folder / "two"), *(part for one in sets for part in ("--set", one))]
        (folder / "arguments").write_text("\n".join(arguments))
    script = folders["heads"] / "script.py"
    script.write_text(TRAIN)
    done = subprocess.run(
        [*LAUNCH, str(script), *map(str, folders.values())], cwd=script.parent,
        capture_output=True, text=True, env=ENVIRONMENT, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("adapter: ") == len(KINDS)  # one of them speaks
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_on_the_weights_of_one(kind, trained_by_two):
    folder = trained_by_two[kind]
    one, two = (folder / name for name in ("one", "two"))
    metrics = [json.loads((run / "metrics.json").read_text())["train"]["stages"]["tune"] for run in (one, two)]
    assert metrics[0]["steps"] == metrics[1]["steps"] > 1
    assert metrics[1]["losses"] == pytest.approx(metrics[0]["losses"], rel=1e-3)
    for name in ("adapter_model.safetensors", "projectors.safetensors"):
        left, right = load_file(one / "adapter" / name), load_file(two / "adapter" / name)
        assert left.keys() == right.keys()
        for key in left:
            torch.testing.assert_close(
                left[key], right[key], atol=2e-4, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
            )
