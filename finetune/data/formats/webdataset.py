"""WebDataset: tar files, one or a folder of them, whose neighbouring files with the same name up to its first dot are
a row: `0001.jpg`, `0001.txt`.

Columns: image (jpg, png, webp, ...), audio (wav, flac, mp3, ogg, ...), video (mp4, webm, ...); text and caption, both
of txt; label, of cls; the keys of json, where no file has that name (messages and conversations among them); any other
file under its suffix, as bytes. Of `0001.left.jpg` the column is left.jpg. `__key__` is the common name.
"""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.data.formats import Columns, NumberedRows, _conversations, _media
from finetune.recipe.schema import Limits

MAX_BYTES = Limits().max_bytes  # of a file in an archive


Options = PartOptions


def detects(path: Path) -> bool:
    return path.suffix.lower() == ".tar" or (path.is_dir() and next(path.glob("*.tar"), None) is not None)


def rows(path: Path, options: Options) -> NumberedRows:
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not shards:
        raise DataError(f"{path}: no .tar in it")
    number = 0
    for shard in shards:
        for key, files in groupby(_files(shard), lambda file: file[0]):
            number += 1
            where = f"{shard.name}: {key}"
            yield number, _conversations.read_turns(where, _columns(where, files)) | {"__key__": key}


def _files(shard: Path) -> Iterator[tuple[str, str, bytes]]:
    """(name up to its first dot, what follows it, content) of each file. Nothing is unpacked to disk."""
    offset = 0
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
                offset = member.offset
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if member.isdir() or _media.is_hidden(name) or _media.is_hidden(folder.partition("/")[0]):
                    continue
                key, _, suffix = name.partition(".")
                if not member.isreg():
                    raise DataError(f"{shard}: {member.name!r} is a link or device, not a file; pack what it leads to")
                if member.size > MAX_BYTES:
                    raise DataError(f"{shard}: {member.name!r} has {member.size:,} bytes, over {MAX_BYTES:,}")
                content = tar.extractfile(member)
                yield f"{folder}/{key}".lstrip("/"), suffix.lower(), content.read() if content else b""
            _check_end(shard, file, tar.offset)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{shard}: damaged in the file at byte {offset} ({error}); pack it anew") from None


def _columns(where: str, files: Iterator[tuple[str, str, bytes]]) -> Columns:
    columns: Columns = {}
    keys: Columns = {}
    for _, suffix, content in files:
        try:
            if suffix == "json":
                keys = json.loads(content)
                new: Columns = {}
            elif suffix == "txt":
                new = dict.fromkeys(("text", "caption"), content.decode("utf-8-sig"))
            elif suffix == "cls":
                new = {"label": content.decode("utf-8-sig").strip()}
            else:
                new = {_media.KINDS.get(f".{suffix}") or suffix: content}
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}.{suffix}: can't be read as text ({error})") from None
        if not isinstance(keys, dict):
            raise DataError(f"{where}.json: a {type(keys).__name__}, not an object")
        if repeated := columns.keys() & new.keys():
            raise DataError(
                f"{where}: two files for the column {min(repeated)!r}; name one of them name.other.{suffix}"
            )
        columns |= new
    return keys | columns


def _check_end(shard: Path, file: Any, offset: int) -> None:
    """Raises DataError if the end of the file isn't a block of zeros: tarfile takes a damaged header for the end."""
    file.seek(offset)
    if (block := file.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
        damage = "a damaged header" if block else "no end mark, so it is cut off"
        raise DataError(f"{shard}: damaged at byte {offset}: {damage}; pack it anew")
