"""What a client knows of its server, as metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, get_args

from agentlightning.http.client.health import BreakerState, HealthReport, HealthState, SpoolReport

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


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
        spool = report.spool or SpoolReport()
        for name, text, states, present in (
            ("state", "1 for the state that the server is in.", get_args(HealthState), report.state),
            ("breaker", "1 for the state of the circuit breaker.", BreakerState, report.breaker),
        ):
            metric = GaugeMetricFamily(f"agl_client_{name}", text, labels=["state"])
            for each in states:
                metric.add_metric([str(each)], float(each == present))
            yield metric
        for name, value, text in (
            ("breaker_share", report.breaker_share, "0: calls are held back; 1: all pass; between: recovery."),
            ("score", report.score, "How well the last tries went (Apdex); 1: all were answered fast."),
            ("response_seconds", report.response_seconds, "Median time of the last answers."),
            ("seconds_since_answer", report.seconds_since_answer, "Since any reply of the server."),
            (
                "cached_resources_age_seconds",
                report.cached_resources_age_seconds,
                "Age of the resources that were last read from the disk; missing while they come from the server.",
            ),
            ("spool_spans", spool.waiting_spans, "Spans that wait on the disk."),
            ("spool_bytes", spool.waiting_bytes, "What they take there."),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"agl_client_{name}", text, value=value)
        for name, value, text in (
            ("calls", report.calls, "Tries that were sent."),
            ("failures", report.failures, "Tries without a reply, or with one that shows the server to be in trouble."),
            ("retries", report.retries, "Requests that were sent again."),
            ("given_up", report.given_up, "Requests that failed and were not sent again."),
            ("spool_spooled", spool.spooled, "Spans that went to the disk because the server was out of reach."),
            ("spool_delivered", spool.delivered, "Spans that the server has taken from the disk."),
            ("spool_refused", spool.refused, "Spans that the server refused for good."),
            ("spool_discarded", spool.discarded, "Refused spans for which the quarantine file had no room."),
            ("spool_pushed_back", spool.pushed_back, "Calls that found no room on the disk."),
            ("spool_adopted", spool.adopted, "Spools of dead processes that were taken over."),
        ):
            yield CounterMetricFamily(f"agl_client_{name}", text, value=value)
