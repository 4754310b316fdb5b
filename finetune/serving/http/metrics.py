"""Prometheus metrics of a server."""

from collections.abc import Callable, Iterable
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune.serving.engine.answer_stream import AnswerStream
from finetune.serving.engine.contract import Stats

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class ServerMetrics:
    """`stats`: the engine's own metrics."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, description: str, *labels: str) -> Counter:
            return Counter(f"finetune_{name}", description, labels, registry=self.registry)

        def histogram(name: str, description: str, *labels: str) -> Histogram:
            return Histogram(f"finetune_{name}", description, labels, buckets=SECONDS, registry=self.registry)

        self.requests = counter("requests", "Responses by path and HTTP status.", "path", "status")
        self.seconds = histogram("request_seconds", "From a request's arrival to the end of its response, s.", "path")
        self.first_seconds = histogram(
            "first_token_seconds", "From a request's arrival to the first text of its answer, s.", "model"
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens, media included.", "model")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens found in the prefix cache.", "model")
        self.completion_tokens = counter("completion_tokens", "Generated tokens.", "model")
        self.stopped = counter("stopped", "Requests cancelled by their client.", "model")
        self.registry.register(_EngineStats(stats))

    def count_tokens(self, model: str, streams: Iterable[AnswerStream]) -> None:
        """The tokens of all answers to one prompt, which counts once."""
        for number, stream in enumerate(streams):
            if number == 0:
                self.prompt_tokens.labels(model).inc(stream.prompt_tokens)
                self.cached_tokens.labels(model).inc(stream.cached_tokens)
            self.completion_tokens.labels(model).inc(stream.completion_tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class RequestMetrics:
    """ASGI middleware that counts and times all responses, by path for `paths`."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, paths: Iterable[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"
        begin, status = perf_counter(), 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception:  # counted, and raised again for the handler of errors
            status = status or 500
            raise
        finally:
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(perf_counter() - begin)


class _EngineStats(Collector):
    """The engine's counters and gauges at the time of a scrape."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self.stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self.stats()
        for name, value in stats.counters.items():
            yield CounterMetricFamily(f"finetune_engine_{name}", "Of the engine, since its start.", value=value)
        for name, value in stats.gauges.items():
            yield GaugeMetricFamily(f"finetune_engine_{name}", "Of the engine, now.", value=value)
