"""Projects (a recipe with its LLM, encoders and rows) and finished runs of them, made by the product itself.

A session makes each kind once, in PROJECT/run, and all of pytest's processes share it: a test that writes into a run
takes a copy.
"""

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tiny import COLOURS, FUSIONS, tiny_dataset, tiny_picture, tiny_recipe
from tiny_encoders import tiny_audio_folder

import finetune

LICENCES = {"llm": "apache-2.0", "encoders.image": "mit", "data": "cc0-1.0"}
HUB_NAMES = {"llm": "org/llm", "encoders.image": "org/encoder"}
TONES = {"do": 260, "mi": 650, "so": 1600, "si": 4000}  # hertz
HEADS = {
    "colour": {"task": {"kind": "classify"}, "head": "label"},
    "likely": {"task": {"kind": "classify", "prompt": "Which?"}, "head": {"kind": "language", "answers": "labels"}},
    "mark": {"task": {"kind": "score", "prompt": "How good?", "number": "mark"}, "head": "score"},
    "order": {
        "task": {"kind": "rank", "media": ["image"], "text": [], "group": "user", "relevance": "mark"},
        "head": {"kind": "score", "loss": "pairwise"},
    },
    "words": {"task": {"kind": "classify", "prompt": "Say it.", "media": [], "text": "text"}, "loss_weight": 0.5},
}


def plain(project: Path) -> Path:
    """Pictures and a 16-bit LLM; what LLaVA's class fits, and what may be published."""
    return tiny_recipe(
        project,
        model__projectors={"image": {"kind": "mlp"}},
        publish={"licenses": LICENCES, "hub_names": HUB_NAMES, "languages": ["en"]},
    )


def nf4(project: Path) -> Path:
    """Over a 4-bit LLM, with as many held-out rows as a merge compares by default, and more."""
    tiny_dataset(project / "data", train=16, test=70)
    return tiny_recipe(project, model__llm={"name": str(project / "llm"), "quantize": "nf4"}, merge={})


def heads(project: Path) -> Path:
    """Rows answered by every head, validated while they train."""
    rows = write_rows_of_every_head(project / "rows")
    sources = [
        {"name": name, "path": str(rows / f"{name}-{split}.csv"), "split": split, **source}
        for name, source in HEADS.items()
        for split in ("train", "validation", "test")
    ]
    trains = ["projectors", "adapter", "heads"]
    return tiny_recipe(
        project,
        data=sources,
        train__stages=[{"name": "tune", "trains": trains, "learning_rate": 5.0e-3, "epochs": 3}],
        train__validation={"every_n_steps": 10, "limit": None, "metric": "colour.accuracy"},
        train__tokens_per_batch=160,
        train__save_every_n_steps=5,
        evaluate={"max_new_tokens": 6},
        merge={"rows": 20},
    )


def write_rows_of_every_head(folder: Path) -> Path:
    """The colour is the label, red is best liked: a picture of its own for each row and source."""
    (folder / "images").mkdir(parents=True)
    for split, count in (("train", 24), ("validation", 8), ("test", 8)):
        for name in HEADS:
            rows = []
            for number in range(count):
                place = number % len(COLOURS)
                label, (red, green, blue) = list(COLOURS.items())[place]
                shade = number + 40 * ("train", "validation", "test").index(split) + 3 * list(HEADS).index(name)
                picture = f"images/{name}-{split}-{number}.png"
                tiny_picture((red, min(green + shade, 255), blue)).save(folder / picture)
                text = f"a {label} square, {split} {number}"
                mark, user = len(COLOURS) - place, f"{split}{number // 4}"
                rows.append({"image": picture, "label": label, "mark": mark, "user": user, "text": text})
            write_table(folder / f"{name}-{split}.csv", rows)
    return folder


MEDIA = {"pictures": ["image"], "sounds": ["audio"], "both": ["image", "audio"]}


def media_recipe(project: Path, fusion: str, rows: dict[str, int], head: str | None = None, **changes: Any) -> Path:
    """Pictures, sounds, and questions about both; so many `rows` of each for each split. `head`: of those about one
    medium.
    """
    tiny_audio_folder(project / "ears", "wav2vec2")
    write_pictures_and_sounds(project / "data", rows)
    sources = [
        {
            "name": name,
            "path": str(project / "data" / f"{name}-{split}.csv"),
            "split": split,
            "task": {"kind": "classify", "media": media, "prompt": f"{name}?"},
            **({"head": head} if head and len(media) == 1 else {}),
        }
        for split in rows
        for name, media in MEDIA.items()
    ]
    fused = ["fusion"] if fusion == "cross_attention" else []
    see, hear = ["projectors.image", *fused], ["projectors.audio", *fused]
    stages = [
        {"name": "see", "trains": see, "sources": [0], "learning_rate": 1.0e-2, "epochs": 4},
        {"name": "hear", "trains": hear, "sources": [1], "learning_rate": 1.0e-2, "epochs": 4},
        {"name": "both", "trains": ["projectors", *fused, "adapter"], "learning_rate": 1.0e-2, "epochs": 20},
    ]
    recipe = {
        **parts_by_medium(project, "image", "audio"),
        "model__fusion": {"kind": fusion, **FUSIONS[fusion]},
        "data": sources,
        "train__stages": stages,
        "train__tokens_per_batch": 512,
        "evaluate": {"max_new_tokens": 8},
    }
    return tiny_recipe(project, **(recipe | changes))


def parts_by_medium(project: Path, *order: str) -> dict[str, Any]:
    encoders = {
        "audio": {"kind": "wave", "name": str(project / "ears")},
        "image": {"kind": "vision", "name": str(project / "encoder")},
    }
    projectors = {"audio": {"kind": "stack", "factor": 4}, "image": {"kind": "linear"}}
    return {
        "model__encoders": {name: encoders[name] for name in order},
        "model__projectors": {name: projectors[name] for name in order},
    }


def media(project: Path) -> Path:
    """Pictures and sounds by cross-attention, two of three tasks answered by labels with their probabilities."""
    trains = ["projectors", "fusion", "adapter", "heads"]
    return media_recipe(
        project,
        "cross_attention",
        {"train": 16, "validation": 4, "test": 16},
        "label",
        train__stages=[{"name": "both", "trains": trains, "learning_rate": 5.0e-3, "epochs": 2}],
        train__tokens_per_batch=256,
        train__validation={"every_n_steps": 4, "metric": "pictures.accuracy"},
        merge={"rows": 12},
        **parts_by_medium(project, "audio", "image"),
    )


def write_pictures_and_sounds(folder: Path, counts: dict[str, int]) -> None:
    """pictures-*.csv, sounds-*.csv, and both-*.csv, whose answer names the colour and the tone."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    time = np.arange(4_800) / 16_000
    for split, count in counts.items():
        tables: dict[str, list[dict]] = {name: [] for name in MEDIA}
        for number in range(count):
            colour, tone = list(COLOURS)[number % 4], list(TONES)[number // 4 % 4]
            shade = tuple(int(min(255, value + random.integers(0, 25))) for value in COLOURS[colour])
            picture, sound = f"{split}{number}.png", f"{split}{number}.wav"
            tiny_picture(shade).save(folder / picture)
            wave = 0.4 * np.sin(2 * np.pi * TONES[tone] * time + random.uniform(0, 6))
            soundfile.write(folder / sound, wave + 0.01 * random.standard_normal(len(time)), 16_000)
            tables["pictures"].append({"image": picture, "label": colour})
            tables["sounds"].append({"audio": sound, "label": tone})
            tables["both"].append({"image": picture, "audio": sound, "label": f"{colour} {tone}"})
        for name, rows in tables.items():
            write_table(folder / f"{name}-{split}.csv", rows)


def write_table(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


KINDS: dict[str, Callable[[Path], Path]] = {"plain": plain, "nf4": nf4, "heads": heads, "media": media}


def make_run(kind: str, project: Path) -> Path:
    """Trained, evaluated and merged."""
    torch.manual_seed(0)
    run = trained(KINDS[kind](project))
    finetune.evaluate(run)
    finetune.merge(run)
    return run


def trained(recipe: Path, overrides: list[str] | None = None, run: Path | None = None) -> Path:
    """`run`: by default beside the recipe."""
    return finetune.train(finetune.load_recipe(recipe, overrides or []), run or recipe.parent / "run").path


def copy_of(run: Path, to: Path, *without: str) -> Path:
    """TO/run, to be spoilt, without files of these names; its LLM, encoders and rows stay those of the original."""
    return shutil.copytree(run, to / "run", ignore=shutil.ignore_patterns(*without))


def project_copy(run: Path, to: Path) -> Path:
    """TO/run with a copy of its whole project, whose paths are those of the copy. Hashes of the adapter's and the
    merged folder's files no longer hold: merge again.
    """
    shutil.copytree(run.parent, to, dirs_exist_ok=True)
    for path in (path for pattern in ("*.json", "*.jsonl", "*.yaml") for path in to.rglob(pattern)):
        text = path.read_text(encoding="utf-8")
        if str(run.parent) in text:
            path.write_text(text.replace(str(run.parent), str(to)), encoding="utf-8")
    return to / run.name


def change_json(path: Path, **changes: Any) -> None:
    """Set top-level keys of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | changes, ensure_ascii=False), encoding="utf-8")


def predictions_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def write_predictions(run: Path, predictions: list[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in predictions]
    (run / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")


def file_digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
