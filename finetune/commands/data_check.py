"""Look through all that a recipe trains and evaluates on, before it does: every row, every medium, every token."""

import json
import os
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from finetune.commands._reader import Asked, Reader
from finetune.common.errors import DataError, FinetuneError
from finetune.common.run_folder import whole_folder, write_text
from finetune.data.check.compare import NEAR_BITS, NEAR_LEVELS, compare
from finetune.data.check.fix import check_target, fixed_sources
from finetune.data.check.ledger import CODES, ERRORS, Examined, Finding, Ledger
from finetune.data.check.lenient import lenient_rows
from finetune.data.check.page import findings_page, place
from finetune.data.rows import Source
from finetune.data.sample import Row
from finetune.recipe.load import dump_recipe, load_recipe
from finetune.recipe.schema import Format, Recipe

CHUNK = 32  # rows given to a worker at once
FEW = 256  # rows: for fewer no worker is started
AHEAD = 4  # chunks for each worker that wait to be read or reported

Numbered = tuple[int, int, Row]  # number over all sources, number of the source, the row


def data_check(
    recipe: Path | str,
    overrides: Sequence[str] = (),
    *,
    fix: Path | str | None = None,
    copy_media: bool = False,
    workers: int | None = None,
    out: Path | str | None = None,
) -> dict[str, Any]:
    """Examine all rows of a recipe; writes OUT/check.json and OUT/check.html (default: runs/NAME-check).

    `fix`: folder for a cleaned copy of the rows and a recipe that reads it, with what was left out in quarantine.jsonl;
    with `copy_media` the media too. `workers`: processes that decode, 0: none beside this one, None: one a core, where
    there is enough to do. Returns counts: "rows", "errors", "warnings", "findings" {code: n}, and the paths written.
    Raises RecipeError, ModelError; DataError where there is nothing to read, or a worker died.
    """
    loaded = load_recipe(recipe, overrides)
    asked = Asked.of(loaded)
    folder = Path(out) if out is not None else Path("runs") / f"{loaded.name}-check"
    if fix is not None:
        check_target(Path(fix), asked.sources)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        ledger = Ledger(Path(temporary) / "ledger.sqlite")
        try:
            rows = fill(ledger, asked, workers)
            names = names_of(asked.sources)
            compare(ledger, lambda source, number: f"{names[source]}:{number}")
            result = summary(ledger, loaded.name, names, rows)
            write_report(ledger, result, names, folder / "check.json")
            findings_page(ledger, result, names, folder / "check.html", asked.limits)
            result |= {"json": folder / "check.json", "html": folder / "check.html"}
            if fix is not None:
                result["fixed"] = write_fixed(ledger, loaded, asked, Path(fix), copy_media)
        finally:
            ledger.close()
    return result


def fill(ledger: Ledger, asked: Asked, workers: int | None) -> int:
    """Examine every row into the ledger. Returns how many there are."""
    from rich.console import Console

    count = 0
    rows = _rows(ledger, asked.sources)
    first = list(islice(rows, FEW))
    rows = chain(first, rows)
    if workers is None:
        workers = cores() if len(first) == FEW else 0
    console = Console(stderr=True, highlight=False)
    with console.status("rows: 0") as status:
        for examined in in_processes(asked, rows, workers) if workers else _in_process(asked, rows):
            ledger.add(examined)
            count += len(examined)
            status.update(f"rows: {count:,}")
    usable = dict(ledger.all("select source, count(*) from rows group by source"))
    for number, source in enumerate(asked.sources):
        if number not in usable:
            ledger.find([Finding("no_rows", f"{source.path}: no row can be used", None, number)])
    return count


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _rows(ledger: Ledger, sources: Sequence[Source]) -> Iterator[Numbered]:
    count = 0
    for number, source in enumerate(sources):
        unreadable: list[Finding] = []

        def wrong(line: int, text: str, raw: str, source: int = number, found: list[Finding] = unreadable) -> None:
            found.append(Finding("unreadable", text, None, source, line))
            if len(found) == FEW:
                ledger.find(found)
                found.clear()

        for row in lenient_rows(source, wrong):
            yield count, number, row
            count += 1
        ledger.find(unreadable)


def _in_process(asked: Asked, rows: Iterator[Numbered]) -> Iterator[list[Examined]]:
    reader = Reader(asked)
    while chunk := list(islice(rows, CHUNK)):
        yield [reader.examine(*row) for row in chunk]


def in_processes(asked: Asked, rows: Iterator[Numbered], workers: int) -> Iterator[list[Examined]]:
    """Chunks of rows, in their order, read by `workers` processes; only a few are under way at any time. Raises
    DataError where a process dies: by a decoder that crashes, or for want of memory.
    """
    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # A server that has imported torch once: its children share those pages, and begin at once.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["finetune.model.build", "finetune.commands._reader"])
    waiting: deque[tuple[Numbered, Future[list[Examined]]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(asked,)) as pool:
        try:
            while True:
                while len(waiting) < AHEAD * workers and (chunk := list(islice(rows, CHUNK))):
                    waiting.append((chunk[0], pool.submit(_examine, chunk)))
                if not waiting:
                    return
                (_, _, row), future = waiting[0]
                yield future.result()
                waiting.popleft()
        except BrokenProcessPool:
            raise DataError(
                f"{row.where}: a worker died at this row or one of the next {AHEAD * workers * CHUNK}: out of memory, "
                "or a file that crashes its decoder; --workers 0 goes row by row"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_reader: Reader | None = None  # of a worker process
_failed: FinetuneError = FinetuneError("a worker that hasn't begun")


def _begin(asked: Asked) -> None:
    global _reader, _failed
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)
    try:
        _reader = Reader(asked)
    except FinetuneError as error:  # an initializer that raises only leaves a broken pool
        _failed = error


def _examine(chunk: list[Numbered]) -> list[Examined]:
    if _reader is None:
        raise _failed
    return [_reader.examine(*row) for row in chunk]


def names_of(sources: Sequence[Source]) -> list[str]:
    """What the report calls each source's file: its name, with a folder before it where several have the same."""
    short = [source.path.name for source in sources]
    unlike = {source.path for source in sources}
    twice = {name for name in short if len({path for path in unlike if path.name == name}) > 1}
    return [
        f"{source.path.parent.name}/{name}" if name in twice else name
        for source, name in zip(sources, short, strict=True)
    ]


def summary(ledger: Ledger, name: str, names: Sequence[str], rows: int) -> dict[str, Any]:
    """What the report begins with."""
    counts = ledger.counts()
    splits = {
        split: {"rows": count, "tokens": tokens, "longest": longest}
        for split, count, tokens, longest in ledger.all(
            "select split, count(*), sum(tokens), max(tokens) from rows group by split order by split"
        )
    }
    media = dict(ledger.all("select kind, count(distinct digest) from uses group by kind order by kind"))
    return {
        "name": name,
        "rows": rows,
        "errors": sum(count for code, count in counts.items() if code in ERRORS),
        "warnings": sum(count for code, count in counts.items() if code not in ERRORS),
        "splits": splits,
        "different_media": media,
        "near": {"bits_of_128": NEAR_BITS, "levels_of_255": NEAR_LEVELS},
        "findings": {code: counts[code] for code in CODES if code in counts},
        "examples": {code: _example(next(ledger.findings(code, 1)), names) for code in CODES if code in counts},
    }


def _example(found: Finding, names: Sequence[str]) -> str:
    where = place(found, names)
    return found.text if found.text.startswith(where) else f"{where}: {found.text}"


def write_report(ledger: Ledger, result: dict[str, Any], names: Sequence[str], path: Path) -> None:
    """check.json: the summary, and every finding as {"code", "severity", "file", "line", "text", "media"}."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(result, indent=2, ensure_ascii=False).removesuffix("\n}") + ',\n  "list": [')
        separator = "\n"
        for found in ledger.findings():
            entry = {
                "code": found.code,
                "severity": CODES[found.code][0],
                "file": names[found.source],
                "line": found.number or None,
                "text": found.text,
                "media": [path for path in (found.path, found.other) if path],
            }
            file.write(f"{separator}    {json.dumps(entry, ensure_ascii=False)}")
            separator = ",\n"
        file.write("\n  ]\n}\n")
    os.replace(partial, path)


def write_fixed(ledger: Ledger, recipe: Recipe, asked: Asked, folder: Path, copy_media: bool) -> dict[str, Any]:
    """The cleaned copy. Returns {"recipe": path, "rows": kept, "quarantined": left out}."""
    with whole_folder(folder) as partial:
        changes, counts = fixed_sources(ledger, asked.sources, partial, copy_media)
        for change in changes:
            if change["format"] is not None:
                change["format"] = Format.parse(change["format"])
        data = [source.model_copy(update=change) for source, change in zip(recipe.data, changes, strict=True)]
        write_text(partial / "recipe.yaml", dump_recipe(recipe.model_copy(update={"data": data})))
    return {"recipe": folder / "recipe.yaml", **counts}
