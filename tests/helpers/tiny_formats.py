"""A small folder of each format: written by other libraries than those that read it, or by hand."""

import csv
import io
import json
import tarfile
import wave
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import openpyxl
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from tiny import tiny_picture


def picture(colour: tuple[int, int, int] = (200, 20, 20)) -> bytes:
    buffer = io.BytesIO()
    tiny_picture(colour).save(buffer, "PNG")
    return buffer.getvalue()


def sound() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(3200))
    return buffer.getvalue()


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def table(folder: Path) -> Path:
    put(folder / "a.png", picture())
    path = folder / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label"], ["a.png", "red"], ["a.png", "rot, 红"]])
    return path


def sheet(folder: Path) -> Path:
    put(folder / "a.png", picture())
    book = openpyxl.Workbook()
    for row in (["image", "label", "price"], ["a.png", "red", 3], ["a.png", "红", 2.5]):
        book.active.append(row)
    book.save(folder / "rows.xlsx")
    return folder / "rows.xlsx"


def folders(folder: Path) -> Path:
    for name in ("dogs/b.png", "cats/1.png", "cats/2.PNG"):
        put(folder / "pets" / name, picture())
    put(folder / "pets" / "cats" / ".DS_Store", b"x")
    return folder / "pets"


def messages(folder: Path) -> Path:
    put(folder / "a.png", picture())
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    return put(folder / "chat.jsonl", {"messages": [*turns("user", content, "red")]})


def turns(role: str, content: Any, answer: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}, {"role": "assistant", "content": answer}]


def llava(folder: Path) -> Path:
    put(folder / "a.png", picture())
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    return put(folder / "llava.json", [{"id": "1", "image": "a.png", "conversations": said}])


def sharegpt(folder: Path) -> Path:
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    return put(folder / "gpt.json", [{"conversations": said, "system": "Be brief."}])


def coco(folder: Path) -> Path:
    put(folder / "1.png", picture())
    notes = [{"id": number, "image_id": 7, "caption": text} for number, text in enumerate(("A cat.", "One cat."))]
    return put(folder / "captions.json", {"images": [{"id": 7, "file_name": "1.png"}], "annotations": notes})


def saved(folder: Path) -> Path:
    features = Features({"image": Image(), "label": ClassLabel(names=["red", "blue"]), "text": Value("string")})
    rows = {"image": [{"bytes": picture(), "path": None}] * 2, "label": [1, 0], "text": ["x", "y"]}
    DatasetDict({"train": Dataset.from_dict(rows, features)}).save_to_disk(folder / "saved")
    return folder / "saved"


def parquet(folder: Path) -> Path:
    features = Features({"image": Image(), "label": ClassLabel(names=["red", "blue"])})
    rows = {"image": [{"bytes": picture(), "path": None}] * 2, "label": [1, 0]}
    (folder / "data").mkdir(parents=True)
    Dataset.from_dict(rows, features).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


def tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def webdataset(folder: Path) -> Path:
    tar(folder / "shards" / "0.tar", {"0001.png": picture(), "0001.cls": b"3\n", "0001.txt": "红".encode()})
    tar(folder / "shards" / "1.tar", {"x/0002.wav": sound(), "x/0002.json": b'{"speaker": "ann"}'})
    return folder / "shards"


def common_voice(folder: Path) -> Path:
    put(folder / "clips" / "1.wav", sound())
    put(folder / "validated.tsv", 'client_id\tpath\tsentence\tage\nann\t1.wav\t"Well, he said.\ttwenties\n')
    return folder


def ljspeech(folder: Path) -> Path:
    put(folder / "wavs" / "LJ001.wav", sound())
    put(folder / "metadata.csv", 'LJ001|"Dr. No, 3|Doctor No, three\n')
    return folder


def kaldi(folder: Path) -> Path:
    put(folder / "a.wav", sound())
    for name, line in (("wav.scp", "u1 a.wav\n"), ("text", "u1 你好 world\n"), ("utt2spk", "u1 ann\n")):
        put(folder / name, line)
    return folder


# Of each format one or more.
EXAMPLES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "table": ("table", table),
    "sheet": ("table", sheet),
    "folders": ("folders", folders),
    "messages": ("messages", messages),
    "llava": ("llava", llava),
    "sharegpt": ("sharegpt", sharegpt),
    "coco": ("coco", coco),
    "saved": ("hub", saved),
    "parquet": ("hub", parquet),
    "webdataset": ("webdataset", webdataset),
    "common_voice": ("transcripts", common_voice),
    "ljspeech": ("transcripts", ljspeech),
    "kaldi": ("transcripts", kaldi),
}
