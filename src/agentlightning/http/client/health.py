"""What a client knows of its server: from its calls, from probes, and from the breaker's decisions."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from agentlightning.http.client.breaker import BreakerState
from agentlightning.http.client.transport import TROUBLE, WireRequest

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_logger = logging.getLogger(__name__)

HealthState = Literal["unknown", "healthy", "degraded", "unreachable"]
"""``unknown``: not called yet; ``degraded``: the last call failed, or calls are let through by and by again;
``unreachable``: the breaker is open, or several calls in a row failed."""

_UNREACHABLE_AFTER = 3


@dataclass(frozen=True, slots=True)
class SpoolReport:
    """Spans that wait on this machine's disk. Counts are of this client."""

    waiting_spans: int
    waiting_bytes: int
    spooled: int
    """Spans that were written to the disk."""
    delivered: int
    """Spans that the server has taken from it, those of dead runners included."""
    refused: int
    """Spans that the server refused for good; they are in the quarantine file."""
    pushed_back: int
    """Calls that had to wait, or failed, because there was no room."""
    adopted: int
    """Spools of dead processes that were taken over."""


@dataclass(frozen=True, slots=True)
class HealthReport:
    """How a client and its server get on. Counts are since the client was made."""

    state: HealthState
    breaker: BreakerState
    breaker_share: float
    """The share of reads that the breaker lets through; other calls follow one stage behind."""
    seconds_since_answer: float | None
    """Since any reply of the server. None: there was none."""
    failures_in_a_row: int
    last_failure: str | None
    """What was wrong with the last try that failed."""
    calls: int
    """Tries that were sent, probes included."""
    failures: int
    """Tries without a reply, or with one that shows the server to be in trouble."""
    retries: int
    given_up: int
    """Requests that were not tried again although they had failed."""
    cached_resources_age_seconds: float | None
    """How old the resources were that were last read from the disk, because the server was out of reach. None: those
    read last came from the server."""
    spool: SpoolReport | None
    """None: this client has no spool, or has not needed it yet."""


class Health:
    """Gathers what happens. Safe from any thread.

    Args:
        server: the server's address, for log lines.
        monotonic: seconds since some moment.
    """

    def __init__(self, server: str, monotonic: Callable[[], float]) -> None:
        self._server = server
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._breaker = BreakerState.CLOSED
        self._answered_at: float | None = None
        self._failing_since: float | None = None
        self._in_a_row = 0
        self._last_failure: str | None = None
        self._calls = 0
        self._failures = 0
        self._well_answered = 0
        self._retries = 0
        self._given_up = 0
        self._cached_resources_age: float | None = None

    def answered(self, status: int) -> None:
        """A try brought a reply."""
        with self._lock:
            now = self._monotonic()
            self._calls += 1
            self._answered_at = now
            if status in TROUBLE:
                self._fail(now, f"status {status}")
                return
            self._in_a_row = 0
            self._well_answered += 1
            since, self._failing_since = self._failing_since, None
        if since is not None:
            _logger.info("%s answers again, after %.1f s", self._server, now - since)

    def answers(self) -> int:
        """How many tries brought a reply that does not show the server to be in trouble."""
        return self._well_answered

    def unanswered(self, why: str) -> None:
        """A try brought none."""
        with self._lock:
            self._calls += 1
            self._fail(self._monotonic(), why)

    def retried(self, request: WireRequest, why: str, delay_seconds: float) -> None:
        """A request is sent again after this delay."""
        with self._lock:
            self._retries += 1
        _logger.debug(
            "%s %s is sent to %s again in %.2f s: %s", request.method, request.target, self._server, delay_seconds, why
        )

    def gave_up(self, request: WireRequest, why: str) -> None:
        """A request is not sent again."""
        with self._lock:
            self._given_up += 1
        _logger.debug("%s %s to %s was given up: %s", request.method, request.target, self._server, why)

    def breaker_changed(self, before: BreakerState, after: BreakerState) -> None:
        """The breaker is in another state."""
        self._breaker = after
        if after is BreakerState.OPEN and before is BreakerState.CLOSED:
            _logger.warning("too many calls to %s fail; they are held back until it is well", self._server)
        elif after is BreakerState.CLOSED:
            _logger.info("%s is well again; all calls pass", self._server)
        else:
            _logger.debug("circuit breaker for %s: %s, then %s", self._server, before, after)

    def cached_resources(self, age_seconds: float | None) -> None:
        """Resources were read from the disk, where they have this age; or from the server (None)."""
        if age_seconds is not None and self._cached_resources_age is None:
            _logger.warning(
                "%s is out of reach: resources come from this machine's disk, %.0f s old", self._server, age_seconds
            )
        self._cached_resources_age = age_seconds

    def report(self, breaker_share: float, spool: SpoolReport | None) -> HealthReport:
        """Everything known now. Arguments: what breaker and spool say of themselves."""
        with self._lock:
            now = self._monotonic()
            return HealthReport(
                state=self._state(),
                breaker=self._breaker,
                breaker_share=breaker_share,
                seconds_since_answer=None if self._answered_at is None else now - self._answered_at,
                failures_in_a_row=self._in_a_row,
                last_failure=self._last_failure,
                calls=self._calls,
                failures=self._failures,
                retries=self._retries,
                given_up=self._given_up,
                cached_resources_age_seconds=self._cached_resources_age,
                spool=spool,
            )

    def _state(self) -> HealthState:
        if self._calls == 0:
            return "unknown"
        if self._breaker in (BreakerState.OPEN, BreakerState.PROBING) or self._in_a_row >= _UNREACHABLE_AFTER:
            return "unreachable"
        if self._in_a_row or self._breaker is BreakerState.RETURNING:
            return "degraded"
        return "healthy"

    def _fail(self, now: float, why: str) -> None:
        self._failures += 1
        self._in_a_row += 1
        self._last_failure = why
        if self._failing_since is None:
            self._failing_since = now
            _logger.warning("%s does not answer as it should: %s", self._server, why)


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
