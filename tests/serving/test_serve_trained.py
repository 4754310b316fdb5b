"""A trained model, served: the answers are the model's own."""

import base64
import json
import signal
import subprocess

import forked
import openai
import pytest
from cli import REAL
from fake_engine import served
from tiny import tiny_picture
from trained_runs import copy_of

import finetune
from finetune.serving.http.settings import ServerOptions
from finetune.serving.serve import load_engine

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    """Without its merged model, so that the adapter is served."""
    return copy_of(finished_run("heads"), tmp_path_factory.mktemp("served"), "merged")


@pytest.fixture(scope="module")
def client(run, tmp_path_factory):
    """For two names of one adapter, which share its LLM."""
    engine = load_engine({"run": str(run), "other": str(run)}, ServerOptions(max_pixels=5000))
    engine.start()
    with (
        served(engine, tmp_path_factory.mktemp("media"), "secret") as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0, timeout=60) as client,
    ):
        yield client
    engine.stop(0)


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
def test_answers_are_the_model_s_own(client, assistant, picture, words):
    expected = assistant.answer(words, image=picture, max_new_tokens=12)
    for model in ("run", "other"):
        arguments = {"model": model, "messages": about(picture, words), "max_tokens": 12}
        response = client.chat.completions.create(**arguments)
        assert response.choices[0].message.content.strip() == expected
        assert response.usage.prompt_tokens > 4 and 0 < response.usage.completion_tokens <= 12
        chunks = list(client.chat.completions.create(**arguments, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip() == expected
    answer = client.chat.completions.create(model="run", messages=[{"role": "user", "content": words}], max_tokens=12)
    assert answer.choices[0].message.content.strip() == assistant.answer(words, max_new_tokens=12)


def test_labels_are_the_model_s_own(client, assistant, picture):
    expected = assistant.probabilities("What is this?", task="colour", image=picture)
    body = {"model": "other", "task": "colour", "messages": about(picture, "What is this?")}
    response = client.post("/classify", body=body, cast_to=object)["data"][0]
    assert response["probabilities"] == pytest.approx(expected, abs=1e-5)
    assert response["label"] == max(expected, key=expected.get)


def test_json_follows_its_schema(client, picture):
    response_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    response = client.chat.completions.create(
        model="run",
        messages=about(picture, "What is this?"),
        response_format=response_format,
        max_tokens=100,
        temperature=1,
        seed=1,
    )
    content = json.loads(response.choices[0].message.content)
    assert content["colour"] in ("red", "green") and content["sure"] in (True, False) and len(content) == 2


def test_logprobs_are_probabilities(client, picture):
    response = client.chat.completions.create(
        model="run", messages=about(picture, "What?"), logprobs=True, top_logprobs=3, max_tokens=5
    )
    for token in response.choices[0].logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)  # greedy: the likeliest


def test_errors_of_media_name_no_path(client, tmp_path):
    large = tmp_path / "large.png"
    tiny_picture(size=(100, 100)).save(large)
    broken = tmp_path / "broken.png"
    broken.write_bytes(large.read_bytes()[:60])
    for path, expected in ((large, "at most 5,000 are decoded (`max_pixels`)"), (broken, "")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="run", messages=about(path, "What?"))
        message = caught.value.body["message"]
        assert message.startswith("messages[0].content[0]: ") and expected in message, message
        assert "/" not in message.replace("image/png", "") and "finetune" not in message


def test_errors_of_the_engine_name_no_path(client):
    for changes in (
        {"messages": [{"role": "user", "content": "word " * 3000}]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}},
        {"extra_body": {"strength": 0.5}},
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            arguments = {"model": "run", "messages": [{"role": "user", "content": "What?"}]} | changes
            client.chat.completions.create(**arguments)
        assert "/" not in caught.value.body["message"], caught.value


def test_models_are_described(client):
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert list(models) == ["run", "other"] and models["run"]["media"] == ["image"]
    assert models["run"]["tasks"]["colour"]["labels"] and models["run"]["tasks"]["words"]["head"] == "language"


def test_the_command(run, assistant, picture):
    """`finetune serve` as a process: it answers, writes nothing but its address, and ends on SIGTERM."""
    process = forked.popen(
        [*REAL, "serve", str(run), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={"FINETUNE_API_KEY": "secret"},
    )
    try:
        line = process.stderr.readline()
        assert line.strip().endswith("  run"), line + process.stderr.read()
        with openai.OpenAI(base_url=f"{line.split()[0]}/v1", api_key="secret", max_retries=0, timeout=60) as client:
            response = client.chat.completions.create(model="run", messages=about(picture, "What?"), max_tokens=6)
        expected = assistant.answer("What?", image=picture, max_new_tokens=6)
        assert response.choices[0].message.content.strip() == expected
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0 and not process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
