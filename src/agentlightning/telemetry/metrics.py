"""Metrics of a server: counters of requests, and the text format of Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the latency histogram, in seconds."""


class _Times:
    """Latencies of one route."""

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0


class RequestMeter:
    """Counts requests. Only one event loop writes; a reader in another thread may miss the last request.

    Plain dictionaries are used rather than the metrics of prometheus-client, which take a lock for every update and
    would add several microseconds to each request. They become Prometheus metrics only when they are read.
    """

    def __init__(self) -> None:
        self._statuses: dict[tuple[str, int], int] = {}
        self._times: dict[str, _Times] = {}
        self.shed = 0
        """Requests that were refused because of load."""

    def note(self, route: str, status: int, seconds: float) -> None:
        """Count a request to ``route`` that was answered with ``status`` after ``seconds``."""
        key = (route, status)
        statuses = self._statuses
        statuses[key] = statuses.get(key, 0) + 1
        times = self._times.get(route)
        if times is None:
            times = self._times[route] = _Times()
        times.buckets[bisect_left(BUCKETS, seconds)] += 1
        times.seconds += seconds

    def families(self) -> Iterable[Metric]:
        """The counts as metric families."""
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        requests = CounterMetricFamily(
            "agl_http_requests", "Requests answered, by route and status.", labels=["route", "status"]
        )
        for (route, status), count in sorted(self._statuses.items()):
            requests.add_metric([route, str(status)], count)
        seconds = HistogramMetricFamily(
            "agl_http_request_seconds", "Seconds from request to reply, by route.", labels=["route"]
        )
        for route, times in sorted(self._times.items()):
            below, cumulated = 0, list[tuple[str, float]]()
            for bound, count in zip((*map(str, BUCKETS), "+Inf"), times.buckets, strict=True):
                below += count
                cumulated.append((bound, below))
            seconds.add_metric([route], cumulated, sum_value=times.seconds)
        shed = CounterMetricFamily("agl_http_shed", "Requests refused because of load.", value=self.shed)
        return [requests, seconds, shed]


class Gauge(NamedTuple):
    """One number, or one number for each value of a label."""

    name: str
    help: str
    value: float | Mapping[str, float]
    label: str = ""
    """The name of the label, where ``value`` has several."""
    counter: bool = False
    """Whether it never decreases."""


def load_metrics() -> None:
    """Import what ``render_metrics`` needs. Later the process may have no file descriptor left to read it from."""
    render_metrics(RequestMeter(), ())


def render_metrics(meter: RequestMeter, gauges: Iterable[Gauge]) -> bytes:
    """All metrics in the text format of Prometheus (``METRICS_TYPE``)."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector

    families = list(meter.families())
    for gauge in gauges:
        family = CounterMetricFamily if gauge.counter else GaugeMetricFamily
        if isinstance(gauge.value, Mapping):
            metric = family(gauge.name, gauge.help, labels=[gauge.label])
            for label, value in gauge.value.items():
                metric.add_metric([label], value)
        else:
            metric = family(gauge.name, gauge.help, value=gauge.value)
        families.append(metric)

    class Snapshot(Collector):
        def collect(self) -> Iterable[Metric]:
            return families

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Snapshot())
    return generate_latest(registry)
