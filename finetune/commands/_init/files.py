"""The files of rows below a path: their formats, splits and encodings, and where their media are."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

from finetune.common.errors import DataError
from finetune.common.registry import load_part, part_names
from finetune.data.check.lenient import encoding_of
from finetune.data.formats import _media
from finetune.recipe.parts import FormatPart
from finetune.recipe.schema import RowFile

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
TRIED = 50  # media whose files are looked for
SHOWN = 6  # names in an error
LOOKED_FOR = (
    "a table (.csv, .tsv, .xlsx) or JSON (.jsonl, .json); a folder for each label with its media in it; recordings "
    "with their transcripts (Common Voice, LJSpeech, Kaldi); .tar files (WebDataset); .parquet or .arrow files; or "
    "folders or files called train, validation and test of these"
)


@dataclass(frozen=True)
class Found:
    """A file or folder of rows. `reason`: why its format has options, '' where it has none."""

    path: Path
    split: str
    format: FormatPart
    reason: str = ""

    def as_row_file(self) -> RowFile:
        return RowFile(path=self.path, format=self.format)


def find(path: Path) -> tuple[Found, ...]:
    """What there is to train on, training rows first. Raises DataError, with what was looked for, if there is nothing."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; name the file or folder of your rows")
    if _formats(path):
        return (_found(path, "train"),)
    if not path.is_dir():
        raise DataError(f"{path}: no format recognises it. Looked for: {LOOKED_FOR}")
    inside = [file for file in sorted(path.iterdir()) if not _media.is_hidden(file.name) and _formats(file)]
    by_split = {SPLITS[file.stem.lower()]: file for file in inside if file.stem.lower() in SPLITS}
    if "train" in by_split:
        return tuple(_found(by_split[split], split) for split in ("train", "validation", "test") if split in by_split)
    files = [file for file in inside if file.is_file()] or inside
    if len(files) == 1:
        return (_found(files[0], "train"),)
    if files:
        names = ", ".join(file.name for file in files[:SHOWN])
        raise DataError(
            f"{path}: {len(files)} files or folders of rows ({names}); name one of them, or call them train, "
            "validation and test"
        )
    raise DataError(f"{path}: no rows in it. Looked for: {LOOKED_FOR}. In it are: {_contents(path)}{_advice(path)}")


def _formats(path: Path) -> list[str]:
    kinds = part_names(FormatPart.folder)
    return [kind for kind in kinds if load_part(FormatPart.folder, kind).detects(path)]


def _found(path: Path, split: str) -> Found:
    """With the options that reading the file needs: its encoding, its delimiter, suffixes to ignore."""
    formats = _formats(path)
    if len(formats) > 1:
        raise DataError(f"{path}: could be {' or '.join(formats)}; name a file or folder in it")
    kind, suffix = formats[0], path.suffix.lower()
    if kind == "table" and suffix in (".csv", ".tsv"):
        encoding = encoding_of(path)
        options = {} if encoding in ("utf-8-sig", "utf-16") else {"encoding": encoding}
        with path.open(encoding=encoding, errors="replace", newline="") as file:
            header = file.readline()
        if suffix == ".csv" and ";" in header and "," not in header:
            options["delimiter"] = ";"
        return Found(path, split, FormatPart.of(kind, **options), " and ".join(options))
    if kind == "folders" and (ignore := _other_suffixes(path)):
        return Found(path, split, FormatPart.of(kind, ignore=ignore), f"{', '.join(ignore)} files are left out")
    return Found(path, split, FormatPart.of(kind))


def _other_suffixes(path: Path) -> tuple[str, ...]:
    """Suffixes of files that aren't media, in a folder of labels."""
    files = [file for folder in (path, *path.iterdir()) if folder.is_dir() for file in folder.iterdir()]
    others = {f.suffix.lower() for f in files if f.is_file() and not _media.kind_of(f.name)}
    return tuple(sorted(others - {"", *(Path(f.name).suffix for f in files if _media.is_hidden(f.name))}))


def _contents(path: Path) -> str:
    suffixes = Counter(file.suffix.lower() or "without suffix" for file in islice(path.rglob("*"), 10_000))
    counts = [f"{count:,} {suffix}" for suffix, count in suffixes.most_common(SHOWN)]
    return ", ".join(counts) or "no files"


def _advice(path: Path) -> str:
    if any(_media.kind_of(file.name) for file in path.iterdir()):
        return (
            ". What the media show isn't written anywhere: put them into a folder for each label, or write a table "
            "with a column of their names and a column of answers"
        )
    return ""


def media_folder(found: Found, names: Iterable[str]) -> tuple[Path | None, bool]:
    """(folder that media are relative to, None for the default; whether they are outside it). Raises DataError where no
    file can be found.
    """
    local = [name for name in islice(names, TRIED) if "://" not in name and not name.startswith("data:")]
    if not local:
        return None, False
    default = found.as_row_file().folder_of_media
    below = [folder for folder in sorted(default.iterdir()) if folder.is_dir()]
    candidates = [default, *below, default.parent]
    counts = [sum((folder / name).is_file() for name in local) for folder in candidates]
    best = counts.index(max(counts))
    if not counts[best]:
        raise DataError(
            f"{found.path}: names media such as {local[0]!r}, which isn't in {default}, in a folder there, or in "
            f"{default.parent}; put them there, or name their folder with --media-folder"
        )
    folder = candidates[best]
    outside = any(not (folder / name).resolve().is_relative_to(folder.resolve()) for name in local)
    return (None if folder == default else folder), outside


def hosts_of(names: Iterable[str]) -> list[str]:
    """Hosts that media are downloaded from, where they are addresses."""
    return sorted({host for name in names if "://" in name and (host := urlsplit(name).hostname)})
