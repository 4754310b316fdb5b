"""Recipes of small bases, and their rows."""

import json
from pathlib import Path
from typing import Any

import soundfile
from tiny import COLOURS, tiny_picture
from tiny_encoders import tiny_sound
from trained_runs import write_table

from families.family import Family

ROWS = {"train": 8, "test": 4}
SIZES = ((80, 48), (48, 48), (36, 68))


def write_rows(folder: Path, medium: str) -> Path:
    """train.csv and test.csv: pictures of a colour in several sizes, or sounds of several lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        table: list[dict[str, str]] = []
        for number in range(count):
            seed = number + 20 * list(ROWS).index(split)
            label, (red, green, blue) = list(COLOURS.items())[number % len(COLOURS)]
            name = f"{split}{number}.{'png' if medium == 'image' else 'wav'}"
            if medium == "image":
                tiny_picture((red, green, min(blue + seed, 255)), SIZES[number % len(SIZES)]).save(folder / name)
            else:
                soundfile.write(folder / name, tiny_sound(0.5 + 0.05 * seed, seed), 16_000)
            table.append({medium: name, "label": label})
        write_table(folder / f"{split}.csv", table)
    return folder


def base_settings(family: Family, folder: Path) -> dict[str, Any]:
    """The recipe's `model.base` for the family's folder."""
    settings: dict[str, Any] = {"name": str(folder), "quantize": "none"}
    if family.recipe_template is not None:
        template = folder.with_suffix(".jinja")
        template.write_text(family.recipe_template)
        settings["chat_template"] = str(template)
    return settings


def base_recipe(project: Path, family: Family, base: Path, medium: str, **base_changes: Any) -> Path:
    """A recipe that tunes the base in seconds; PROJECT/data is written."""
    data = write_rows(project / "data", medium)
    task = {"kind": "classify", "media": [medium], "prompt": "What is this?"}
    recipe = {
        "name": "tiny",
        "seed": 3,
        "model": {"base": base_settings(family, base) | base_changes},
        "adapter": {"rank": 4, "alpha": 8},
        "data": [
            {"path": str(data / "train.csv"), "task": task},
            {"path": str(data / "test.csv"), "task": task, "split": "test"},
        ],
        "train": {
            "tokens_per_batch": 1024,
            "cache_folder": str(project / "cache"),
            "stages": [{"name": "tune", "trains": ["adapter"], "learning_rate": 5.0e-3, "epochs": 6}],
        },
        "evaluate": {"max_new_tokens": 4},
        "merge": {"rows": 4},
    }
    path = project / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=2))
    return path
