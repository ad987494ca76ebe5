"""What a client knows of its server, in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, get_args

from agentlightning.store.client_server.resilience.breaker import BreakerState
from agentlightning.store.client_server.resilience.health import HealthReport, HealthState

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

__all__ = ["ClientMetrics", "KnowsHealth"]

_COUNTERS: Sequence[tuple[str, str]] = (
    ("calls", "Tries that were sent."),
    ("failures", "Tries without a reply, or with one that shows the server to be in trouble."),
    ("retries", "Requests that were sent again."),
    ("given_up", "Requests that failed and were not sent again."),
)
_SPOOL_COUNTERS: Sequence[tuple[str, str]] = (
    ("spooled", "Spans that were written to the disk because the server was out of reach."),
    ("delivered", "Spans that the server has taken from the disk."),
    ("refused", "Spans that the server refused for good."),
    ("pushed_back", "Calls that found no room on the disk."),
    ("adopted", "Spools of dead processes that were taken over."),
)


class KnowsHealth(Protocol):
    """A ``LightningStoreClient``, for example."""

    @property
    def health(self) -> HealthReport:
        """How it and its server get on."""
        ...


class ClientMetrics:
    """A collector for ``prometheus_client``: ``REGISTRY.register(ClientMetrics(client))``.

    Args:
        client: who is asked, each time that the metrics are read.
    """

    def __init__(self, client: KnowsHealth) -> None:
        self._client = client

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now; all names begin with ``agl_client_``."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        report = self._client.health
        state = GaugeMetricFamily("agl_client_state", "1 for the state that the server is in.", labels=["state"])
        for each in get_args(HealthState):
            state.add_metric([each], float(report.state == each))
        yield state
        breaker = GaugeMetricFamily("agl_client_breaker", "1 for the state of the circuit breaker.", labels=["state"])
        for each in BreakerState:
            breaker.add_metric([each.value], float(report.breaker is each))
        yield breaker
        yield GaugeMetricFamily("agl_client_breaker_share", "Share of reads let through.", value=report.breaker_share)
        if report.seconds_since_answer is not None:
            yield GaugeMetricFamily(
                "agl_client_seconds_since_answer", "Since any reply of the server.", value=report.seconds_since_answer
            )
        if report.cached_resources_age_seconds is not None:
            yield GaugeMetricFamily(
                "agl_client_cached_resources_age_seconds",
                "Age of the resources that were last read from the disk; missing while they come from the server.",
                value=report.cached_resources_age_seconds,
            )
        for name, text in _COUNTERS:
            yield CounterMetricFamily(f"agl_client_{name}", text, value=getattr(report, name))
        spool = report.spool
        yield GaugeMetricFamily(
            "agl_client_spool_spans", "Spans that wait on the disk.", value=0 if spool is None else spool.waiting_spans
        )
        yield GaugeMetricFamily(
            "agl_client_spool_bytes", "What they take there.", value=0 if spool is None else spool.waiting_bytes
        )
        for name, text in _SPOOL_COUNTERS:
            value = 0 if spool is None else getattr(spool, name)
            yield CounterMetricFamily(f"agl_client_spool_{name}", text, value=value)
