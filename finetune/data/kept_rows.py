"""The samples of a recipe's sources, kept between runs: read anew where a file of rows or media isn't what it was."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from time import time_ns
from typing import TypeAlias
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune.common.kept_tables import keep, opened
from finetune.common.user_cache import user_cache
from finetune.common.version import installed
from finetune.data.hold_out import SPLITS, connected, holds_out, splits_of
from finetune.data.media_index import SETTLED, Stamp, media_index
from finetune.data.sample_table import SCHEMA, SampleTable, newest, unchanged
from finetune.recipe.schema import RowFile, Source

# (the number in SPLITS of each sample's split, int8; how many rows each set has that stays together)
Split: TypeAlias = tuple[npt.NDArray[np.int8], list[int]]
LIBRARIES = ("pyarrow", "datasets", "openpyxl")  # that read rows


def sources_folder(sources: Sequence[Source], max_bytes: int) -> Path | None:
    """Where the samples of these sources are kept; None where nothing shows whether a source has changed."""
    content: list[object] = [code_hash("data"), installed(LIBRARIES), max_bytes]
    for source in sources:
        stamps = stamps_of(source.path)
        if stamps is None:
            return None
        read = source.model_dump(mode="json", include={*RowFile.model_fields, "task", "group"})
        content.append([read, holds_out(source), str(source.folder_of_media.resolve()), stamps])
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return user_cache("rows") / key[:32]


def kept_table(folder: Path | None) -> pa.Table | None:
    """The table of `folder`, if its media are what they were."""
    table = opened(folder) if folder else None
    return table if table is not None and unchanged(table) else None


def keep_table(folder: Path | None, sources: Sequence[Source], rows: Iterable[Mapping[str, object]]) -> pa.Table:
    """The rows as a table of `SCHEMA`, kept in `folder` unless a file was changed only just now, and may be again
    without another time.
    """
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)  # with what is kept beside the rows
    begun, before = time_ns(), [stamps_of(source.path) for source in sources]
    latest = max((modified for stamps in before for _, modified in stamps or ()), default=0)

    def finish(writing: Path) -> bool:
        table = opened(writing)
        media_index().write()
        after = [stamps_of(source.path) for source in sources]
        return table is not None and before == after and max(latest, newest(table)) < begun - SETTLED

    return keep(folder, SCHEMA, rows, finish)


def held_out(folder: Path | None, samples: SampleTable, sources: Sequence[Source], seed: int) -> Split:
    """Which rows are held out, by seed and content; kept beside the table in `folder`."""
    file = folder / _split_file(sources, seed) if folder and folder.is_dir() else None
    if file is not None:
        with suppress(OSError, ValueError, KeyError, BadZipFile), np.load(file) as arrays:
            return arrays["split"], arrays["together"].tolist()
    split = _assigned(samples, sources, seed)
    if file is not None:
        with suppress(OSError), tempfile.NamedTemporaryFile(dir=folder, delete=False) as writing:
            np.savez(writing, split=split[0], together=np.array(split[1], np.int64))
            os.replace(writing.name, file)
    return split


def _assigned(samples: SampleTable, sources: Sequence[Source], seed: int) -> Split:
    own = np.array([SPLITS.index(source.split) for source in sources], np.int8)
    if not any(map(holds_out, sources)):
        return own[samples.sources], []
    keys: list[list[str]] = samples.column("stays").to_pylist()
    split = splits_of(keys, samples.sources.tolist(), sources, seed)
    numbers = np.fromiter(map(SPLITS.index, split), np.int8, len(split))
    return numbers, [len(rows) for rows in connected([row for row in keys if row])]


def _split_file(sources: Sequence[Source], seed: int) -> str:
    shares = [(source.split, source.hold_out, source.hold_out_validation) for source in sources]
    return f"split-{hashlib.sha256(json.dumps([seed, shares]).encode()).hexdigest()[:16]}.npz"


def stamps_of(path: Path) -> list[tuple[str, int]] | None:
    """What changes when the file does, or any file of the folder: (hash of names, sizes and inodes, time of the latest
    change in nanoseconds since 1970); None for what isn't on this machine, or has links to folders in it.
    """
    try:
        if not path.is_dir():
            stamp = Stamp.of(path)
            return [(f"{stamp.size} {stamp.inode}", stamp.modified)]
        digest, latest = hashlib.sha256(), 0
        for folder, folders, files in os.walk(path):
            folders.sort()
            if any(os.path.islink(os.path.join(folder, name)) for name in folders):
                return None
            for name in sorted(files):
                file = os.path.join(folder, name)
                stamp = Stamp.of(file)
                digest.update(f"{file!r} {tuple(stamp)}\n".encode())
                latest = max(latest, stamp.modified)
        return [(digest.hexdigest(), latest)]
    except OSError:
        return None


@cache
def code_hash(*parts: str) -> str:
    """SHA-256 of this package's own code in some of its folders or files: rows are made anew by another version."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for part in parts:
        path = root / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()
