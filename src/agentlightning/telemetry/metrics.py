"""Numbers of a server and its store: how they are counted, and the text format of Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the histogram of latencies, in seconds."""


class Histogram:
    """How often values came, by size. One writer; a reader in another thread may miss the last value.

    Args:
        bounds: upper bounds of the buckets, the smallest first.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Values in each bucket; the last one has those above all bounds."""
        self.total = 0.0
        """The sum of all values."""

    def note(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulated(self) -> Iterator[tuple[str, float]]:
        """Each bound, and how many values are not above it."""
        below = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            yield bound, below


class Measure(NamedTuple):
    """One number or histogram that says how something is doing, or one for each value of a label."""

    name: str
    """As Prometheus has it, without the ending ``_total`` of numbers that grow."""
    help: str
    value: float | Mapping[str, float] | Mapping[str, Histogram]
    grows: bool = False
    """Whether it only ever grows."""
    label: str = ""
    """The name of the label, where ``value`` has several."""


class RequestMeter:
    """Counts requests. Only one event loop writes; a reader in another thread may miss the last request.

    Plain dictionaries are used rather than the metrics of prometheus-client, which take a lock for every update and
    would add several microseconds to each request. They become Prometheus metrics only when they are read.
    """

    def __init__(self) -> None:
        self._statuses: dict[tuple[str, int], int] = {}
        self._times: dict[str, Histogram] = {}
        self.shed = 0
        """Requests that were refused because of load."""

    def note(self, route: str, status: int, seconds: float) -> None:
        """Count a request to ``route`` that was answered with ``status`` after ``seconds``."""
        key = (route, status)
        statuses = self._statuses
        statuses[key] = statuses.get(key, 0) + 1
        times = self._times.get(route)
        if times is None:
            times = self._times[route] = Histogram(_LATENCIES)
        times.counts[bisect_left(_LATENCIES, seconds)] += 1
        times.total += seconds

    def availability(self) -> float:
        """The share of requests that were not refused because of load, and did not fail because of the server."""
        answers = list(self._statuses.items())
        failed = sum(number for (_, status), number in answers if status >= 500)
        failed += min(self.shed, sum(number for (_, status), number in answers if status == 429))
        total = sum(number for _, number in answers)
        return 1.0 - failed / total if total else 1.0

    def families(self) -> Iterable[Metric]:
        """The counts as metric families."""
        from prometheus_client.core import CounterMetricFamily

        requests = CounterMetricFamily(
            "agl_http_requests", "Requests answered, by route and status.", labels=["route", "status"]
        )
        for (route, status), count in sorted(self._statuses.items()):
            requests.add_metric([route, str(status)], count)
        seconds = Measure(
            "agl_http_request_seconds", "Seconds from request to reply, by route.", dict(self._times), label="route"
        )
        shed = Measure("agl_http_shed", "Requests refused because of load.", float(self.shed), grows=True)
        share = "Share of requests since the start that neither load nor a fault of the server kept from an answer."
        available = Measure("agl_availability_ratio", share, self.availability())
        return [requests, *map(_family, (seconds, shed, available) if self._times else (shed, available))]


def load_metrics() -> None:
    """Import what ``render_metrics`` needs. Later the process may have no file descriptor left to read it from."""
    render_metrics(RequestMeter(), ())


def render_metrics(meter: RequestMeter, measures: Iterable[Measure]) -> bytes:
    """All metrics in the text format of Prometheus (``METRICS_TYPE``)."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    families = [*meter.families(), *map(_family, measures)]

    class Snapshot(Collector):
        def collect(self) -> Iterable[Metric]:
            return families

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Snapshot())
    return generate_latest(registry)


def _family(measure: Measure) -> Metric:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    name, text, value, grows, label = measure
    if not isinstance(value, Mapping):
        return (CounterMetricFamily if grows else GaugeMetricFamily)(name, text, value=value)
    if any(isinstance(each, Histogram) for each in value.values()):
        histograms = HistogramMetricFamily(name, text, labels=[label])
        for key, each in sorted(value.items()):
            assert isinstance(each, Histogram)
            histograms.add_metric([key], list(each.cumulated()), sum_value=each.total)
        return histograms
    numbers = (CounterMetricFamily if grows else GaugeMetricFamily)(name, text, labels=[label])
    for key, each in value.items():
        assert not isinstance(each, Histogram)
        numbers.add_metric([key], each)
    return numbers
