"""Hostile pictures, recordings and videos at every door: each is refused soon and in little memory, by a message that
names it, and the next row or request works. Among good rows, `data check --fix` leaves out exactly these; training and
evaluation stop with a message.
"""

import base64
import csv
import http.client
import json
import time
from pathlib import Path
from typing import Any

import hostile_files
import psutil
import pytest
from cli import cli
from hostile_files import GOOD, peak
from real_server import CHAT, server
from tiny import part, tiny_dataset, tiny_encoder, tiny_recipe
from tiny_encoders import tiny_audio_folder, tiny_encoder_of, tiny_video_folder
from tiny_merged import tiny_merged, wide_llm

from finetune.commands import predict
from finetune.common.errors import DataError
from finetune.model.assistant import Assistant
from finetune.model.load import load

pytestmark = [pytest.mark.slow, pytest.mark.full]
SECONDS = 2.0  # of CPU, a file
MEBIBYTES = 500
KINDS = tuple(GOOD)
LENGTH = 2_000  # characters of a message
EMBEDDED = "messages[0].content[0]"


class Door:
    """Measures what each file costs that goes through it."""

    def __init__(self, process: psutil.Process | None = None) -> None:
        self.process = process or psutil.Process()
        self.peak, self.slowest = self.held(), 0.0

    def held(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def used(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def __enter__(self) -> None:
        self.begin = self.used()

    def __exit__(self, *_: object) -> None:
        self.slowest = max(self.slowest, self.used() - self.begin)

    def check(self) -> str:
        grown = self.held() - self.peak
        assert self.slowest < SECONDS and grown < MEBIBYTES
        return f"at most {self.slowest:.1f} CPU s each, {grown:.0f} MiB"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A merged model that sees, hears and watches."""
    encoders = {
        "image": tiny_encoder(),
        "audio": tiny_encoder_of("wav2vec2"),
        "video": tiny_encoder_of("siglip_frames"),
    }
    projectors = {kind: part("projectors", "mlp") for kind in KINDS}
    llm = wide_llm(max_position_embeddings=8192)
    return tiny_merged(tmp_path_factory.mktemp("model") / "merged", encoders, projectors, llm=llm)


@pytest.fixture(scope="module")
def assistant(folder) -> Assistant:
    return load(folder)


@pytest.fixture(scope="module", params=KINDS)
def files(request, tmp_path_factory) -> tuple[str, Path, list[str]]:
    """(kind, folder of its hostile files and a good one, names of the hostile ones)."""
    place = tmp_path_factory.mktemp(request.param)
    return request.param, place, hostile_files.write(request.param, place)


def test_python(assistant, files, tried):
    kind, place, names = files
    good: Any = {kind: place / "good.txt"}
    answer = assistant.answer("What is this?", **good, max_new_tokens=2)
    door = Door()
    for name in names:
        with door, pytest.raises(DataError) as caught:
            assistant.answer("What is this?", **{kind: place / name}, max_new_tokens=2)
        message = str(caught.value)
        assert name in message and len(message) < LENGTH and " object at 0x" not in message, message
    assert assistant.answer("What is this?", **good, max_new_tokens=2) == answer
    tried(f"{len(names)} hostile {kind} files through `load(...).answer`", f"all refused, {door.check()}")


def test_chat(assistant, folder, files, tried, monkeypatch):
    monkeypatch.setattr("finetune.commands.chat.load", lambda folder: assistant)
    kind, place, names = files

    def ask(name: str) -> Any:
        return cli("chat", folder, "What is this?", f"--{kind}", place / name)

    assert ask("good.txt").returncode == 0
    door = Door()
    for name in names:
        with door:
            result = ask(name)
        assert result.returncode == 2 and not result.stdout, (name, result)
        message = result.stderr.replace("\n", "")
        assert name in message and "Traceback" not in message and len(message) < LENGTH, (name, result.stderr)
    assert ask("good.txt").returncode == 0
    tried(f"{len(names)} hostile {kind} files through `chat`", f"all refused, {door.check()}")


def test_predict(assistant, folder, files, tried, monkeypatch, tmp_path):
    monkeypatch.setattr(predict, "_loaded", lambda run: assistant)
    kind, place, names = files
    with (place / "rows.jsonl").open("w") as file:
        for name in names:
            file.writelines(json.dumps({kind: one}) + "\n" for one in (name, "good.txt"))
    out = tmp_path / "answers.jsonl"
    door = Door()
    before = door.used()
    result = cli("predict", folder, place / "rows.jsonl", "--out", out, "--prompt", "What is this?")
    assert "Traceback" not in result.stderr, result.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row[kind] for row in rows] == [one for name in names for one in (name, "good.txt")]
    for bad, good in zip(rows[::2], rows[1::2], strict=True):
        assert bad["error"] and not bad["answer"] and len(bad["error"]) < LENGTH, bad
        assert not good["error"] and good["answer"] == rows[1]["answer"], good
    door.slowest = (door.used() - before) / len(names)  # the mean
    tried(f"{len(names)} hostile {kind} files through `predict`", f"each an error of its row, {door.check()}")


def content_of(kind: str, content: bytes, form: str) -> dict[str, Any]:
    encoded = base64.b64encode(content).decode()
    if form == "input_audio":
        return {"type": form, form: {"data": encoded, "format": "wav"}}
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{kind}/x;base64,{encoded}"}}


@pytest.mark.parametrize("form", ["url", "input_audio"])
def test_serve(assistant, files, form, tried, tmp_path):
    kind, place, names = files
    if form == "input_audio" and kind != "audio":
        return  # a form of recordings alone
    readable = [name for name in names if (place / name).is_file()]  # nothing else has bytes to send

    def ask(port: int, name: str) -> tuple[int, dict[str, Any]]:
        parts = [content_of(kind, (place / name).read_bytes(), form), {"type": "text", "text": "What is this?"}]
        messages = [{"role": "user", "content": parts}]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", CHAT, json.dumps({"model": "tiny", "messages": messages, "max_tokens": 2}))
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    with server(assistant, log=tmp_path / "log") as running:
        assert ask(running.port, "good.txt")[0] == 200
        door = Door(psutil.Process(running.process.pid))
        for name in readable:
            with door:
                status, body = ask(running.port, name)
            message = body["error"]["message"]
            assert status == 400 and EMBEDDED in message and len(message) < LENGTH, (name, status, body)
            assert str(tmp_path) not in message and "/tmp/" not in message
        assert ask(running.port, "good.txt")[0] == 200
        outcome = door.check()
    written = (tmp_path / "log").read_text()  # pydicom logs the errors that it raises
    assert "ERROR:uvicorn" not in written and "ERROR:finetune" not in written
    tried(f"{len(readable)} hostile {kind} files through the server as {form}", f"all refused with 400, {outcome}")


def project(kind: str, folder: Path) -> tuple[Path, list[list[str]]]:
    """A recipe that trains on media of this kind, and its rows."""
    if kind == "image":
        recipe = tiny_recipe(folder)
    else:
        encoder = (tiny_audio_folder if kind == "audio" else tiny_video_folder)(
            folder / kind, "wav2vec2" if kind == "audio" else "siglip_frames"
        )
        recipe = tiny_recipe(
            folder,
            model__encoders={kind: {"kind": "wave" if kind == "audio" else "video", "name": str(encoder)}},
            model__projectors={kind: {"kind": "mlp"}},
            train__tokens_per_batch=2048,
        )
    tiny_dataset(folder / "data")
    table = folder / "data" / "train.csv"
    for other, name in enumerate(("train.csv", "test.csv")):
        with (folder / "data" / name).open(newline="") as file:
            header, *rows = csv.reader(file)
        if kind != "image":
            for number, row in enumerate(rows):
                row[0] = f"{name}-{number}.bin"
                (folder / "data" / row[0]).write_bytes(GOOD[kind]() + bytes(100 * other + number))  # each another file
            write(folder / "data" / name, [kind, *header[1:]], rows)
    with table.open(newline="") as file:
        _, *rows = csv.reader(file)
    return recipe, rows


def write(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_hostile_media_are_left_out_and_no_others(tmp_path, kind, tried):
    recipe, good = project(kind, tmp_path)
    folder = tmp_path / "data" / "hostile"
    folder.mkdir()
    names = hostile_files.write(kind, folder)
    between = [[f"hostile/{name}", "red"] for name in names]
    table = tmp_path / "data" / "train.csv"
    write(table, [kind, "label"], [*good[:5], *between, *good[5:]])
    begin, memory = time.process_time(), peak()
    checked = cli("data", "check", recipe, "--workers", 0, "--out", "check", "--fix", "clean", cwd=tmp_path)
    assert time.process_time() - begin < SECONDS * len(names) and peak() - memory < MEBIBYTES
    assert checked.returncode == 0 and "Traceback" not in checked.stderr, checked.stderr
    quarantine = (tmp_path / "clean" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["columns"][kind] for line in quarantine] == [row[0] for row in between]
    with next((tmp_path / "clean").glob("rows-0.csv")).open(newline="") as file:
        kept = [row["label"] for row in csv.DictReader(file)]
    assert kept == [row[1] for row in good]

    refused = cli("train", recipe, "--run", "run", cwd=tmp_path)
    assert refused.returncode == 2 and "train.csv:" in refused.stderr and "Traceback" not in refused.stderr
    assert len(refused.stderr) < 20_000
    trained = cli("train", tmp_path / "clean" / "recipe.yaml", "--run", "run", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    there = [row for row in between if (tmp_path / "data" / row[0]).is_file()]
    for rows in (between, there):  # the paths of the first tell already that they can't be read
        write(tmp_path / "data" / "new.csv", [kind, "label"], [*good[:2], *rows, *good[2:4]])
        begin, memory = time.process_time(), peak()
        evaluated = cli("evaluate", "run", "--data", tmp_path / "data" / "new.csv", cwd=tmp_path)
        assert time.process_time() - begin < SECONDS * len(names) and peak() - memory < MEBIBYTES
        assert evaluated.returncode == 2 and "new.csv:" in evaluated.stderr and "Traceback" not in evaluated.stderr
        assert len(evaluated.stderr) < 20_000
    write(tmp_path / "data" / "new.csv", [kind, "label"], good[:4])
    assert cli("evaluate", "run", "--data", tmp_path / "data" / "new.csv", cwd=tmp_path).returncode == 0
    tried(
        f"{len(names)} hostile {kind} files among {len(good)} good rows",
        "each named, exactly these left out by --fix; train and evaluate stop with one message",
    )
