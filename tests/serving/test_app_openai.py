"""The API through OpenAI's own client."""

import asyncio
import base64
import io
import json
import time

import numpy as np
import openai
import pytest
import soundfile
from fake_engine import FakeEngine, served
from tiny import tiny_picture

from finetune.common.errors import DataError
from finetune.serving.engine.contract import TimedOut

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    engine, folder = FakeEngine(), tmp_path_factory.mktemp("media")
    with served(engine, folder) as (address, _), client_of(address) as client:
        yield engine, client, folder


@pytest.fixture
def engine(running):
    running[0].__init__()
    return running[0]


@pytest.fixture
def client(engine, running):
    yield running[1]
    deadline = time.monotonic() + 5  # a stream's end is read before the server has cleared up after it
    while list(running[2].iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not list(running[2].iterdir())  # all files of media have been deleted


def client_of(address, key="none", kind=openai.OpenAI):
    return kind(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=10)


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def text(words):
    return {"type": "text", "text": words}


def picture_uri(size=(40, 30)):
    file = io.BytesIO()
    tiny_picture(size=size).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def sound(seconds=1.5):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(int(seconds * 16_000), np.float32), 16_000, format="WAV")
    return base64.b64encode(file.getvalue()).decode()


def test_an_answer_and_its_usage(client, engine):
    response = client.chat.completions.create(
        model="shelf",
        messages=[{"role": "developer", "content": "Be brief."}, *user(text("hello "), text("there 红"))],
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop="!",
        max_tokens=7,
        user="somebody",
        store=False,
    )
    assert response.choices[0].message.content == "hello there 红 " and response.choices[0].finish_reason == "stop"
    assert response.choices[0].logprobs is None and response.model == "shelf"
    usage = response.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 3, 13)
    assert response.usage.prompt_tokens_details.cached_tokens == 4
    request = engine.requests[0]
    assert (request.temperature, request.top_p, request.seed, request.stop) == (0.5, 0.9, 3, ("!",))
    assert request.max_new_tokens == 7 and [m.role for m in request.messages] == ["system", "user"]
    assert request.schema is None and request.logprobs is None and request.timeout_seconds == 120


def test_defaults_are_greedy_and_bounded(client, engine):
    client.chat.completions.create(model="写字", messages=user(text("hello")), max_completion_tokens=1)
    client.chat.completions.create(model="写字", messages=user(text("hello")))
    one, other = engine.requests
    assert (one.max_new_tokens, other.max_new_tokens, one.temperature, one.seed) == (1, 256, 0, None)


def test_the_finish_reason_of_a_cut_answer(client):
    response = client.chat.completions.create(model="shelf", messages=user(text("a b c")), max_tokens=2)
    assert response.choices[0].message.content == "a b " and response.choices[0].finish_reason == "length"


def test_streaming_gives_the_same_text(client):
    stream = client.chat.completions.create(
        model="shelf", messages=user(text("a b 红")), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "a b 红 "
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None, None, None, "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_streaming_by_the_asynchronous_client(tmp_path):
    async def ask(number, address):
        async with client_of(address, kind=openai.AsyncOpenAI) as client:
            stream = await client.chat.completions.create(
                model="shelf", messages=user(text(f"{number} b c")), stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def gathered(address):
        return await asyncio.gather(*(ask(number, address) for number in range(8)))

    with served(FakeEngine(), tmp_path) as (address, _):
        assert asyncio.run(gathered(address)) == [f"{number} b c " for number in range(8)]


def test_several_answers_have_their_own_seeds(client, engine):
    response = client.chat.completions.create(model="shelf", messages=user(text("a b")), n=3, seed=5, temperature=1)
    assert [choice.message.content for choice in response.choices] == ["a b "] * 3
    assert [choice.index for choice in response.choices] == [0, 1, 2]
    assert [request.seed for request in engine.requests] == [5, 6, 7]
    assert response.usage.prompt_tokens == 10 and response.usage.completion_tokens == 6
    stream = client.chat.completions.create(model="shelf", messages=user(text("a b")), n=2, stream=True)
    choices = [choice for chunk in stream for choice in chunk.choices]
    for number in (0, 1):
        assert "".join(c.delta.content or "" for c in choices if c.index == number) == "a b "


def test_logprobs(client, engine):
    arguments = {"model": "shelf", "messages": user(text("a 红")), "logprobs": True, "top_logprobs": 2}
    tokens = client.chat.completions.create(**arguments).choices[0].logprobs.content
    assert [token.token for token in tokens] == ["a ", "红 "] and tokens[0].logprob == -0.5
    assert bytes(tokens[1].bytes).decode() == "红 "
    assert [other.token for other in tokens[0].top_logprobs] == ["otherwise"] * 2
    assert tokens[0].top_logprobs[0].logprob == -9999.0  # there is no infinity in JSON
    streamed = [c.choices[0].logprobs for c in client.chat.completions.create(**arguments, stream=True)]
    assert [one.content[0].token for one in streamed if one] == ["a ", "红 "]
    client.chat.completions.create(model="shelf", messages=user(text("a")), logprobs=True)
    assert [request.logprobs for request in engine.requests] == [2, 2, 0]


def test_json_by_a_schema(client, engine):
    schema = {"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]}
    response = client.chat.completions.create(
        model="shelf",
        messages=user(text("which?")),
        response_format={"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True}},
    )
    assert json.loads(response.choices[0].message.content) == {"colour": "red"} and engine.requests[0].schema == schema
    client.chat.completions.create(
        model="shelf", messages=user(text("which?")), response_format={"type": "json_object"}
    )
    assert engine.requests[1].schema == {"type": "object"}
    with pytest.raises(openai.BadRequestError, match="json_schema: is missing"):
        client.chat.completions.create(model="shelf", messages=user(text("?")), response_format={"type": "json_schema"})


def test_media_arrive_whole(client, engine, tmp_path):
    response = client.chat.completions.create(
        model="shelf",
        messages=user(
            {"type": "image_url", "image_url": {"url": picture_uri((70, 20)), "detail": "high"}},
            {"type": "input_audio", "input_audio": {"data": sound(), "format": "wav"}},
            {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{sound(0.5)}"}},
            text("what?"),
        ),
    )
    assert response.choices[0].message.content == "70x20 1.5s 0.5s what? "
    assert np.array_equal(np.asarray(engine.decoded[0]), np.asarray(tiny_picture(size=(70, 20))))
    assert [part.kind for part in engine.requests[0].messages[0].content[:3]] == ["image", "audio", "audio"]
    assert not engine.requests[0].messages[0].content[0].path.exists()


def test_models_are_listed(client):
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["shelf", "写字"] and models["shelf"].owned_by == "finetune"
    assert client.models.retrieve("写字").id == "写字"
    with pytest.raises(openai.NotFoundError, match="served are shelf"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "assistant", "content": "hello"}]}, "messages", "end on the user's turn"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "should be 'system'"),
        ({"messages": user({"type": "file", "file": {}})}, "messages[0].content[0]", "'file'"),
        ({"messages": user({"type": "image_url"})}, "messages[0].content[0].image_url", "required"),
        (
            {"messages": user({"type": "image_url", "image_url": {}})},
            "messages[0].content[0].image_url.url",
            "required",
        ),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "warm"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 9}, "n", "at most 8"),
        ({"n": 0}, "n", "greater than"),
        ({"max_tokens": 5000}, "max_tokens", "at most 2,048"),
        ({"max_tokens": 0}, "max_tokens", "greater than"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "a", "format": "wav"}}, "audio", "not supported"),
        ({"frequency_penalty": 1.5}, "frequency_penalty", "not supported"),
        ({"logit_bias": {"5": 100}}, "logit_bias", "not supported"),
        ({"extra_body": {"top_k": 5}}, "top_k", "not supported"),
    ],
)
def test_invalid_requests_name_the_field(client, engine, changes, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "shelf", "messages": user(text("hello"))} | changes)
    assert caught.value.param == param and message in caught.value.body["message"], caught.value
    assert caught.value.body["type"] == "invalid_request_error" and not engine.requests


def test_fields_without_effect_are_ignored(client):
    client.chat.completions.create(
        model="shelf",
        messages=user(text("hello")),
        tools=[],
        tool_choice="none",
        modalities=["text"],
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        extra_body={"top_k": -1, "repetition_penalty": 1.0, "some_field_of_the_future": {"a": 1}},
    )


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="there is no 'gpt-4'; served are shelf, 写字") as caught:
        client.chat.completions.create(model="gpt-4", messages=user(text("hello")))
    assert caught.value.code == "model_not_found"


def test_a_full_queue(tmp_path):
    engine = FakeEngine(busy_from=1)
    with served(engine, tmp_path) as (address, _), client_of(address) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="shelf", messages=user(text("hello")), n=2)
        assert caught.value.response.headers["retry-after"] == "3" and caught.value.code == "busy"
        assert engine.cancelled == 1  # the answer that had been accepted
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="shelf", messages=user(text("hello")), stream=True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (TimedOut("no end after 1 s"), openai.InternalServerError, "no end after 1 s"),
        (MemoryError(), openai.InternalServerError, "out of memory"),
        (DataError("a schema that can't be"), openai.BadRequestError, "a schema that can't be"),
    ],
)
def test_errors_before_the_first_word(error, kind, message, stream, tmp_path):
    engine = FakeEngine(fails_after=0, error=error)
    with served(engine, tmp_path) as (address, _), client_of(address) as client:
        with pytest.raises(kind, match=message) as caught:
            client.chat.completions.create(model="shelf", messages=user(text("a b")), stream=stream)
        assert caught.value.status_code == (400 if kind is openai.BadRequestError else caught.value.status_code)
    assert engine.cancelled == 1 and not list(tmp_path.iterdir())


def test_errors_after_it_end_the_stream(tmp_path):
    engine = FakeEngine(fails_after=2)
    with served(engine, tmp_path) as (address, _), client_of(address) as client:
        stream = client.chat.completions.create(model="shelf", messages=user(text("a b c")), stream=True)
        received = []
        with pytest.raises(openai.APIError, match="no end after 1 s"):
            received.extend(chunk.choices[0].delta.content for chunk in stream)
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="shelf", messages=user(text("a b c")))
        assert caught.value.status_code == 504


def test_the_client_retries_after_429(tmp_path):
    engine = FakeEngine(refuses_first=1)
    with served(engine, tmp_path) as (address, _), client_of(address) as client:
        response = client.with_options(max_retries=1).chat.completions.create(model="shelf", messages=user(text("a")))
        assert response.choices[0].message.content == "a "


def test_a_wrong_key_is_refused(tmp_path):
    with served(FakeEngine(), tmp_path, api_key="schlüssel") as (address, _):
        for key in ("none", "schlussel"):
            with client_of(address, key) as client, pytest.raises(openai.AuthenticationError) as caught:
                client.models.list()
            assert caught.value.code == "invalid_api_key"
