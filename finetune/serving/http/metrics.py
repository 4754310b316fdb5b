"""What the server tells Prometheus."""

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from finetune.serving.engine.contract import Stats, Stream

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Of one server. `stats`: the engine's own."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "finetune_requests", "Answered, by path and HTTP status.", ("path", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "finetune_request_seconds",
            "From a request's arrival to the end of its answer, s.",
            ("path",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_seconds = Histogram(
            "finetune_first_token_seconds",
            "From a request's arrival to the first of its text, s.",
            ("model",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.tokens = {
            kind: Counter(f"finetune_{kind}_tokens", about, ("model",), registry=self.registry)
            for kind, about in {
                "prompt": "Tokens of prompts, media included.",
                "cached": "Tokens of prompts that were in memory from an earlier one.",
                "completion": "Tokens written.",
            }.items()
        }
        self.stopped = Counter(
            "finetune_stopped", "Answers whose reader went away.", ("model",), registry=self.registry
        )
        self.registry.register(_EngineStats(stats))

    def count(self, model: str, streams: Iterable[Stream]) -> None:
        """What has been written to one prompt."""
        for number, stream in enumerate(streams):
            if number == 0:
                self.tokens["prompt"].labels(model).inc(stream.prompt_tokens)
                self.tokens["cached"].labels(model).inc(stream.cached_tokens)
            self.tokens["completion"].labels(model).inc(stream.completion_tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Counted:
    """ASGI middleware: counts and times whatever is answered; `paths` are told apart."""

    def __init__(self, app: Any, metrics: Metrics, paths: Iterable[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"] if scope["path"] in self.paths else "other"
        begin, status = perf_counter(), 0

        async def noting(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            return await self.app(scope, receive, noting)
        finally:
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(perf_counter() - begin)


class _EngineStats:
    """The engine's counters and gauges, read when they are asked for."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self.stats = stats

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterable[Any]:
        found = self.stats()
        for name, value in found.counters.items():
            yield CounterMetricFamily(f"finetune_engine_{name}", "Of the engine, since its start.", value=value)
        for name, value in found.gauges.items():
            yield GaugeMetricFamily(f"finetune_engine_{name}", "Of the engine, now.", value=value)
