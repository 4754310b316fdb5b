"""A folder of recordings with their transcripts, in the layout of a speech corpus. Columns: audio, text, and others
of the corpus.

- Common Voice: `validated.tsv` (or another `file`) with `path` and `sentence`, recordings in `clips/`. All its columns
  stay; `speaker` is its client_id.
- LJSpeech: `metadata.csv` of `id|text|normalized text` without a header, recordings in `wavs/`. Columns: id,
  normalized.
- Pairs: `1.wav` beside `1.txt`, which holds what is said in it, and no table. Column: id. `text` is empty where the
  file is missing.
- Kaldi: `wav.scp`, `text`, and perhaps `utt2spk`. Columns: id, speaker. No command is ever run for a recording.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from finetune.common.errors import DataError
from finetune.common.registry import PartOptions
from finetune.data.formats import NumberedRows, _media

TABLES = {".csv", ".tsv", ".xlsx", ".json", ".jsonl", ".parquet", ".scp"}
COMMON_VOICE, LJSPEECH, KALDI = "validated.tsv", "metadata.csv", "wav.scp"


class Options(PartOptions):
    file: str | None = Field(None, description="File of transcripts; null: validated.tsv, metadata.csv or wav.scp.")


def detects(path: Path) -> bool:
    return path.is_dir() and (_transcripts(path) is not None or _has_pairs(path))


def rows(path: Path, options: Options) -> NumberedRows:
    if not path.is_dir():
        raise DataError(f"{path}: not a folder, which the format `transcripts` reads")
    name = options.file or _transcripts(path)
    if name is None and _has_pairs(path):
        yield from _beside_texts(path)
        return
    if name is None:
        raise DataError(
            f"{path}: none of {COMMON_VOICE} with clips/, {LJSPEECH} with wavs/, {KALDI} with text, recordings with a "
            ".txt of their name in it"
        )
    if not (path / name).is_file():
        raise DataError(f"{path}: no file {name!r} in it; write another as `format: {{kind: transcripts, file: ...}}`")
    try:
        if name.endswith(".tsv"):
            yield from _common_voice(path / name)
        elif name.endswith(".scp"):
            yield from _kaldi(path, name)
        else:
            yield from _ljspeech(path / name)
    except UnicodeDecodeError as error:
        raise DataError(f"{path / name}: not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _transcripts(path: Path) -> str | None:
    beside = {COMMON_VOICE: "clips", LJSPEECH: "wavs", KALDI: "text"}
    return next((n for n, other in beside.items() if (path / n).is_file() and (path / other).exists()), None)


def _has_pairs(path: Path) -> bool:
    """Also no table, which may say more."""
    names = {file.name for file in path.iterdir()}
    if any(Path(name).suffix.lower() in TABLES for name in names):
        return False
    return any(_media.kind_of(name) == "audio" and f"{Path(name).stem}.txt" in names for name in names)


def _beside_texts(path: Path) -> NumberedRows:
    recordings = [file for file in sorted(path.iterdir()) if _media.kind_of(file.name) == "audio"]
    for number, file in enumerate((file for file in recordings if not _media.is_hidden(file.name)), 1):
        said = file.with_suffix(".txt")
        try:
            text = " ".join(said.read_text(encoding="utf-8-sig").split()) if said.is_file() else ""
        except UnicodeDecodeError as error:
            raise DataError(f"{said}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
        yield number, {"audio": file.name, "text": text, "id": file.stem}


def _common_voice(table: Path) -> NumberedRows:
    with table.open(encoding="utf-8-sig", newline="") as file:
        # Its sentences hold quotes that quote nothing.
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        missing = {"path", "sentence"} - set(reader.fieldnames or ())
        if missing:
            raise DataError(
                f"{table.name}:1: no column {min(missing)!r}; a table of Common Voice has path and sentence"
            )
        for columns in reader:
            if None in columns or not columns["path"]:
                raise DataError(f"{table.name}:{reader.line_num}: fields don't match the header's, or an empty path")
            columns |= {"audio": f"clips/{columns['path']}", "text": columns["sentence"]}
            speaker = {"speaker": columns["client_id"]} if columns.get("client_id") else {}
            yield reader.line_num, columns | speaker


def _ljspeech(table: Path) -> NumberedRows:
    with table.open(encoding="utf-8-sig", newline="") as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip("\r\n").split("|")
            if fields == [""]:
                continue
            if len(fields) not in (2, 3):
                raise DataError(f"{table.name}:{number}: {len(fields)} fields; a line is id|text or id|text|normalized")
            name = fields[0] if _media.kind_of(fields[0]) == "audio" else f"{fields[0]}.wav"
            yield (
                number,
                {"audio": f"wavs/{name}", "text": fields[1], "id": fields[0], "normalized": fields[-1]},
            )


def _kaldi(path: Path, name: str) -> NumberedRows:
    if (path / "segments").is_file():
        raise DataError(f"{path}: 'segments' isn't supported; cut the recordings into files and remove it")
    if not (path / "text").is_file():
        raise DataError(f"{path}: no file 'text' beside {name}")
    texts = dict(fields for _, fields in _pairs(path / "text"))
    speakers = dict(fields for _, fields in _pairs(path / "utt2spk")) if (path / "utt2spk").is_file() else {}
    for number, (utterance, place) in _pairs(path / name):
        if place.endswith("|") or place.startswith("|"):
            raise DataError(f"{name}:{number}: commands aren't run: {place[:80]!r}; write its output to a file")
        if place.rpartition(":")[2].isdigit():
            raise DataError(f"{name}:{number}: a place in an archive: {place[:80]!r}; write recordings as files")
        columns = {"audio": place, "id": utterance}
        if utterance in texts:
            columns["text"] = texts.pop(utterance)
        if utterance in speakers:
            columns["speaker"] = speakers[utterance]
        yield number, columns
    if texts:
        raise DataError(f"{path / 'text'}: {len(texts)} utterances aren't in {name}, the first: {next(iter(texts))!r}")


def _pairs(path: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """(line, (id, rest)) of a file of Kaldi's. Raises DataError for an id written twice."""
    ids: set[str] = set()
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            key, *rest = line.strip().split(maxsplit=1)
            if key in ids:
                raise DataError(f"{path.name}:{number}: {key!r} is written twice")
            ids.add(key)
            yield number, (key, rest[0] if rest else "")
