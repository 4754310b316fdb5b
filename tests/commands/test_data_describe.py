"""Descriptions of media by endpoints that work, that don't, and by models in this process; and their review."""

import io
import json
import re
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile
from cli import cli
from endpoint import answer, endpoint, media_in, text_in
from fake_engine import FakeEngine, served
from media_files import sine, sound, video
from test_data_label import Page
from tiny import COLOURS, part, tiny_picture, tiny_recipe
from tiny_serving import serving, tiny_assistant

import finetune
from finetune.commands import data_label
from finetune.commands.tables import print_descriptions
from finetune.common.errors import DataError, ModelError, RecipeError
from finetune.data.describe.assignment import Assignment
from finetune.data.describe.run import Descriptions
from finetune.data.sample import Medium, Message
from finetune.model import load as loading
from finetune.model.bindings import TaskBinding
from finetune.recipe.load import load_recipe

QUICK = {"retry-after-ms": "1"}


def options(**changes):
    return finetune.DescribeOptions(**({"retries": 2} | changes))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def colour_of(body: dict) -> str:
    """What a picture mostly is, as one sees that looks at it."""
    ((_, content),) = media_in(body)
    pixel = np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB"))[0, 0].astype(int)
    return min(COLOURS, key=lambda name: np.abs(pixel - COLOURS[name]).sum())


@pytest.fixture
def folder(tmp_path) -> Path:
    pictures = tmp_path / "pictures"
    (pictures / "more").mkdir(parents=True)
    for name, colour in COLOURS.items():
        tiny_picture(colour).save(pictures / ("more" if name == "blue" else ".") / f"{name}.png")
    (pictures / "notes.txt").write_text("no picture")
    (pictures / ".hidden.png").write_bytes(b"left behind")
    return pictures


def test_each_picture_gets_a_row_that_says_where_it_is_from(folder, monkeypatch):
    monkeypatch.setenv("FINETUNE_API_KEY", "secret")
    with endpoint(lambda body: answer(f" A {colour_of(body)} square.\n")) as (address, asked):
        result = finetune.data_describe(folder, address, options=options(language="German"))
    rows = {row["image"]: row for row in read(folder / "described.jsonl")}
    assert rows.keys() == {"red.png", "green.png", "more/blue.png", "yellow.png"}
    assert rows["more/blue.png"]["caption"] == "A blue square."
    source = rows["red.png"]["source"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", source.pop("date"))
    prompt = "Describe the picture.\nWrite in German."
    assert source == {"model": "seer-2", "revision": "fp_1", "address": f"{address}/v1", "prompt": prompt}
    assert (result.rows, result.files, result.before, result.errors) == (4, 4, 0, ())
    assert {text_in(body) for body in asked.bodies} == {prompt} and set(asked.keys) == {"Bearer secret"}
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in asked.bodies} == {("seer", 0, 512)}


def test_the_rows_train_as_they_are(folder, tmp_path):
    with endpoint(lambda body: answer(f"a {colour_of(body)} square")) as (address, _):
        result = finetune.data_describe(folder, address, tmp_path / "out" / "rows.jsonl", options=options())
    source = json.loads(json.dumps({"path": str(result.out), "media_folder": str(folder), "task": "caption"}))
    assert result.source == f"- {{path: {result.out}, media_folder: {folder}, task: caption, hold_out: 0.1}}"
    recipe = load_recipe(tiny_recipe(tmp_path / "project", data=[source | {"hold_out": 0.3}]))
    checked = finetune.check(recipe)
    assert checked.splits["train"].rows + checked.splits["test"].rows == 4
    (preview,) = finetune.data_preview(recipe, rows=1)
    assert any(piece.learned and "square" in piece.text for piece in preview.pieces)


def test_files_below_the_rows_are_named_from_there(folder, tmp_path):
    with endpoint(lambda body: answer("a square")) as (address, _):
        result = finetune.data_describe(folder, address, tmp_path / "rows.jsonl", options=options())
    assert {row["image"] for row in read(result.out)} >= {"pictures/red.png", "pictures/more/blue.png"}
    assert "media_folder" not in result.source


def test_questions_and_answers_are_taken_apart(folder):
    written = "**1. Q:** Which colour?\n**A:** Red\n\nQ2: How many\ncorners? \nA2: Four.\nQ: One more?\nA: No."
    with endpoint(lambda body: answer(written)) as (address, asked):
        result = finetune.data_describe(folder, address, task="vqa", questions=2, options=options(limit=1))
    assert [(row["question"], row["answers"]) for row in read(result.out)] == [
        ("Which colour?", ["Red"]),
        ("How many\ncorners?", ["Four."]),
    ]
    assert "Write 2 different questions about the picture" in text_in(asked.bodies[0]) and result.files == 1


def test_one_question_may_be_put_to_every_file(folder):
    with endpoint(lambda body: answer(colour_of(body))) as (address, _):
        result = finetune.data_describe(folder, address, task="answer", prompt="Which colour?", options=options())
    rows = {row["image"]: (row["question"], row["answer"]) for row in read(result.out)}
    assert rows["green.png"] == ("Which colour?", "green")


def test_a_call_that_was_stopped_goes_on(folder):
    out = folder / "described.jsonl"
    with endpoint(lambda body: answer("a square")) as (address, asked):
        finetune.data_describe(folder, address, options=options(limit=3))
        assert len(asked.bodies) == 3
        whole = out.read_text()
        out.write_text(whole + whole.splitlines()[0][:40])  # torn
        result = finetune.data_describe(folder, address, options=options())
        assert len(asked.bodies) == 4 and (result.files, result.before) == (4, 3)
        finetune.data_describe(folder, address, options=options())
        assert len(asked.bodies) == 4
        with pytest.raises(DataError, match=r"line 1 answers another prompt, 'Describe the picture\.'; name another"):
            finetune.data_describe(folder, address, prompt="What is it?", options=options())
        with pytest.raises(DataError, match="line 1 has no answer, question"):
            finetune.data_describe(folder, address, task="answer", prompt="Describe the picture.", options=options())
        finetune.data_describe(folder, address, prompt="What is it?", options=options(overwrite=True))
    assert {row["source"]["prompt"] for row in read(out)} == {"What is it?"}
    out.write_text('{"image": "red.png", "caption": "by hand"}\n')
    with pytest.raises(DataError, match="line 1 is none of its rows"):
        finetune.data_describe(folder, address, options=options(model_name="seer"))


def test_of_several_rows_of_a_file_none_is_lost_or_doubled(folder):
    with endpoint(lambda body: answer("Q: a?\nA: b\nQ: c?\nA: d")) as (address, asked):
        ask = {"task": "answer", "questions": 2, "options": options(limit=2, concurrency=1)}
        out = finetune.data_describe(folder, address, **ask).out
        out.write_text("".join(out.read_text().splitlines(keepends=True)[:3]))  # stopped between the rows of a file
        finetune.data_describe(folder, address, **ask)
        assert len(asked.bodies) == 3
    assert [row["image"] for row in read(out)] == ["green.png", "green.png", "more/blue.png", "more/blue.png"]


def test_an_endpoint_that_is_busy_or_broken_is_asked_again(folder):
    answers = iter([(429, QUICK, b"{}"), (500, QUICK, b"oops"), (503, QUICK, b"{}"), answer("a square")])
    with endpoint(lambda body: next(answers)) as (address, asked):
        result = finetune.data_describe(folder, address, options=options(limit=1, retries=3))
    assert result.rows == 1 and len(asked.bodies) == 4


def test_retry_after_is_heeded(folder):
    answers = iter([(429, {"Retry-After": "1"}, b"{}"), answer("a square")])
    begin = time.monotonic()
    with endpoint(lambda body: next(answers)) as (address, _):
        finetune.data_describe(folder, address, options=options(limit=1))
    assert time.monotonic() - begin >= 1


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ((500, QUICK, b'{"error": {"message": "no memory"}}'), r"answers 500 after 3 tries: .*no memory"),
        ((400, {}, b'{"error": {"message": "too long", "param": "messages"}}'), "answers 400: .*too long"),
        ((200, {}, b"not JSON"), "can't be read"),
        ((200, {"Content-Type": "text/html"}, b"<html>hello"), "can't be read: '<html>hello'"),
        ((200, {}, b"[]"), "can't be read"),
        ((200, {}, b'{"choices": []}'), "can't be read"),
        (answer("", message={"role": "assistant", "content": None}), "no text in"),
        (answer(" "), "an empty answer"),
        (answer("A red squ", finish_reason="length"), "cut off after 512 tokens; raise max_new_tokens="),
    ],
)
def test_an_answer_that_is_none_is_told_with_its_file(said, reason, folder):
    with endpoint(lambda body: said if colour_of(body) == "red" else answer("a square")) as (address, _):
        result = finetune.data_describe(folder, address, options=options())
    assert len(result.errors) == 1 and re.match(f"red.png: .*{reason}", result.errors[0]), result.errors
    assert {row["image"] for row in read(result.out)} == {"green.png", "more/blue.png", "yellow.png"}


def test_what_no_file_would_be_answered_by_ends_it_at_once(folder, tmp_path):
    denied = (401, {}, b'{"error": {"message": "wrong key"}}')
    with endpoint(lambda body: denied) as (address, asked):
        with pytest.raises(ModelError, match="answers 401: wrong key; its key is read from the variable FINETUNE_API"):
            finetune.data_describe(folder, address, options=options(concurrency=1))
        assert len(asked.bodies) <= 2
        asked.models += ["oracle"]
        with pytest.raises(RecipeError, match="serves seer, oracle: name one with model_name="):
            finetune.data_describe(folder, address, options=options())
    with pytest.raises(ModelError, match="nothing answers there"):
        finetune.data_describe(folder, address, options=options(retries=0))
    for number in range(12):
        tiny_picture().save(folder / f"{number}.png")
    with endpoint(lambda body: (500, QUICK, b"{}")) as (address, asked):
        with pytest.raises(DataError, match="10 files one after another without an answer"):
            finetune.data_describe(folder, address, options=options(retries=0, concurrency=1))
        assert len(asked.bodies) < 15


@pytest.mark.parametrize("concurrency", [1, 4])
def test_settings_that_a_model_refuses_are_left_out(folder, concurrency):
    def script(body):
        for name in ("temperature", "max_tokens"):
            if name in body:
                said = {"error": {"message": f"Unsupported: {name}", "param": name, "code": "unsupported_value"}}
                return 400, {}, json.dumps(said).encode()
        return answer("a square")

    with endpoint(script) as (address, asked):
        result = finetune.data_describe(folder, address, options=options(concurrency=concurrency))
    assert result.rows == 4 and asked.bodies[-1]["max_completion_tokens"] == 512
    assert len(asked.bodies) == 6 or concurrency > 1


def test_so_many_are_asked_at_once_as_are_wanted(folder):
    def script(body):
        time.sleep(0.1)
        return answer("a square")

    with endpoint(script) as (address, asked):
        finetune.data_describe(folder, address, options=options(concurrency=2))
    assert asked.most_at_once == 2


def test_media_are_bounded_and_media_that_can_not_be_read_are_told(folder):
    tiny_picture(size=(4000, 1000)).save(folder / "wide.png")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "elsewhere.png").symlink_to("/etc/hostname")
    with endpoint(lambda body: answer("a square")) as (address, asked):
        result = finetune.data_describe(folder, address, options=options(max_pixels=10_000))
    sizes = {PIL.Image.open(io.BytesIO(content)).size for body in asked.bodies for _, content in media_in(body)}
    assert sizes == {(200, 50), (40, 30)}
    reasons = dict(error.split(": ", 1) for error in result.errors)
    assert reasons.keys() == {"broken.png", "empty.png", "elsewhere.png"}
    assert "not a picture" in reasons["broken.png"] and "outside" in reasons["elsewhere.png"]


def test_recordings_and_videos(folder, tmp_path):
    (folder / "a.flac").write_bytes(sound(sine(44_100), 44_100, "FLAC"))
    (folder / "b.mp4").write_bytes(video())
    with endpoint(lambda body: answer("some words")) as (address, asked):
        with pytest.raises(RecipeError, match=r"1 audio files, 1 video files, 4 image files: .*media="):
            finetune.data_describe(folder, address, options=options())
        spoken = finetune.data_describe(folder, address, folder / "s.jsonl", task="transcribe", options=options())
        clip = finetune.data_describe(folder, address, folder / "v.jsonl", options=options(media="video"))
        finetune.data_describe(folder, address, folder / "f.jsonl", options=options(media="video", frames=3))
    assert read(spoken.out)[0].items() >= {"audio": "a.flac", "text": "some words"}.items()
    assert read(clip.out)[0].items() >= {"video": "b.mp4", "caption": "some words"}.items()
    ((kind, wave),), ((clip_kind, file),), frames = map(media_in, asked.bodies)
    samples, rate = soundfile.read(io.BytesIO(wave))
    assert (kind, rate, len(samples)) == ("input_audio", 16_000, 16_000)
    assert clip_kind == "video_url" and file == (folder / "b.mp4").read_bytes()
    assert [kind for kind, _ in frames] == ["image_url"] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "classify"}, "task=classify: one of caption, transcribe, answer, vqa"),
        ({"task": "answer"}, "set with questions= how many"),
        ({"questions": 2}, "the task caption has no questions"),
        ({"out": "rows.csv"}, r"write a file that ends in \.jsonl"),
        ({"options": options(media="text")}, "write image, audio or video"),
        ({"model": "http://user:pass@127.0.0.1/v1"}, "a key comes by a variable"),
    ],
)
def test_what_can_not_be_meant_is_refused(changes, message, folder):
    with pytest.raises(RecipeError, match=message):
        finetune.data_describe(**({"folder": folder, "model": "http://127.0.0.1:9"} | changes))


@pytest.mark.parametrize("rows", [0, 2])
def test_a_file_without_rows_is_not_offered_to_a_recipe(rows, tmp_path, capsys):
    errors = () if rows else ("a.png: no question and answer",)
    print_descriptions(Descriptions(tmp_path / "out.jsonl", tmp_path, "answer", rows, rows, 0, errors))
    assert ("data:" in capsys.readouterr().out) == bool(rows)


def test_our_own_server_describes(folder, tmp_path):
    (folder / "a.wav").write_bytes(sound(sine()))
    engine = FakeEngine()
    with served(engine, tmp_path / "media", api_key="secret") as (address, _), pytest.MonkeyPatch.context() as patch:
        (tmp_path / "media").mkdir(exist_ok=True)
        patch.setenv("OUR_KEY", "secret")
        arguments = ("--model", address, "--model-name", "shelf", "--key-variable", "OUR_KEY")
        done = cli("data", "describe", folder, *arguments, "--media", "image", "--prompt", "Say.")
        assert done.returncode == 0, done.stderr
        assert "4 rows about 4 files; 0 without an answer" in done.stdout and "task: caption" in done.stdout
        spoken = cli("data", "describe", folder, *arguments, "--task", "transcribe", "--out", tmp_path / "t.jsonl")
        assert spoken.returncode == 0, spoken.stderr
    assert {row["caption"] for row in read(folder / "described.jsonl")} == {"40x30 Say."}
    assert read(tmp_path / "t.jsonl")[0]["text"].startswith("1.0s Write down what is said")


def test_a_served_model_and_the_same_model_in_this_process_say_the_same(folder, tmp_path, monkeypatch):
    assistant = tiny_assistant()
    by_label = dict(assistant.model.bindings)
    task = TaskBinding(task=part("tasks", "caption", prompt="What is this?"), head=part("heads", "language"))
    monkeypatch.setattr(type(assistant.model), "bindings", {**by_label, "words": task})
    monkeypatch.setattr(loading, "load", lambda model: assistant)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    local = finetune.data_describe(
        folder, tmp_path / "model", tmp_path / "a.jsonl", options=options(max_new_tokens=40, concurrency=3)
    )
    by_file = {row["image"]: row for row in read(local.out)}
    assert {row["source"]["prompt"] for row in by_file.values()} == {"What is this?"}
    assert {row["source"]["model"] for row in by_file.values()} == {str(tmp_path / "model")}
    assert all(len(row["source"]["revision"]) == 64 for row in by_file.values())
    (tmp_path / "media").mkdir()
    with serving(assistant) as engine, served(engine, tmp_path / "media") as (address, _):
        remote = finetune.data_describe(
            folder, address, tmp_path / "b.jsonl", prompt="What is this?", options=options(max_new_tokens=40)
        )
    theirs = {row["image"]: row["caption"] for row in read(remote.out)}
    assert len(theirs) == 4 - len(remote.errors) > 0 and all("cut off" in error for error in remote.errors)
    for name, caption in theirs.items():  # as pictures are sent, with the losses of JPEG
        PIL.Image.open(tmp_path / name).convert("RGB").save(tmp_path / "sent.jpg", quality=90)
        question = Message("user", (Medium("image", tmp_path / "sent.jpg"), "What is this?"))
        assert caption == assistant.answers([[question]], max_new_tokens=40)[0]


def described(folder: Path) -> Path:
    with endpoint(lambda body: answer(f"a {colour_of(body)} square")) as (address, _):
        return finetune.data_describe(folder, address, options=options(concurrency=1)).out


def test_a_person_accepts_edits_and_rejects_on_the_page(folder):
    path = described(folder)
    review = data_label.Review.of(path, folder / "kept.jsonl")
    page = Page()
    data_label.build_page(page, review)
    number, head, media, text, _, field = page.calls["load"]()
    assert number == 0 and "0 of 4" in head and "<img" in media and text == "Describe the picture."
    assert field == "a green square"
    number, *_ = page.calls["Accept, as it stands above"](field, 0)
    number, *_ = page.calls["Accept, as it stands above"]("an azure square", number)
    number, head, *_ = page.calls["reject this row"](number)
    assert number == 3 and "3 of 4" in head
    rows = read(path)
    assert [row.get("review") for row in rows] == ["accepted", "edited", "rejected", None]
    assert (rows[1]["caption"], rows[1]["proposed"]) == ("an azure square", "a blue square")
    assert [row["caption"] for row in read(folder / "kept.jsonl")] == ["a green square", "an azure square"]
    assert all("source" in row for row in rows)
    again = data_label.Review.of(path, folder / "kept.jsonl")
    assert again.done == 3 and again.open_from(0) == 3
    again.decide(1, "a blue square")  # as it was
    again.decide(2, "")  # taken back
    rows = read(path)
    assert [row.get("review") for row in rows] == ["accepted", "accepted", None, None]
    assert "proposed" not in rows[1] and rows[2]["caption"] == "a red square"


def test_a_reviewed_file_goes_on_being_described_and_labelled(folder):
    path = described(folder)
    data_label.Review.of(path, folder / "kept.jsonl").decide(0, "another")
    tiny_picture().save(folder / "zebra.png")
    described(folder)
    rows = read(path)
    assert len(rows) == 5 and rows[0]["caption"] == "another" and rows[0]["review"] == "edited"
    result = finetune.data_label(path)
    assert (result.out, result.rows, result.labelled) == (folder / "described-reviewed.jsonl", 5, 1)
    assert [row["caption"] for row in read(result.out)] == ["another"]
    with pytest.raises(DataError, match=r"write another \.jsonl file than described"):
        finetune.data_label(path, out=path)


def test_answers_of_questions_are_reviewed_too(folder):
    with endpoint(lambda body: answer("Q: a?\nA: b")) as (address, _):
        path = finetune.data_describe(folder, address, task="vqa", questions=1, options=options()).out
    review = data_label.Review.of(path, folder / "kept.jsonl")
    assert review.items[0].line.text == "a?" and review.items[0].line.proposed == "b"
    review.decide(0, "c")
    assert read(path)[0]["answers"] == ["c"]


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_usual_prompts_name_the_medium(kind):
    noun = {"image": "picture", "audio": "recording", "video": "video"}[kind]
    assert Assignment().wording(kind) == f"Describe the {noun}."
