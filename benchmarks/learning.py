"""What projector and LLM make of what an encoder sees or hears: the offline recipes, trained, scored on held-out rows.

    python benchmarks/learning.py                          # picture, speech, video, pictures and speech together
    python benchmarks/learning.py quickstart-speech        # one of them
    python benchmarks/learning.py cases                    # sentiment, recommend, radiology, support-calls, m6
    python benchmarks/learning.py syllables                # real recordings, of a speaker never heard before
    python benchmarks/learning.py --into runs/learning     # keep the runs; those that are there are only read

Weights and recordings: python recipes/offline/fetch.py mobilenet_v2 minimind2_small whisper_tiny gcin_syllables

`tuned`: the score on held-out rows. `blank`, `shuffled`: the same model with nothing to see or hear, and with another
row's media; `blank image`, `blank audio`: with one of two media blank. `untrained`: the same parts before training.
`probe`: logistic regression on the same encoder's mean-pooled features of the same training rows, regularised by
cross-validation: what the encoder gives away without an LLM. 95%: the confidence interval, by bootstrap over rows.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PLACES = (ROOT / "recipes", ROOT / "benchmarks" / "recipes")
DEFAULT = ("quickstart", "quickstart-speech", "quickstart-video", "quickstart-image-speech")
CASES = ("sentiment", "recommend", "radiology", "support-calls", "m6")
COLUMNS = {  # as in metrics.json: as printed
    "tuned": "tuned",
    "probe": "probe",
    "blank": "blank",
    "shuffled": "shuffled",
    "blank_image": "blank image",
    "blank_audio": "blank audio",
    "base": "untrained",
}
METRICS = ("accuracy", "f1", "exact_match", "token_f1", "character_error_rate", "word_error_rate", "vqa_accuracy",
           "mrr", "auroc", "error_nats_per_token")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--into", type=Path, help="folder of runs (default: a temporary one)")
    chosen = parser.parse_args()
    found = {path.stem: path for place in PLACES for path in sorted(place.glob("*.yaml"))}
    if unknown := [name for name in chosen.recipes if name not in (*found, "cases")]:
        parser.error(f"no recipe is called {unknown[0]!r}; there are: {', '.join(found)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.into or Path(temporary)
        names = [one for name in chosen.recipes or DEFAULT for one in (CASES if name == "cases" else [name])]
        rows = [row for name in names for row in measured(found[name], folder / name)]
    show(rows)
    return 0


def measured(recipe: Path, run: Path) -> list[dict[str, Any]]:
    """Train and evaluate in processes of their own; a row per task and metric."""
    if not (run / "metrics.json").is_file():
        finetune("train", str(recipe), "--run", str(run))
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    if "scores" not in metrics:
        finetune("evaluate", str(run))
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {
            "recipe": recipe.stem,
            "task": task,
            "metric": metric,
            "rows": sum(row["task"] == task for row in predictions),
            "scores": table,
            "interval": metrics["intervals"][task].get(metric, {}).get("tuned"),
            "minutes": metrics["seconds"]["train"] / 60,
            "memory": metrics["peak_memory_bytes"]["train_cpu"] / 2**30,
        }
        for task, tables in metrics["scores"].items()
        for metric, table in tables.items()
        if metric in METRICS
    ]


def finetune(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "finetune.commands.cli", *arguments], check=True, cwd=ROOT)


def show(rows: list[dict[str, Any]]) -> None:
    console = Console(width=150)
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")
    )
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    console.print(
        f"{date.today()}, {platform.machine()}, {threads} threads, Python {platform.python_version()}, {libraries}"
    )
    used = [name for name in COLUMNS if any(name in row["scores"] for row in rows)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("recipe", "task", "metric"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "rows",
        "tuned",
        "95%",
        *(COLUMNS[name].replace(" ", "\n") for name in used[1:]),
        "train",
        "memory",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for row in rows:
        new = row["recipe"] != before
        before = row["recipe"]
        values = [row["scores"].get(name) for name in used]
        spread = "–".join(f"{end:.3f}" for end in row["interval"] or ())
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        cost = (f"{row['minutes']:.1f} min", f"{row['memory']:.1f} GiB") if new else ("", "")
        name = row["recipe"] if new else ""
        table.add_row(name, row["task"], row["metric"], str(row["rows"]), cells[0], spread, *cells[1:], *cost)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
