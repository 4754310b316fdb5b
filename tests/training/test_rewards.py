"""Stages that learn from rewards, from rows of a file to the run folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_recipe

import finetune
from finetune.common.errors import DataError, RecipeError, TrainingError
from finetune.training.trainer import StageTrainer

STAGE = {"name": "reward", "trains": ["projectors", "adapter"], "learning_rate": 2e-2, "epochs": 2}
GRPO = {"kind": "grpo", "answers": 4, "max_new_tokens": 6}


def rewarded(folder: Path, objective=None, stage=None, **changes) -> Path:
    """A question about each picture."""
    path = tiny_recipe(folder)
    for split in ("train", "test"):
        with (folder / "data" / f"{split}.jsonl").open("w") as file:
            for number in range(8):
                row = {"image": f"images/{split}{number}.png", "question": f"What is {number}?", "answer": "a square"}
                file.write(json.dumps(row) + "\n")
    data = [
        {"path": str(folder / "data" / f"{split}.jsonl"), "task": "answer", "split": split}
        for split in ("train", "test")
    ]
    own = STAGE | {"objective": GRPO | (objective or {})} | (stage or {})
    return (
        tiny_recipe(folder, **({"data": data, "train__stages": [own], "train__tokens_per_batch": 256} | changes))
        or path
    )


def stage_of(run, name="reward"):
    return json.loads(run.metrics.read_text())["train"]["stages"][name]


def weights_in(run):
    return load_file(run.adapter / "adapter_model.safetensors") | load_file(run.adapter / "projectors.safetensors")


def shortness(sample, answer):
    return -float(len(answer))


def test_rewarded_answers_become_more_likely(tmp_path):
    run = finetune.train(rewarded(tmp_path, stage={"epochs": 12}), tmp_path / "run", reward=shortness)
    figures = stage_of(run)["figures"]
    print(figures)
    assert figures["reward"][-1] > figures["reward"][0]
