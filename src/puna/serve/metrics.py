"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from puna.generate.live import Stats

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
GAUGES = {
    "waiting": ("puna_samples_waiting", "Samples that wait for their first token"),
    "running": ("puna_samples_running", "Samples in the batch"),
    "cached_tokens": ("puna_cache_tokens", "Tokens of the key-value cache that sequences hold"),
    "capacity_tokens": ("puna_cache_capacity_tokens", "Tokens that the key-value cache can hold"),
}
"""A field of Stats -> the gauge's name and help."""


class Metrics:
    """One server's counters; a registry of its own, so that two servers may share a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("path", "status")
        self.requests = Counter("puna_requests", "Requests answered", labels, registry=self.registry)
        self.prompt_tokens = Counter("puna_prompt_tokens", "Prompt tokens let in", ("model",), registry=self.registry)
        self._first = Histogram(
            "puna_time_to_first_token_seconds",
            "From a request to a sample's first token",
            ("model",),
            buckets=FIRST,
            registry=self.registry,
        )
        self._between = Histogram(
            "puna_inter_token_seconds", "Between two tokens", ("model",), buckets=BETWEEN, registry=self.registry
        )

    def drawn(self, model: str, seconds: float, tokens: int, *, first: bool) -> None:
        """Tokens of a sample came, so long after the last ones (or, the first ones, after the request)."""
        if first:
            self._first.labels(model).observe(seconds)
        else:
            self._between.labels(model).observe(seconds / tokens)

    def watch(self, engines: Callable[[], Iterable[tuple[str, Stats]]]) -> None:
        """Ask the engines, by model, whenever the metrics are read."""
        self.registry.register(_Engines(engines))

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)


class _Engines(Collector):
    """Engines' own numbers, read when they are asked for."""

    def __init__(self, engines: Callable[[], Iterable[tuple[str, Stats]]]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        found = list(self._engines())
        for field, (name, help) in GAUGES.items():
            gauge = GaugeMetricFamily(name, help, labels=["model"])
            for model, stats in found:
                gauge.add_metric([model], getattr(stats, field))
            yield gauge
        tokens = CounterMetricFamily("puna_generated_tokens", "Tokens drawn; its rate is tokens/s", labels=["model"])
        for model, stats in found:
            tokens.add_metric([model], stats.generated_tokens)
        yield tokens
