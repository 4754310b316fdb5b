"""From the recipe to the first optimizer step, by number of rows: seconds and memory of a first and a second start.

    make weights && python benchmarks/start.py [--rows 1000 10000 100000] [--kinds text picture] [--json FILE]

Rows are made up: questions and answers of a few words, in the second kind about pictures of 32 x 32 pixels, of which
at most `--pictures` differ; a tenth is held out. The tokenizer is the quickstart's, the LLM and the encoder are tiny
and have random weights, so that what is measured is what depends on rows. Each start is a process and a run folder of
its own; the second finds the caches that the first has filled. The files are in the system's page cache in both.

Seconds of each phase are CPU seconds. Memory in MiB: the most that the process has held, what it holds after the first
step, and of that what isn't a mapped file, which the system may drop: `own`, and `kept` when the C library has given
back what nothing uses. The C library holds up to 70 MiB of a step's own room, or none, by chance and whatever the rows
are. So second starts are repeated; below, by how many bytes a row the least of each size grows up to the most rows.
1,000 rows aren't kept as tokens: their second start tokenizes them, and leaves more room behind than one that doesn't.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
WORDS = ("the", "red", "small", "house", "tree", "river", "猫", "狗", "在", "红色", "房子", "is", "not", "what", "how")
SIDE = 32  # pixels
SIZES = ("peak", "resident", "own", "kept")
PHASES = ("import", "read", "components", "encode", "tokenize", "llm", "pack", "step")


def make(folder: Path, kind: str, rows: int, pictures: int) -> Path:
    """A recipe, its rows and its weights."""
    chance = random.Random(0)
    names = make_pictures(folder / "pictures", min(rows, pictures)) if kind == "picture" else []
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rows):
            question, answer = (" ".join(chance.choices(WORDS, k=length)) for length in (20, 12))
            row = {"question": f"{question} {number}", "answer": answer}
            row |= {"image": names[number % len(names)]} if names else {}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    make_weights(folder)
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe_of(folder, bool(names))), encoding="utf-8")
    return path


def make_pictures(folder: Path, count: int) -> list[str]:
    import numpy as np
    import PIL.Image

    names = [f"{number // 1000}/{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        PIL.Image.fromarray(coarse).resize((SIDE, SIDE)).save(folder / name)
    return [f"pictures/{name}" for name in names]


def make_weights(folder: Path) -> None:
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(WEIGHTS / "minimind2-small")
    tokenizer.save_pretrained(folder / "llm")
    llm = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.AutoModelForCausalLM.from_config(llm).save_pretrained(folder / "llm")
    vision = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        vision_use_head=False,
    )
    transformers.SiglipVisionModel(vision).save_pretrained(folder / "vision")
    transformers.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / "vision")


def recipe_of(folder: Path, pictures: bool) -> dict[str, Any]:
    media = ["image"] if pictures else []
    model: dict[str, Any] = {"llm": {"name": str(folder / "llm"), "dtype": "float32"}}
    if pictures:
        model["encoders"] = {"image": {"kind": "vision", "name": str(folder / "vision")}}
        model["projectors"] = {"image": "mlp"}
    trains = ["projectors", "adapter"] if pictures else ["adapter"]
    return {
        "name": "start",
        "model": model,
        "data": [{"path": str(folder / "rows.jsonl"), "task": {"kind": "answer", "media": media}, "hold_out": 0.1}],
        "train": {"tokens_per_batch": 1024, "stages": [{"name": "tune", "trains": trains, "learning_rate": 1e-4}]},
    }


def start(recipe_path: Path, run: Path, begin: float) -> dict[str, Any]:
    """What this process takes, which began at `begin` (by `perf_counter`): CPU seconds by phase, bytes."""
    from finetune.common.progress import Stopwatch, console, quiet_libraries, trim_memory
    from finetune.common.run_folder import RunFolder
    from finetune.model.trainable import set_trainable
    from finetune.recipe.load import load_recipe
    from finetune.training.collate import Collator
    from finetune.training.prepare import prepare, stage_rows
    from finetune.training.stage_training import StageTraining
    from finetune.training.stopping import StopBetweenSteps
    from finetune.training.train import layout_of, load_composite
    from finetune.training.trainer import TrainerCallback, train_stage

    imported = sum(os.times()[:4])

    class OneStep(TrainerCallback):
        memory: dict[str, int]

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.memory = memory()
            trim_memory()
            self.memory["kept"] = memory()["own"]
            control.should_training_stop = True

    watch = Stopwatch()
    quiet_libraries()
    console.quiet = True
    recipe = load_recipe(recipe_path)
    prepared = prepare(RunFolder(run), recipe)
    with watch("llm"):
        model = load_composite(prepared.run)
        kind = layout_of(model, prepared.run)
    stage = recipe.train.stages[0]
    with watch("pack"):
        samples, rows = stage_rows(prepared, stage, model, kind, recipe.seed)
    set_trainable(model, stage.trains)
    training = StageTraining(
        model=model,
        tokenizer=prepared.run.components.tokenizer,
        stage=stage,
        settings=recipe.train,
        collator=Collator(samples, prepared.run.features.features, field="features", kind=kind),
        rows=rows,
        folder=prepared.run.folder.checkpoints / stage.name,
        seed=recipe.seed,
        dtype=prepared.run.components.dtype,
    )
    watcher = OneStep()
    with watch("step"), StopBetweenSteps() as stop:
        (log,) = train_stage(training, stop, callbacks=[watcher])
    return {
        "phases": {"import": imported, **prepared.watch.cpu_seconds, **watch.cpu_seconds},
        "seconds": perf_counter() - begin,
        "cpu_seconds": sum(os.times()[:4]),
        "memory": watcher.memory,
        "steps": training.steps,
        "loss": log["loss"],
    }


def memory() -> dict[str, int]:
    """Bytes, as Linux counts them."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    values = dict(line.split(":", 1) for line in lines)
    names = {"peak": "VmHWM", "resident": "VmRSS", "own": "RssAnon"}
    return {name: int(values[field].split()[0]) * 1024 for name, field in names.items()}


def measure(kind: str, rows: int, pictures: int, again: int) -> list[dict[str, Any]]:
    """A first start, and second ones."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = make(folder, kind, rows, pictures)
        surroundings = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
        for number in range(1 + again):
            command = [sys.executable, __file__, "--start", str(recipe), str(folder / f"run-{number}")]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=surroundings)
            figures = json.loads(done.stdout.splitlines()[-1])
            found.append({"kind": kind, "rows": rows, "start": "second" if number else "first", **figures})
    if len(losses := {one["loss"] for one in found}) > 1:
        raise SystemExit(f"another loss in a second start: {losses}")
    return found


def growth(found: Sequence[Mapping[str, Any]], kind: str) -> Iterator[str]:
    """By how many bytes a row the least of each size grows in second starts, up to the most rows."""
    least: dict[int, dict[str, int]] = {}
    for one in found:
        if (one["kind"], one["start"]) == (kind, "second"):
            before = least.get(one["rows"], one["memory"])
            least[one["rows"]] = {name: min(before[name], one["memory"][name]) for name in SIZES}
    *fewer, most = sorted(least)
    for rows in fewer:
        grown = {name: (least[most][name] - least[rows][name]) / (most - rows) for name in SIZES}
        sizes = ", ".join(f"{name} {size:,.0f}" for name, size in grown.items())
        yield f"{kind}, bytes a row from {rows:,} to {most:,}: {sizes}"


def line(one: dict[str, Any]) -> str:
    phases = "".join(f"{one['phases'].get(name, 0):>{max(6, len(name)) + 2}.1f}" for name in PHASES)
    sizes = "".join(f"{one['memory'][name] / 2**20:>10,.0f}" for name in SIZES)
    return (
        f"{one['kind']:<8}{one['rows']:>8,}  {one['start']:<7}{one['seconds']:>8.1f}{one['cpu_seconds']:>8.1f}"
        f"{phases}{sizes}"
    )


def main(arguments: list[str] | None = None) -> None:
    begin = perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--kinds", nargs="+", default=["text", "picture"], choices=["text", "picture"])
    parser.add_argument("--pictures", type=int, default=10_000, help="Most pictures that differ.")
    parser.add_argument("--again", type=int, default=3, choices=range(1, 10), help="Second starts.")
    parser.add_argument("--json", type=Path, help="File for the figures.")
    parser.add_argument("--start", type=Path, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.start:
        print(json.dumps(start(*given.start, begin)))
        return
    phases = "".join(f"{name:>{max(6, len(name)) + 2}}" for name in PHASES)
    sizes = "".join(f"{name:>10}" for name in SIZES)
    print(f"{'kind':<8}{'rows':>8}  {'start':<7}{'seconds':>8}{'CPU':>8}{phases}{sizes}")
    found = []
    for kind in given.kinds:
        for rows in given.rows:
            for one in measure(kind, rows, given.pictures, given.again):
                found.append(one)
                print(line(one), flush=True)
        for text in growth(found, kind):
            print(text, flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
