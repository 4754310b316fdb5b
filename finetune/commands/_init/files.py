"""The files of rows below a path: their formats, splits and encodings, and where their media are."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

from finetune.common.errors import DataError, RecipeError, given, option
from finetune.data.check.lenient import DELIMITERS
from finetune.data.formats import _media
from finetune.data.formats.table import Options
from finetune.data.new_files import TRIED, best_folder, files_in, table_format
from finetune.data.read import formats_of, other_spreadsheet
from finetune.recipe.parts import FormatPart
from finetune.recipe.schema import RowFile

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SHOWN = 6  # names in an error
LOOKED_FOR = (
    "a table (.csv, .tsv, .xlsx) or JSON (.jsonl, .json); a folder for each label with its media in it; recordings "
    "with their transcripts (Common Voice, LJSpeech, Kaldi, or 1.wav beside 1.txt); .tar files (WebDataset); .parquet "
    "or .arrow files; or folders or files called train, validation and test of these"
)


@dataclass(frozen=True)
class Found:
    """A file or folder of rows. `reading`: what its format's options say, '' where it has none."""

    path: Path
    split: str
    format: FormatPart
    reading: str = ""

    def as_row_file(self) -> RowFile:
        return RowFile(path=self.path.absolute(), format=self.format)


def find(path: Path, encoding: str | None) -> tuple[Found, ...]:
    """What there is to train on, training rows first. `encoding`: of CSV and TSV files, None: it is detected. Raises
    DataError, with what was looked for, if there is none; RecipeError for an encoding that can't be taken.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; name the file or folder of your rows")
    if formats_of(path):
        return (_found(path, "train", encoding),)
    if not path.is_dir():
        cure = other_spreadsheet(path)
        raise DataError(f"{path}: no format recognises it{f'; {cure}' if cure else f'. Looked for: {LOOKED_FOR}'}")
    inside = [file for file in sorted(path.iterdir()) if not _media.is_hidden(file.name) and formats_of(file)]
    by_split = {SPLITS[file.stem.lower()]: file for file in inside if file.stem.lower() in SPLITS}
    if "train" in by_split:
        splits = [split for split in ("train", "validation", "test") if split in by_split]
        return tuple(_found(by_split[split], split, encoding) for split in splits)
    files = [file for file in inside if file.is_file()] or inside
    if len(files) == 1:
        return (_found(files[0], "train", encoding),)
    if files:
        names = ", ".join(file.name for file in files[:SHOWN])
        raise DataError(
            f"{path}: {len(files)} files or folders of rows ({names}); name one of them, or call them train, "
            "validation and test"
        )
    raise DataError(f"{path}: no rows in it. Looked for: {LOOKED_FOR}. In it are: {_contents(path)}{_advice(path)}")


def _found(path: Path, split: str, encoding: str | None) -> Found:
    """With the options that reading the file needs: its encoding, its delimiter, suffixes to ignore."""
    formats = formats_of(path)
    if len(formats) > 1:
        raise DataError(f"{path}: could be {' or '.join(formats)}; name a file or folder in it")
    kind = formats[0]
    if kind == "table" and path.suffix.lower() in DELIMITERS:
        part = table_format(path, Options(), encoding)
        options = part.options.model_dump(exclude_unset=True)
        return Found(path, split, part, ", ".join(f"{name} {value!r}" for name, value in options.items()))
    if encoding:
        raise RecipeError(f"{given('encoding', encoding)}: {path} is no CSV or TSV file; leave it out")
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


def media_beside(path: Path) -> str:
    """How many media are beside a file of rows and in the folders there, '' where there are none."""
    beside = islice((file for place in ("*", "*/*") for file in path.parent.glob(place)), 10_000)
    kinds = Counter(kind for file in beside if (kind := _media.kind_of(file.name)))
    return " and ".join(f"{count:,} files of {kind}" for kind, count in kinds.items()) if path.is_file() else ""


def _advice(path: Path) -> str:
    if cure := next(filter(None, map(other_spreadsheet, path.iterdir())), ""):
        return f"; of the spreadsheet: {cure}"
    if any(_media.kind_of(file.name) for file in path.iterdir()):
        return (
            ". What the media show isn't written anywhere: put them into a folder for each label, or write a table "
            "with a column of their names and a column of answers"
        )
    return ""


@dataclass(frozen=True)
class MediaPlace:
    """`folder`: that media are relative to, None for the default. `outside`: whether some aren't below it. `missing`:
    columns of which no file is there.
    """

    folder: Path | None
    outside: bool
    missing: tuple[str, ...] = ()


def media_place(found: Found, names: Mapping[str, Sequence[str]], folder: Path | None) -> MediaPlace:
    """Where the media are that each column names. `folder`: the only place to look at, None: the rows' folder, those in
    it, and the one above. Raises DataError where no file can be found.
    """
    local = {column: [name for name in values if "://" not in name][:TRIED] for column, values in names.items()}
    local = {column: values for column, values in local.items() if values}
    if not local:
        return MediaPlace(folder, False)
    default = found.as_row_file().folder_of_media
    best = folder or best_folder(default, [name for values in local.values() for name in values])
    missing = tuple(column for column, values in local.items() if not files_in(best, values))
    if len(missing) == len(local):
        example = next(iter(local.values()))[0]
        places = str(folder) if folder else f"{default}, in a folder there, or in {default.parent}"
        cure = f"put them there, or name their folder with {option('--media-folder', 'media_folder=')}"
        turned = [example.replace("\\", "/")]
        if turned != [example] and files_in(folder or best_folder(default, turned), turned):
            cure = "write / between folders, in place of \\"
        raise DataError(f"{found.path}: names media such as {example!r}, which isn't in {places}; {cure}")
    root = best.resolve()
    outside = any(not (best / n).resolve().is_relative_to(root) for c in local if c not in missing for n in local[c])
    return MediaPlace(None if best == default else best, outside, missing)


def hosts_of(names: Iterable[str]) -> list[str]:
    """Hosts that media are downloaded from, where they are addresses."""
    return sorted({host for name in names if "://" in name and (host := urlsplit(name).hostname)})
