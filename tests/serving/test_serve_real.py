"""The command itself, on a model that was trained: what it serves is what the model says."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest
from runs import copy_of
from tiny import tiny_picture

import finetune

pytestmark = pytest.mark.slow  # a server that is started
ROOT = Path(finetune.__file__).parents[1]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    """Served as its adapter over the LLM."""
    return copy_of(finished_run("heads"), tmp_path_factory.mktemp("served"), "merged")


@pytest.fixture(scope="module")
def server(run):
    """(client, process) of two names for one adapter, which must share its LLM."""
    command = ["serve", str(run), f"other={run}", "--port", "0", "--option", "max_pixels=5000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune.commands.cli", *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FINETUNE_API_KEY": "secret"},
    )
    line = process.stderr.readline()
    assert line.strip().endswith("  run, other"), line + process.stderr.read()
    told: list[str] = []
    reader = threading.Thread(target=lambda: told.extend(process.stderr), daemon=True)
    reader.start()
    with openai.OpenAI(base_url=f"{line.split()[0]}/v1", api_key="secret", max_retries=0, timeout=60) as client:
        yield client, process
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(30) == 0
    finally:
        process.kill()
    reader.join()
    assert not told


@pytest.fixture(scope="module")
def assistant(run):
    return finetune.load(run)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "green.png"
    tiny_picture((20, 180, 40)).save(path)
    return path


def about(path, words):
    uri = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": words}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("words", ["What is this?", "这是什么？"])
def test_answers_are_the_model_s(server, assistant, picture, words):
    expected = assistant.answer(words, image=picture, max_new_tokens=12)
    for model in ("run", "other"):
        asked = {"model": model, "messages": about(picture, words), "max_tokens": 12}
        said = server[0].chat.completions.create(**asked)
        assert said.choices[0].message.content.strip() == expected
        assert said.usage.prompt_tokens > 4 and 0 < said.usage.completion_tokens <= 12
        chunks = list(server[0].chat.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip() == expected
    text = server[0].chat.completions.create(model="run", messages=[{"role": "user", "content": words}], max_tokens=12)
    assert text.choices[0].message.content.strip() == assistant.answer(words, max_new_tokens=12)


def test_labels_are_the_model_s(server, assistant, picture):
    expected = assistant.probabilities("What is this?", task="colour", image=picture)
    body = {"model": "other", "task": "colour", "messages": about(picture, "What is this?")}
    said = server[0].post("/classify", body=body, cast_to=object)["data"][0]
    assert said["probabilities"] == pytest.approx(expected, abs=1e-5)
    assert said["label"] == max(expected, key=expected.get)


def test_json_is_of_its_schema(server, picture):
    wanted = {"type": "json_schema", "json_schema": {"name": "seen", "schema": SCHEMA}}
    said = server[0].chat.completions.create(
        model="run",
        messages=about(picture, "What is this?"),
        response_format=wanted,
        max_tokens=100,
        temperature=1,
        seed=1,
    )
    found = json.loads(said.choices[0].message.content)
    assert found["colour"] in ("red", "green") and found["sure"] in (True, False) and len(found) == 2


def test_logprobs_are_probabilities(server, picture):
    said = server[0].chat.completions.create(
        model="run", messages=about(picture, "What?"), logprobs=True, top_logprobs=3, max_tokens=5
    )
    for token in said.choices[0].logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)  # greedy: the likeliest


def test_what_is_wrong_with_a_medium_names_no_path(server, tmp_path):
    large = tmp_path / "large.png"
    tiny_picture(size=(100, 100)).save(large)
    broken = tmp_path / "broken.png"
    broken.write_bytes(large.read_bytes()[:60])
    for path, said in ((large, "at most 5,000 are decoded (`max_pixels`)"), (broken, "")):
        with pytest.raises(openai.BadRequestError) as caught:
            server[0].chat.completions.create(model="run", messages=about(path, "What?"))
        message = caught.value.body["message"]
        assert message.startswith("messages[0].content[0]: ") and said in message, message
        assert "/" not in message.replace("image/png", "") and "finetune" not in message


def test_bad_requests_are_told_by_the_engine_too(server):
    for changes in (
        {"messages": [{"role": "user", "content": "word " * 3000}]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}},
        {"extra_body": {"strength": 0.5}},
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            asked = {"model": "run", "messages": [{"role": "user", "content": "What?"}]} | changes
            server[0].chat.completions.create(**asked)
        assert "/" not in caught.value.body["message"], caught.value


def test_models_tell_what_they_take(server):
    models = {model.id: model.model_dump() for model in server[0].models.list()}
    assert list(models) == ["run", "other"] and models["run"]["media"] == ["image"]
    assert models["run"]["tasks"]["colour"]["labels"] and models["run"]["tasks"]["words"]["head"] == "language"
