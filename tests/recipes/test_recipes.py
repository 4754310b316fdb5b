"""Every recipe that ships runs from check to chat with nothing replaced but its weights and its rows."""

import csv
from pathlib import Path

import pytest
import torch
import transformers
from tiny import COLOURS, VIT, tiny_llm_folder, tiny_picture

import finetune
from finetune.pipeline import recipes_folder
from finetune.recipe import load_recipe

RECIPES = sorted(recipes_folder().glob("*.yaml"))


@pytest.fixture(scope="module")
def tiny_parts(tmp_path_factory) -> Path:
    """An LLM, an encoder of 6×6 patches (which 2 and 3 divide), and rows with every column that the recipes read."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llm_folder(folder / "llm")
    torch.manual_seed(1)
    config = transformers.SiglipVisionConfig(**(VIT | {"image_size": 48}))
    transformers.SiglipVisionModel(config).save_pretrained(folder / "encoder")
    transformers.SiglipImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder / "encoder")
    for split in ("train", "test"):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "label", "name_en", "name_zh"])
            for number in range(8):
                label, (red, green, blue) = list(COLOURS.items())[number % len(COLOURS)]
                tiny_picture((red, green, blue + number + 10 * (split == "test"))).save(folder / f"{split}{number}.png")
                writer.writerow([f"{split}{number}.png", label, label, "颜色"])
    return folder


def test_there_is_one_for_each_promised_machine():
    assert {"quickstart", "gpu-8gb", "gpu-16gb", "colab-t4"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_names_of_the_hub_come_with_a_commit(path):
    recipe = load_recipe(path)
    parts = [recipe.model.llm, *(encoder.options for encoder in recipe.model.encoders.values())]
    for part in parts:
        assert Path(part.name).is_absolute() or len(part.revision) == 40


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs_the_whole_way(path, tiny_parts, tmp_path):
    tiny = [
        f"model.llm.name={tiny_parts / 'llm'}",
        "model.llm.revision=null",
        f"model.encoders.image.name={tiny_parts / 'encoder'}",
        "model.encoders.image.revision=null",
        f"data.0.path={tiny_parts / 'train.csv'}",
        f"data.1.path={tiny_parts / 'test.csv'}",
        f"train.cache_folder={tmp_path / 'cache'}",
    ]
    result = finetune.run(path, tiny, tmp_path / "run")
    scores = next(iter(result["scores"].values()))
    assert all(set(values) == {"tuned", "base", "blank", "shuffled", "probe"} for values in scores.values())
    assert (result["merged"] / "model.safetensors").is_file()
    assert isinstance(result["answer"], str)
