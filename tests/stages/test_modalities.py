"""One model for pictures and sound: each is used, by the tasks that it belongs to and by no other."""

import csv
import json

import numpy as np
import pytest
import soundfile
import torch
from tiny import COLOURS, FUSIONS, tiny_picture, tiny_recipe
from tiny_encoders import tiny_audio_folder

import finetune
from finetune.assistant import Look
from finetune.errors import DataError

TONES = {"do": 260, "mi": 650, "so": 1600, "si": 4000}  # hertz


def write_rows(folder, train: int = 16, test: int = 8) -> None:
    """pictures-*.csv, sounds-*.csv, and both-*.csv, whose answer names the colour and the tone."""
    random = np.random.default_rng(0)
    time = np.arange(4_800) / 16_000
    for split, count in (("train", train), ("test", test)):
        pictures, sounds, both = [], [], []
        for number in range(count):
            colour, tone = list(COLOURS)[number % 4], list(TONES)[number // 2 % 4]
            shade = tuple(int(min(255, value + random.integers(0, 25))) for value in COLOURS[colour])
            picture, sound = f"{split}{number}.png", f"{split}{number}.wav"
            tiny_picture(shade).save(folder / picture)
            wave = 0.4 * np.sin(2 * np.pi * TONES[tone] * time + random.uniform(0, 6))
            soundfile.write(folder / sound, wave + 0.01 * random.standard_normal(len(time)), 16_000)
            pictures.append({"image": picture, "label": colour})
            sounds.append({"audio": sound, "label": tone})
            both.append({"image": picture, "audio": sound, "label": f"{colour} {tone}"})
        for name, rows in (("pictures", pictures), ("sounds", sounds), ("both", both)):
            with (folder / f"{name}-{split}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


TASKS = {"pictures": ["image"], "sounds": ["audio"], "both": ["image", "audio"]}


def recipe_of(folder, fusion: str):
    audio = tiny_audio_folder(folder / "ears")
    tiny_recipe(folder)
    write_rows(folder / "data")
    data = [
        {
            "name": name,
            "path": str(folder / "data" / f"{name}-{split}.csv"),
            "split": split,
            "task": {"kind": "classify", "media": media, "prompt": f"{name}?"},
        }
        for split in ("train", "test")
        for name, media in TASKS.items()
    ]
    fused = ["fusion"] if fusion == "cross_attention" else []
    see, hear = ["projectors.image", *fused], ["projectors.audio", *fused]
    return tiny_recipe(
        folder,
        model__encoders={
            "image": {"kind": "vision", "name": str(folder / "encoder")},
            "audio": {"kind": "whisper", "name": str(audio)},
        },
        model__projectors={"image": {"kind": "linear"}, "audio": {"kind": "conv"}},
        model__fusion={"kind": fusion, **FUSIONS[fusion]},
        data=data,
        train__stages=[
            {"name": "see", "trains": see, "sources": [0], "learning_rate": 1.0e-2, "epochs": 4},
            {"name": "hear", "trains": hear, "sources": [1], "learning_rate": 1.0e-2, "epochs": 4},
            {"name": "both", "trains": ["projectors", *fused, "adapter"], "learning_rate": 1.0e-2, "epochs": 25},
        ],
        train__tokens_per_batch=512,
        evaluate={"max_new_tokens": 8},
    )


@pytest.fixture(scope="module", params=FUSIONS)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    return finetune.train(finetune.load_recipe(recipe_of(folder, request.param)), folder / "run").path


def test_without_one_medium_only_its_own_tasks_suffer(run):
    scores = {name: table["accuracy"] for name, table in finetune.evaluate(run)["scores"].items()}
    print(scores)
    assert set(scores) == set(TASKS)
    for name, media in TASKS.items():
        assert scores[name]["tuned"] >= 0.7, name
        for medium in ("image", "audio"):
            blanked = scores[name][f"blank_{medium}"]
            if medium in media:
                assert blanked <= scores[name]["tuned"] - 0.3, (name, medium)
            else:
                assert blanked == scores[name]["tuned"], (name, medium)
