"""Examine all rows that a recipe trains and evaluates on, before it does: every row, every medium, every token."""

import json
import os
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from finetune.commands._reader import Reader, held_out
from finetune.common import display
from finetune.common.errors import DataError, FinetuneError, option
from finetune.common.run_folder import replacing, whole_folder, write_text
from finetune.data.check.compare import NEAR_BITS, NEAR_LEVELS, compare
from finetune.data.check.fix import check_target, clean_copy
from finetune.data.check.ledger import CODES, ERRORS, Examined, Finding, Ledger, SplitCounts, Summary
from finetune.data.check.lenient import lenient_rows
from finetune.data.check.page import findings_page
from finetune.data.read import file_names
from finetune.data.sample import Row
from finetune.recipe.load import Recipe, RecipeLike, as_recipe, dump_recipe
from finetune.recipe.schema import Source
from finetune.recipe.words import Location
from finetune.recipe.yaml_reader import read_text, read_yaml, rewritten

CHUNK = 32  # rows given to a worker at once
FEW_ROWS = 256  # for fewer no worker is started
CHUNKS_AHEAD = 4  # per worker, waiting to be read or reported

NumberedRow = tuple[int, int, Row, str]  # number over all sources, number of the source, the row, its split


@dataclass(frozen=True)
class Fixed:
    """The cleaned copy: its `recipe`, how many `rows` it has, how many were left out, and whether it is `clean`: each
    source has rows left.
    """

    recipe: Path
    rows: int
    quarantined: int
    clean: bool


@dataclass(frozen=True, repr=False)
class CheckResult:
    """`summary`: what check.json begins with; `json`, `html`: the report; `fixed`: the cleaned copy, where one was
    written.
    """

    summary: Summary
    json: Path
    html: Path
    fixed: Fixed | None = None

    @property
    def errors(self) -> int:
        return self.summary["errors"]

    @property
    def warnings(self) -> int:
        return self.summary["warnings"]

    def __repr__(self) -> str:
        name, rows = self.summary["name"], self.summary["rows"]
        return f"{name}: {rows:,} rows, {self.errors:,} errors, {self.warnings:,} warnings: {self.html}"

    def _repr_html_(self) -> str:
        rows = [
            (CODES[code][0], f"{count:,}", CODES[code][1], self.summary["examples"][code])
            for code, count in self.summary["findings"].items()
        ]
        return display.line(repr(self)) + display.table(("", "found", "finding", "example"), rows, left=True)


def data_check(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    fix: Path | str | None = None,
    copy_media: bool = False,
    workers: int | None = None,
    out: Path | str | None = None,
) -> CheckResult:
    """Examine all rows of a recipe; writes OUT/check.json and OUT/check.html (default: runs/NAME-check).

    `fix`: folder for a cleaned copy of the rows and a recipe that reads it, with what was left out in quarantine.jsonl;
    with `copy_media` the media too. `workers`: processes that decode, 0: none beside this one, None: one per core if
    there are enough rows. Raises RecipeError, ModelError; DataError if there is nothing to read, or a worker died.
    """
    loaded = as_recipe(recipe, overrides)
    sources = loaded.data
    folder = Path(out) if out is not None else Path("runs") / f"{loaded.name}-check"
    if fix is not None:
        check_target(Path(fix), loaded.name, sources)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        ledger = Ledger(Path(temporary) / "ledger.sqlite", names_of(sources), files_of(sources))
        try:
            rows = fill(ledger, loaded, workers)
            compare(ledger)
            summary = summary_of(ledger, loaded.name, rows)
            write_report(ledger, summary, folder / "check.json")
            findings_page(ledger, summary, folder / "check.html", loaded.media)
            fixed = None
            if fix is not None:
                fixed = write_fixed(ledger, loaded, Path(fix), copy_media, rewriting(recipe, overrides))
        finally:
            ledger.close()
    return CheckResult(summary, folder / "check.json", folder / "check.html", fixed)


def fill(ledger: Ledger, recipe: Recipe, workers: int | None) -> int:
    """Examine every row and add it to the ledger. Returns the number of rows."""
    from rich.console import Console

    count = 0
    rows = _numbered_rows(ledger, recipe)
    first = list(islice(rows, FEW_ROWS))
    rows = chain(first, rows)
    if workers is None:
        workers = cores() if len(first) == FEW_ROWS else 0
    console = Console(stderr=True, highlight=False)
    with console.status("rows: 0") as status:
        for examined in in_processes(recipe, rows, workers) if workers else _in_this_process(recipe, rows):
            ledger.add(examined)
            count += len(examined)
            status.update(f"rows: {count:,}")
    usable = {source for (source,) in ledger.query("select distinct source from rows")}
    ledger.add_findings(
        Finding("no_rows", f"{source.path}: no usable row", None, number)
        for number, source in enumerate(recipe.data)
        if number not in usable
    )
    return count


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _numbered_rows(ledger: Ledger, recipe: Recipe) -> Iterator[NumberedRow]:
    count, splits = 0, held_out(recipe)
    for number, source in enumerate(recipe.data):

        def report(line: int, text: str, raw: str, source: int = number) -> None:
            ledger.add_findings([Finding("unreadable", text, None, source, line)])

        for place, row in enumerate(lenient_rows(source, report, recipe.media.max_bytes)):
            yield count, number, row, splits.get((number, place), source.split)
            count += 1


def _in_this_process(recipe: Recipe, rows: Iterator[NumberedRow]) -> Iterator[list[Examined]]:
    reader = Reader(recipe)
    while chunk := list(islice(rows, CHUNK)):
        yield [reader.examine(*row) for row in chunk]


def in_processes(recipe: Recipe, rows: Iterator[NumberedRow], workers: int) -> Iterator[list[Examined]]:
    """Chunks of rows, in their order, examined by `workers` processes; only a few are in memory at any time. Raises
    DataError if a process dies, of a decoder that crashes or for lack of memory.
    """
    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # A server that has imported torch once: its children share that memory, and begin at once.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["finetune.model.build", "finetune.commands._reader"])
    waiting: deque[tuple[NumberedRow, Future[list[Examined]]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(recipe,)) as pool:
        try:
            while True:
                while len(waiting) < CHUNKS_AHEAD * workers and (chunk := list(islice(rows, CHUNK))):
                    waiting.append((chunk[0], pool.submit(_examine, chunk)))
                if not waiting:
                    return
                (_, _, row, _), future = waiting[0]
                yield future.result()
                waiting.popleft()
        except BrokenProcessPool:
            raise DataError(
                f"{row.where}: a worker died at this row or one of the next {CHUNKS_AHEAD * workers * CHUNK}: out "
                f"of memory, or a file that crashes its decoder; {option('--workers 0', 'workers=0')} goes row by row"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_reader: Reader | None = None  # of a worker process
_failure: FinetuneError = FinetuneError("the worker has not begun")


def _begin(recipe: Recipe) -> None:
    global _reader, _failure
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)
    try:
        _reader = Reader(recipe)
    except FinetuneError as error:  # raised here, it would only leave a broken pool
        _failure = error


def _examine(chunk: list[NumberedRow]) -> list[Examined]:
    if _reader is None:
        raise _failure
    return [_reader.examine(*row) for row in chunk]


def files_of(sources: Sequence[Source]) -> dict[int, list[str]]:
    """{source: names of its rows}, where each is a file that can be read."""
    files: dict[int, list[str]] = {}
    for number, source in enumerate(sources):
        with suppress(DataError):
            files[number] = file_names(source)
    return files


def names_of(sources: Sequence[Source]) -> list[str]:
    """The name of each source's file in the report, with its folder if several files have that name."""
    files = Counter(path.name for path in {source.path for source in sources})
    paths = [source.path for source in sources]
    return [f"{path.parent.name}/{path.name}" if files[path.name] > 1 else path.name for path in paths]


def summary_of(ledger: Ledger, name: str, rows: int) -> Summary:
    counts = ledger.counts()
    splits: dict[str, SplitCounts] = {
        split: {"rows": count, "tokens": tokens, "longest": longest}
        for split, count, tokens, longest in ledger.query(
            "select split, count(*), sum(tokens), max(tokens) from rows group by split order by split"
        )
    }
    media = dict(ledger.query("select kind, count(distinct digest) from uses group by kind order by kind"))
    return {
        "name": name,
        "rows": rows,
        "errors": sum(count for code, count in counts.items() if code in ERRORS),
        "warnings": sum(count for code, count in counts.items() if code not in ERRORS),
        "splits": splits,
        "different_media": media,
        "near": {"bits_of_128": NEAR_BITS, "levels_of_255": NEAR_LEVELS},
        "findings": {code: counts[code] for code in CODES if code in counts},
        "examples": {code: _example(ledger, code) for code in CODES if code in counts},
    }


def _example(ledger: Ledger, code: str) -> str:
    finding = next(ledger.findings(code, 1))
    where = ledger.where(finding.source, finding.number)
    return finding.text if finding.text.startswith(where) else f"{where}: {finding.text}"


def write_report(ledger: Ledger, summary: Summary, path: Path) -> None:
    """check.json: the summary, and every finding as {"code", "severity", "file", "line", "text", "media"}."""
    with replacing(path) as file:
        file.write(json.dumps(summary, indent=2, ensure_ascii=False).removesuffix("\n}") + ',\n  "list": [')
        separator = "\n"
        for finding in ledger.findings():
            entry = {
                "code": finding.code,
                "severity": CODES[finding.code][0],
                "file": ledger.names[finding.source],
                "line": finding.number or None,
                "text": finding.text,
                "media": [path for path in (finding.path, finding.other) if path],
            }
            file.write(f"{separator}    {json.dumps(entry, ensure_ascii=False)}")
            separator = ",\n"
        file.write("\n  ]\n}\n")


def write_fixed(
    ledger: Ledger, recipe: Recipe, folder: Path, copy_media: bool, recipe_text: Callable[[Recipe], str]
) -> Fixed:
    """Write the cleaned copy and its recipe, as `recipe_text` writes it."""
    with whole_folder(folder) as partial:
        sources, rows, quarantined, clean = clean_copy(ledger, recipe.data, partial, copy_media, recipe.media.max_bytes)
        write_text(partial / "recipe.yaml", recipe_text(recipe.model_copy(update={"data": sources})))
    return Fixed(folder / "recipe.yaml", rows, quarantined, clean)


def rewriting(recipe: RecipeLike, overrides: Sequence[str]) -> Callable[[Recipe], str]:
    """Writes a recipe that differs in paths and formats as its file, with only those changed. One with overrides, which
    may be anywhere, or made in Python is written anew, with all defaults.
    """
    if overrides or isinstance(recipe, Recipe):
        return dump_recipe
    path, text = str(recipe), read_text(Path(recipe))

    def write(recipe: Recipe) -> str:
        written = read_yaml(text, path).value
        changes = dict(_changed_paths(written, recipe.model_dump(mode="json"), ()))
        for number, source in enumerate(recipe.data):
            entry = written["data"][number]
            changes["data", number, "path"] = str(source.path)
            changes["data", number, "media_folder"] = str(source.media_folder)
            if source.format or "format" in entry:
                changes["data", number, "format"] = source.format.kind if source.format else None
        return rewritten(text, changes)

    return write


def _changed_paths(written: Any, resolved: Any, location: Location) -> Iterator[tuple[Location, str | None]]:
    """Paths that are absolute only since they were resolved."""
    if isinstance(written, dict) and isinstance(resolved, dict):
        for key in written.keys() & resolved.keys():
            yield from _changed_paths(written[key], resolved[key], (*location, key))
    elif isinstance(written, list) and isinstance(resolved, list):
        for number, (old, new) in enumerate(zip(written, resolved, strict=True)):
            yield from _changed_paths(old, new, (*location, number))
    elif isinstance(written, str) and isinstance(resolved, str) and written != resolved and os.path.isabs(resolved):
        yield location, resolved
