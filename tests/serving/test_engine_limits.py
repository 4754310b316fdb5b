"""Errors of one request don't affect others, and the engine's limits hold."""

import asyncio
import inspect
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_serving import alone, ask_all, pictures, questions, read, request, serving, tiny_assistant

from finetune.common.errors import DataError, MediaError
from finetune.data.media import decode
from finetune.data.sample import Medium, Message
from finetune.serving.engine import prompt
from finetune.serving.engine.batch import GenerationBatch
from finetune.serving.engine.cache import PrefixCache
from finetune.serving.engine.contract import Busy, EngineLimits, ModelInfo, TaskInfo, TimedOut
from finetune.serving.engine.worker import HeadQuery, HostedModel, Worker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def assistant():
    return tiny_assistant(ends=range(2, 3))  # answers go on to their limit


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"))


def texts(answers):
    return [one if isinstance(one, BaseException) else one[0].strip() for one in answers]


class Slow:
    """Slows the LLM down and records its batch sizes."""

    def __init__(self, model, seconds=0.01, wrong=lambda batch: None):
        self.forward, self.lm, self.batches = model.causal_lm.forward, model.causal_lm, []

        def forward(*args, **kwargs):
            given = next(x for x in (*args, kwargs.get("inputs_embeds"), kwargs.get("input_ids")) if x is not None)
            self.batches.append(len(given))
            time.sleep(seconds)
            if (error := wrong(len(given))) is not None:
                raise error
            return self.forward(*args, **kwargs)

        forward.__signature__ = inspect.signature(self.forward)
        self.lm.forward = forward

    def __enter__(self):
        return self

    def __exit__(self, *_):
        del self.lm.forward


def test_unreadable_requests_fail_alone(assistant, paths, tmp_path):
    (tmp_path / "broken.png").write_bytes(paths[0].read_bytes()[:40])
    good = questions(paths, 6, 12)
    bad = [
        request((Message("user", (Medium("image", tmp_path / "broken.png"), "What?")),)),
        request((Message("user", (Medium("image", tmp_path / "none.png"), "What?")),)),
        request((Message("user", (Medium("audio", paths[0]), "What?")),)),
        request((Message("user", ("What is this? " * 100,)),)),
    ]
    with serving(assistant) as engine:
        answers = texts(ask_all(engine, [*good[:3], *bad, *good[3:]]))
        assert answers[:3] + answers[7:] == alone(assistant, good)
        assert [type(error) for error in answers[3:7]] == [MediaError, MediaError, DataError, DataError]
        assert "but the LLM reads 256" in str(answers[6])
        assert engine.stats().counters["requests_failed"] == 4
        assert engine.stats().gauges["requests_waiting"] == engine.stats().gauges["requests_running"] == 0


def test_a_medium_that_cannot_be_encoded_fails_alone(assistant, paths, monkeypatch):
    encoder = assistant.encoders["image"]
    encode, seen = encoder.encode, [encoder.prepare(decode("image", path)).values for path in paths]

    def broken(self, values):
        if torch.equal(values[0], seen[2]):
            raise RuntimeError("a layer doesn't take it")
        return encode(values)

    requests = [request((Message("user", (Medium("image", path), "What?")),), 6) for path in paths]
    expected = alone(assistant, requests)
    with serving(assistant, media_cache_bytes=0) as engine, monkeypatch.context() as patch:
        patch.setattr(type(encoder), "encode", broken)
        answers = texts(ask_all(engine, requests))
    assert isinstance(answers[2], RuntimeError) and answers[:2] + answers[3:] == expected[:2] + expected[3:]


def test_a_batch_shrinks_when_memory_runs_out(assistant, paths):
    requests = questions(paths, 8, 12)
    expected = alone(assistant, requests)
    full = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with Slow(assistant.model, 0, lambda batch: full if batch > 2 else None) as seen, serving(assistant) as engine:
        assert texts(ask_all(engine, requests)) == expected
        assert max(seen.batches) > 2 and seen.batches.count(2) > 20
    with Slow(assistant.model, 0, lambda batch: full), serving(assistant) as engine:
        assert all(
            isinstance(error, MemoryError) and "memory" in str(error) for error in texts(ask_all(engine, requests))
        )
        assistant.model.causal_lm.forward = assistant.model.causal_lm.__class__.forward.__get__(
            assistant.model.causal_lm
        )
        assert texts(ask_all(engine, requests)) == expected


def test_a_request_that_raises_in_a_step_fails_alone(assistant, paths):
    """After an error in a step the answers are tried again one by one; only the cause of the error fails."""
    requests = questions(paths, 5, 12)
    expected = alone(assistant, requests)
    vocabulary = assistant.model.get_input_embeddings().weight.shape[0]
    with serving(assistant) as engine:
        real = engine._generation

        def row(served, wanted, stream, weights):
            made = real(served, wanted, stream, weights)
            if wanted is requests[2]:
                made.prompt.input_ids[0] = vocabulary + 7  # no such row in the table
            return made

        engine._generation = row
        answers = texts(ask_all(engine, requests))
        assert isinstance(answers[2], IndexError)
        assert answers[:2] + answers[3:] == expected[:2] + expected[3:]
        asyncio.run(_soon(lambda: engine.stats().gauges["requests_running"] == 0))


def test_too_many_requests_are_refused(assistant, paths):
    requests = questions(paths, 3, 40)
    with Slow(assistant.model, 0.02), serving(assistant, max_batch=1, queue_limit=2) as engine:

        async def submit_all():
            first = engine.submit(requests[0])
            async for _ in first:  # it runs
                break
            waiting = [engine.submit(one) for one in requests[1:]]
            with pytest.raises(Busy) as refused:
                engine.submit(requests[0])
            with pytest.raises(Busy):
                await engine.ask("tiny", "colour", requests[0].messages, 5)
            waiting[0].cancel()
            await _soon(lambda: engine.stats().gauges["requests_waiting"] < 2)
            engine.submit(requests[0])
            return refused.value.retry_after_seconds

        assert asyncio.run(submit_all()) >= 1
        assert engine.stats().counters["requests_refused"] == 2


async def _soon(holds, within_seconds=5.0):
    end = time.monotonic() + within_seconds
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def test_cancelling_makes_room(assistant, paths):
    requests = questions(paths, 2, 200)
    with Slow(assistant.model, 0.01) as seen, serving(assistant) as engine:

        async def leave():
            streams = [engine.submit(one) for one in requests]
            for stream in streams:
                async for _ in stream:
                    break
            streams[0].cancel()
            await _soon(lambda: engine.stats().gauges["requests_running"] == 1)
            return (await read(streams[1]))[1]

        assert asyncio.run(leave()) == "length"
        assert engine.stats().counters["requests_cancelled"] == 1
        assert seen.batches[-1] == 1


def test_answers_time_out(assistant, paths):
    (slow,), (quick,) = questions(paths, 1, 200, timeout_seconds=0.4), questions(paths, 1, 4)
    with Slow(assistant.model, 0.02), serving(assistant) as engine:
        begin = time.monotonic()
        answers = texts(ask_all(engine, [slow, quick]))
        assert isinstance(answers[0], TimedOut) and time.monotonic() - begin < 2
        assert answers[1] == alone(assistant, [quick])[0]
        asyncio.run(_soon(lambda: engine.stats().gauges["requests_running"] == 0))
    with Slow(assistant.model, 1.0), serving(assistant) as engine:  # one step is longer than the time
        begin = time.monotonic()
        assert isinstance(texts(ask_all(engine, [request(quick.messages, 4, timeout_seconds=0.2)]))[0], TimedOut)
        with pytest.raises(TimedOut):
            asyncio.run(engine.ask("tiny", "colour", quick.messages, 0.2))
        assert time.monotonic() - begin < 1.5


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_stopping_finishes_running_requests(fusion, paths):
    assistant = tiny_assistant(fusion=fusion, ends=range(2, 3))
    requests = questions(paths, 4, 30)
    expected = alone(assistant, requests)
    for drain_seconds in (20.0, 0.0):
        step_seconds = 0.01 if drain_seconds else 0.05  # so that nothing finishes before the stop
        with Slow(assistant.model, step_seconds), serving(assistant, max_batch=3) as engine:

            async def stopped(engine, drain_seconds):
                streams = [engine.submit(requests[0])]
                async for _ in streams[0]:  # the others begin behind it, however fast they are read
                    break
                streams += [engine.submit(one) for one in requests[1:]]
                together = 3 if fusion == "prefix" else 1
                await _soon(lambda: engine.stats().gauges["requests_running"] >= together)
                end = threading.Thread(target=engine.stop, args=(drain_seconds,))
                end.start()
                await _soon(lambda: engine._worker.draining)
                with pytest.raises(Busy):
                    engine.submit(requests[0])
                answers = await asyncio.gather(*map(read, streams[1:]), return_exceptions=True)
                await asyncio.to_thread(end.join)
                return answers

            answers = asyncio.run(stopped(engine, drain_seconds))
            if drain_seconds:
                assert texts(answers) == expected[1:]
            else:
                assert [type(one) for one in answers] == [TimedOut] * 3, answers


def test_a_request_is_cut_at_the_engine_s_token_limit(assistant, paths):
    long = [request((Message("user", ("What is this? " * 12,)),), 200)]
    with serving(assistant, max_batch_tokens=100) as engine:
        ((_, reason, _, stream),) = ask_all(engine, long)
        assert stream.prompt_tokens + stream.completion_tokens == 100 and reason == "length"
        requests = questions(paths, 6, 20)
        assert texts(ask_all(engine, requests)) == alone(assistant, requests)
    with serving(assistant, max_batch_tokens=40) as engine:
        (error,) = ask_all(engine, long)
        assert isinstance(error, DataError) and "this server takes 40" in str(error)


def test_a_batch_stays_within_its_token_limit(assistant, paths):
    requests = questions(paths, 8, 20)
    with Slow(assistant.model, 0) as seen, serving(assistant, max_batch_tokens=150) as engine:
        ask_all(engine, requests)
        assert 1 < max(seen.batches) <= 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "other"}, "no model 'other'; there are: tiny"),
        ({"strength": 0.5}, "strength is for models with cross-attention"),
    ],
)
def test_invalid_requests_are_refused_at_once(assistant, paths, change, message):
    (one,) = questions(paths, 1, 12)
    with serving(assistant) as engine, pytest.raises(DataError, match=message):
        engine.submit(request(one.messages, **change))


def test_heads_run_between_two_steps(assistant, paths):
    requests = questions(paths, 4, 40)
    expected = [assistant.ask("colour", [one.messages])[0].probabilities for one in requests]
    with Slow(assistant.model, 0.005), serving(assistant) as engine:

        async def both():
            streams = [engine.submit(one) for one in requests]
            outputs = await asyncio.gather(*(engine.ask("tiny", "colour", one.messages, 20) for one in requests))
            running = engine.stats().gauges["requests_running"]
            return outputs, running, await asyncio.gather(*map(read, streams))

        outputs, running, answers = asyncio.run(both())
        assert running > 0 and texts(answers) == alone(assistant, requests)
        for answer, right in zip(outputs, expected, strict=True):
            assert answer.probabilities == pytest.approx(right, abs=1e-4)
        with pytest.raises(DataError, match="has no task 'size'; there are: colour"):
            asyncio.run(engine.ask("tiny", "size", requests[0].messages, 5))
        broken = (Message("user", (Medium("image", paths[0].parent), "What?")),)
        with pytest.raises(MediaError):
            asyncio.run(engine.ask("tiny", "colour", broken, 5))
    assert engine.models == {
        "tiny": ModelInfo(("image",), {"colour": TaskInfo("label", ("blue", "red"), "What is this?")}, 256)
    }


def test_models_take_turns(paths):
    """Short requests to one model don't wait for long ones to another; each model answers as it does alone."""
    models = {"one": tiny_assistant(ends=range(2, 3)), "other": tiny_assistant("mistral", ends=range(2, 3))}
    long, short = questions(paths, 3, 60, model="one"), questions(paths, 3, 5, model="other")
    expected = [alone(models[r.model], [r])[0] for r in long + short]
    ended = []
    with Slow(models["one"].model, 0.005), serving(models) as engine:

        async def timed(wanted):
            text, *_ = await read(engine.submit(wanted))
            ended.append(wanted.model)
            return text.strip()

        async def all_of_them():
            return await asyncio.gather(*map(timed, long + short))

        assert asyncio.run(all_of_them()) == expected
    assert ended == ["other"] * 3 + ["one"] * 3


def within_ten_seconds(engine, requests):
    """Answers that arrive in time, or exceptions."""
    return texts(ask_all(engine, [request(one.messages, one.max_new_tokens, timeout_seconds=10) for one in requests]))


@pytest.mark.parametrize("place", ["keep", "join", "_encode_media"])
def test_the_engine_survives_running_out_of_memory_anywhere(assistant, paths, monkeypatch, place):
    """All other requests are answered, so is the next one, and nothing is left waiting."""
    owner = Worker if place == "_encode_media" else GenerationBatch
    real, raised = getattr(owner, place), []

    def full_once(self, *given):
        if not raised and (place != "keep" or len(given[0]) < len(self.generations)):
            raised.append(1)
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, *given)

    requests = [
        request(one.messages, tokens) for one, tokens in zip(questions(paths, 4, 12), (2, 9, 12, 12), strict=True)
    ]
    expected = alone(assistant, requests)
    with serving(assistant) as engine:
        monkeypatch.setattr(owner, place, full_once)
        answers = within_ten_seconds(engine, requests)
        assert raised and engine.alive
        wrong = [one for one in answers if isinstance(one, BaseException)]
        assert all(isinstance(one, MemoryError) for one in wrong) and len(wrong) <= (place != "keep")
        assert [one for one in answers if one not in wrong] == [
            right for one, right in zip(answers, expected, strict=True) if one not in wrong
        ]
        assert within_ten_seconds(engine, requests) == expected
        gauges = engine.stats().gauges
        assert gauges["requests_waiting"] == gauges["requests_running"] == 0


def test_a_tiny_temperature_is_greedy(assistant, paths):
    (one,) = questions(paths, 1, 12)
    with serving(assistant) as engine:
        answers = ask_all(engine, [request(one.messages, 12, temperature=heat) for heat in (0.0, 1e-6, 1e-30, 1e-320)])
        assert texts(answers) == alone(assistant, [one]) * 4


def test_answers_to_one_request_share_its_media(assistant, paths, monkeypatch):
    real, decoded = prompt.read_medium, []

    def counted(encoder, medium, limits):
        decoded.append(medium.path)
        time.sleep(0.1)  # so that the other reader comes meanwhile
        return real(encoder, medium, limits)

    monkeypatch.setattr(prompt, "read_medium", counted)
    one = request((Message("user", (Medium("image", paths[0]), Medium("image", paths[1]), "What?")),), 6)
    with serving(assistant, media_cache_bytes=0, media_waiting_bytes=1) as engine:  # its own media are never too many
        assert texts(ask_all(engine, [one] * 8)) == alone(assistant, [one]) * 8
    assert sorted(decoded) == paths[:2]


def test_waiting_media_are_bounded(assistant, paths):
    """While one answer runs, pictures of those behind it wait, but only as many as fit; text always may."""
    long, text = questions(paths, 1, 100)[0], request((Message("user", ("What is this?",)),), 2)
    shown = [request((Message("user", (Medium("image", path), "What?")),), 2) for path in paths]
    size = assistant.encoders["image"].prepare(decode("image", paths[0])).values.nbytes
    with Slow(assistant.model, 0.01), serving(assistant, max_batch=1, media_waiting_bytes=2 * size) as engine:

        async def submit_all():
            first = engine.submit(request((Message("user", ("What?",)),), long.max_new_tokens))
            async for _ in first:
                break
            answers = await asyncio.gather(
                *(read(engine.submit(one)) for one in [*shown, text]), return_exceptions=True
            )
            first.cancel()
            return answers

        *answers, of_text = asyncio.run(submit_all())
        refused = [one for one in answers if isinstance(one, BaseException)]
        assert len(answers) - len(refused) in (2, 3)  # two readers look at once
        assert all(isinstance(one, Busy) for one in refused) and not isinstance(of_text, BaseException)
        assert engine.stats().gauges["media_waiting_bytes"] == 0
        assert isinstance(within_ten_seconds(engine, shown[:1])[0], str)


def test_a_request_that_arrives_while_the_worker_tidies_is_kept():
    """Readers hand over through the worker's inbox; its queues are the worker's alone."""
    worker = Worker(PrefixCache(0), EngineLimits())

    class Cancelled(HeadQuery):
        @property
        def done(self):
            worker.deliver(model, late, late)  # at the worst moment
            return True

    model = HostedModel(None, None, SimpleNamespace(generations=[], keep=lambda _: None), frozenset(), None, 32, 0)
    cancelled, late = Cancelled("colour", ()), HeadQuery("colour", ())
    worker.models = [model]
    model.queries.append(cancelled)
    worker._tidy(model)
    assert worker.waiting == 1 and not model.queries
    assert worker._wait() and list(model.queries) == [late]
