"""Run folders as a finished run leaves them, of real media and answers drawn by chance; and what a browser reads."""

import csv
import json
import random
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import yaml
from certificate_files import certificate_content

DATA = Path(__file__).parents[2] / "recipes" / "data"
VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, its text, and whether all are closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, text):
        if not {"script", "style"} & set(self.open):
            self.pieces.append(text)

    def of(self, tag: str, **attributes) -> list[dict]:
        return [its for name, its in self.elements if name == tag and attributes.items() <= its.items()]


def rows_of(name: str) -> list[dict]:
    with (DATA / name / "test.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predictions_of(task: str, name: str, kind: str, label: str, seed: int, sure: bool = False) -> list[dict]:
    """Rows of a data set, two thirds of them right; the other conditions by chance."""
    chance = random.Random(seed)
    rows = rows_of(name)
    labels = sorted({row[label] for row in rows})
    found = []
    for number, row in enumerate(rows):
        right = chance.random() < 0.66
        tuned = row[label] if right else chance.choice([other for other in labels if other != row[label]])
        given = {"base": "", "blank": labels[0], "shuffled": chance.choice(labels)}
        confidence = chance.uniform(0.4, 1.0)
        rest = (1 - confidence) / (len(labels) - 1)
        found.append(
            {
                "task": task,
                "row": f"test.csv:{number + 2}",
                "media": [str(DATA / name / row[kind])],
                "kinds": [kind],
                "question": "图片里是什么？",
                "target": row[label],
                "tuned": {"label": tuned, "probabilities": {o: confidence if o == tuned else rest for o in labels}}
                if sure
                else tuned,
                **given,
                "good": float(tuned == row[label]),
            }
        )
    return found


def accuracy_of(predictions: list[dict], condition: str) -> float:
    return sum(words_of(row.get(condition)) == row["target"] for row in predictions) / len(predictions)


def words_of(prediction) -> str:
    return prediction.get("label") if isinstance(prediction, dict) else prediction


def confusion_of(predictions: list[dict]) -> dict:
    labels = sorted({row["target"] for row in predictions})
    counted = Counter((row["target"], words_of(row["tuned"])) for row in predictions)
    return {
        "confusion": {"labels": labels, "counts": [[counted[a, b] for b in labels] + [0] for a in labels]},
        "per_label": {
            a: {
                "precision": counted[a, a] / max(1, sum(counted[b, a] for b in labels)),
                "recall": counted[a, a] / max(1, sum(counted[a, b] for b in labels)),
                "support": sum(counted[a, b] for b in labels),
            }
            for a in labels
        },
    }


def recipe_of(*sources: dict) -> dict:
    return {
        "name": "quickstart",
        "seed": 7,
        "model": {
            "llm": {"name": "/home/someone/weights/minimind2-small", "revision": None, "quantize": "nf4"},
            "encoders": {"image": {"kind": "vision", "name": "org/mobilenet-v2", "revision": None, "tiles": 1}},
            "projectors": {"image": {"kind": "pixel_shuffle", "factor": 2}},
            "fusion": {"kind": "prefix"},
        },
        "adapter": {"rank": 16, "alpha": 32.0, "dropout": 0.05, "targets": "all-linear"},
        "media": {"max_bytes": 2**28, "max_pixels": 64 * 10**6, "max_seconds": 1800.0, "max_frames": 256},
        "data": list(sources),
        "train": {
            "tokens_per_batch": 512,
            "stages": [
                {"name": "align", "trains": ["projectors"], "learning_rate": 1e-3, "epochs": 2},
                {"name": "tune", "trains": ["projectors", "adapter"], "learning_rate": 4e-4, "epochs": 3},
            ],
        },
        "evaluate": {"split": "test"},
    }


def stage_of(steps: int, seed: int, weights: dict) -> dict:
    chance = random.Random(seed)
    return {
        "losses": [round(2.5 / (1 + step / 20) + chance.uniform(0, 0.3), 6) for step in range(steps)],
        "token_accuracy": [0.5] * steps,
        "steps": steps,
        "samples": 2232,
        "tokens": 61234,
        "seconds": 72.5,
        "trained_weights": weights,
        "validation": [
            {
                "step": step,
                "scores": {"classify": {"accuracy": 0.2 + 0.4 * step / steps, "f1": 0.15 + 0.4 * step / steps}},
            }
            for step in range(steps // 4, steps + 1, steps // 4)
        ],
        "best_step": steps // 2,
    }


def measures_of(kl: float, tasks) -> dict:
    scores = {task: {"accuracy": 0.5} for task in tasks}
    return {"kl": kl, "agreement": 1.0, "largest_logit_difference": 0.5, "kl_from_base": 1.5, "scores": scores}


def write_run(folder: Path, recipe: dict, predictions: list[dict], **changes) -> Path:
    """A finished run of these predictions; `changes` are sections of metrics.json, None for one that isn't there."""
    tasks: dict[str, list[dict]] = {}
    for row in predictions:
        tasks.setdefault(row["task"], []).append(row)
    scores, intervals, tables = {}, {}, {}
    for task, rows in tasks.items():
        values = {name: round(accuracy_of(rows, name), 4) for name in ("tuned", "base", "blank", "shuffled")}
        scores[task] = {"accuracy": {**values, "probe": 0.55}, "f1": {**values, "probe": None}}
        spread = {name: [max(0, value - 0.06), value + 0.06] for name, value in values.items()}
        intervals[task] = {"accuracy": spread, "f1": spread}
        tables[task] = confusion_of(rows)
    metrics = {
        "train": {
            "stages": {
                "align": stage_of(200, 1, {"projectors.image": 915456}),
                "tune": stage_of(320, 2, {"projectors.image": 915456, "adapter": 1671168}),
            },
            "rows": 1116,
            "tokens_per_epoch": 30617,
            "packed": True,
        },
        "scores": scores,
        "intervals": intervals,
        "tables": tables,
        "seconds": {"decode": 4.2, "encode": 61.9, "llm": 151.2, "train": 223.0, "evaluate": 7345.0},
        "peak_memory_bytes": {"train_cpu": 1395864371, "evaluate_cpu": 1258291200},
        "energy_joules": {"train_cpu": 15432.1},
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "adapter").mkdir()
    write = {
        "metrics.json": {name: section for name, section in metrics.items() if section is not None},
        "versions.json": {"torch": "2.13.0", "transformers": "5.23.0", "processes": 1},
        "data/summary.json": {
            "train": {"rows": 1116, "media": 1116, "different_answers": 9, "answers": {"符号": 212, "物品": 201}},
            "test": {"rows": 246, "media": 246, "different_answers": 9, "answers": {"符号": 47}},
            "validation": {"rows": 0, "media": 0, "different_answers": 0, "answers": {}},
        },
        "adapter/multimodal.json": {
            "language_model": {"name": "minimind2-small", "revision": None},
            "encoders": {"image": {"kind": "vision", "options": {"revision": "0123456789abcdef" * 2 + "01234567"}}},
        },
        "certificate.json": certificate_content(
            primary=dict.fromkeys(tasks, "accuracy"),
            candidates={
                name: measures_of(kl, tasks)
                for name, kl in (("the 16-bit LLM", 0.1), ("the dequantized nf4 LLM", 2e-9))
            },
            saved=measures_of(2e-9, tasks),
        ),
    }
    for name, content in write.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in predictions]
    (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def source_of(kind: str = "classify", **more) -> dict:
    return {
        "path": "/home/someone/data/emoji/test.csv",
        "split": "test",
        "task": {"kind": kind, "prompt": "什么？"},
    } | more
