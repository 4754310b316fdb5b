"""An engine's answers are the model's own, however requests are batched, cached and sampled."""

import json

import pytest
import torch
from tiny_serving import alone, ask_all, pictures, questions, request, serving, tiny_assistant

from finetune.common.errors import DataError
from finetune.data.sample import Medium, Message

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def assistant():
    return tiny_assistant()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize(
    "family, fusion",
    [
        *(("llama", "prefix"), ("mistral", "prefix"), ("gemma2", "prefix"), ("mpt", "prefix")),
        *(("llama", "cross_attention"), ("lfm2", "prefix")),
    ],
)
def test_answers_are_those_of_each_question_alone(family, fusion, paths):
    assistant = tiny_assistant(family, fusion)
    requests = questions(paths, 24)
    expected = alone(assistant, requests)
    assert len(set(expected)) > 12
    with serving(assistant, max_batch=5, prefill_tokens=80) as engine:
        for within_seconds in (0.0, 0.4):  # the second time, prompts are known
            answers = ask_all(engine, requests, within_seconds)
            assert [text.strip() for text, *_ in answers] == expected
        counters = engine.stats().counters
        if engine._hosted["tiny"].static == 0:
            assert counters["steps"] < 0.6 * counters["completion_tokens"]  # many in one step
            assert counters["prefix_cache_hit_tokens"] > 0
    if family == "llama":
        assert {reason for _, reason, *_ in answers} == {"stop", "length"}


def test_each_request_has_its_own_strength(paths):
    assistant = tiny_assistant("llama", "cross_attention")
    requests = [request(r.messages, 8, strength=s) for r in questions(paths, 6) for s in (None, 0.0, 0.5)]
    expected = [alone(assistant, [r], strength=r.strength)[0] for r in requests]
    with serving(assistant) as engine:
        assert [text.strip() for text, *_ in ask_all(engine, requests)] == expected
    assert assistant.model.fusion.strength == {"image": 1.0}


PREFIX = "Describe the picture in detail. "


def test_a_common_prefix_is_read_once(assistant, paths):
    """The same system prompt and picture come from the prefix cache, and answers stay the same."""
    system = Message("system", ("Describe the picture as it is. " * 4,))
    requests = [
        request((system, Message("user", (Medium("image", path), PREFIX + text))), 12)
        for path in paths[:2]
        for text in ("What is this?", "What is this, a square?", "red or blue?")
    ]
    expected = alone(assistant, requests)
    with serving(assistant) as engine:
        answers = [ask_all(engine, [one])[0] for one in requests]
        assert [text.strip() for text, *_ in answers] == expected
        cached = [stream.cached_tokens for *_, stream in answers]
        prompts = [stream.prompt_tokens for *_, stream in answers]
        assert cached[0] == 0
        assert all(0.6 * prompts[i] < cached[i] < prompts[i] for i in (1, 2, 4, 5))
        assert 0 < cached[3] < cached[4]  # another picture: only what stands before it
        counters = engine.stats().counters
        assert counters["prefix_cache_hit_tokens"] == sum(cached)
        assert (counters["media_cache_misses"], counters["media_cache_hits"]) == (2, 4)
        whole = engine.stats().gauges["prefix_cache_bytes"]
    with serving(assistant, prefix_cache_bytes=int(whole // 2), media_cache_bytes=0) as engine:
        again = [ask_all(engine, [one])[0] for one in requests * 2]
        assert [text.strip() for text, *_ in again] == expected * 2
        assert engine.stats().gauges["prefix_cache_bytes"] <= whole / 2
        assert engine.stats().gauges["media_cache_bytes"] == 0


def test_samples_depend_on_their_seed_alone(assistant, paths):
    requests = [request(r.messages, 12, temperature=1.5, top_p=0.9, seed=n) for n, r in enumerate(questions(paths, 10))]
    with serving(assistant) as engine:
        single = [ask_all(engine, [one])[0][0] for one in requests]
        together = [text for text, *_ in ask_all(engine, requests + questions(paths, 6, seed=1))][:10]
        other = [text for text, *_ in ask_all(engine, [request(r.messages, 12, temperature=1.5) for r in requests])]
    assert single == together and single != other
    assert single != alone(assistant, requests)


def test_log_probabilities_are_those_of_the_whole_text(assistant, paths):
    requests = questions(paths, 6, logprobs=3)
    with serving(assistant) as engine:
        answers = ask_all(engine, requests)
    for one, (text, _, pieces, stream) in zip(requests, answers, strict=True):
        tokens = [token for piece in pieces for token in piece.tokens]
        assert len(tokens) == stream.completion_tokens
        assert b"".join(token.raw for token in tokens).decode(errors="replace") == text
        batch = assistant.batch([one.messages])
        ids = batch.input_ids
        for token in tokens:
            with torch.no_grad():
                logits = assistant.model(ids, batch.features, attention_mask=torch.ones_like(ids)).logits[0, -1]
            best = logits.log_softmax(-1).topk(3)
            assert token.logprob == pytest.approx(float(best.values[0]), abs=1e-3)
            assert [nats for _, _, nats in token.alternatives] == pytest.approx(best.values.tolist(), abs=1e-3)
            ids = torch.cat([ids, best.indices[None, :1]], 1)


def test_an_answer_ends_before_a_stop_string(assistant, paths):
    """Stop strings of several characters and tokens that begin anywhere in a token."""
    requests = questions(paths, 30, seed=5, words=4)
    whole = [text for text, *_ in _answers(assistant, requests)]
    long = [(r, text) for r, text in zip(requests, whole, strict=True) if len(text) > 12][:8]
    assert len(long) >= 4
    stops = [text[n % 3 + 4 : n % 3 + 7] for n, (_, text) in enumerate(long)]
    stopped = [
        request(r.messages, r.max_new_tokens, stop=("\x00", stop)) for (r, _), stop in zip(long, stops, strict=True)
    ]
    for (_, text), stop, (answers, reason, pieces, _) in zip(long, stops, _answers(assistant, stopped), strict=True):
        assert reason == "stop"
        assert answers == text.split(stop)[0]
        assert not any(stop in piece.text for piece in pieces)


def _answers(assistant, requests):
    with serving(assistant) as engine:
        return ask_all(engine, requests)


SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "sides": {"type": "integer", "minimum": 0, "maximum": 9},
        "sure": {"type": "boolean"},
    },
    "required": ["colour", "sides", "sure"],
    "additionalProperties": False,
}


def test_json_follows_its_schema(paths):
    assistant = tiny_assistant(ends=range(2, 3))
    free = questions(paths, 4)
    bound = [request(r.messages, 100, schema=SCHEMA, temperature=t, seed=1) for r in free for t in (0.0, 1.0)]
    with serving(assistant) as engine:
        answers = ask_all(engine, bound + free)
    for text, reason, *_ in answers[: len(bound)]:
        content = json.loads(text)
        assert reason == "stop" and set(content) == {"colour", "sides", "sure"}
        assert content["colour"] in ("red", "green", "blue") and 0 <= content["sides"] <= 9
        assert isinstance(content["sure"], bool)
    assert [text.strip() for text, *_ in answers[len(bound) :]] == alone(assistant, free)


def test_any_object_is_json_as_far_as_it_goes(paths):
    with serving(tiny_assistant(ends=range(2, 3))) as engine:
        for text, reason, *_ in ask_all(engine, [request(r.messages, 40, schema={}) for r in questions(paths, 4)]):
            assert text.startswith("{")
            if reason == "stop":
                assert isinstance(json.loads(text), dict)


def test_an_unsupported_schema_is_a_data_error(assistant, paths):
    (one,) = questions(paths, 1)
    with serving(assistant) as engine:
        (error,) = ask_all(engine, [request(one.messages, 8, schema={"type": "colour"})])
        assert isinstance(error, DataError) and "JSON schema" in str(error)
