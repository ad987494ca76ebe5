"""What a client knows of its server, and the circuit breaker that follows from it.

closed → open: too large a share of the calls in a sliding window failed.
open → probing: the pause is over; one call is let through.
probing → open (a longer pause) or returning, as that call ends.
returning → open, if too many of the trial calls fail; or closed, after enough successes. Each success lets two more
calls through, as in the slow start of TCP (RFC 5681, section 3.1). At first these are reads only, so that the calls
which matter least find out how the server is.
Vital calls (heartbeats, completions, aborts) pass in every state, out of a small budget of their own; one that
succeeds ends the pause.
"""

from __future__ import annotations

import logging
import statistics
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

from agentlightning.http.client.transport import WireRequest
from agentlightning.http.routes import Priority

_logger = logging.getLogger(__name__)

HealthState = Literal["unknown", "healthy", "degraded", "unreachable"]
"""``unknown``: not called yet; ``degraded``: the last call failed, calls are let through by and by again, or the score
is low, because calls fail or are answered slowly; ``unreachable``: the breaker is open, or several calls in a row
failed."""

_UNREACHABLE_AFTER = 3
_TROUBLE = frozenset({500, 502, 503, 504})
"""What a server in trouble answers. 429 and 507 come from a server that is well and says what it lacks."""
_VITAL: frozenset[Priority] = frozenset({"heartbeat", "completion"})
_SLOTS = 10
_TRIAL_MIN_CALLS = 3
_ASK_AGAIN_SECONDS = 0.1
_PROBE_SECONDS = 2.0
"""A call that probes may be one that the server sits on; after this time another one may find out sooner."""

_FAST_SECONDS = 0.5
_TOLERATED = 4
"""An answer within so many times the fast seconds counts half."""
_HEALTHY_SCORE = 0.85
"""From here on the standard calls it good."""
_SCORED_TRIES, _SCORED_SECONDS, _LEAST_TRIES = 20, 60.0, 5


class BreakerState(StrEnum):
    """Whether calls pass."""

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"
    RETURNING = "returning"


class BreakerNumbers(NamedTuple):
    """When the breaker opens and how it closes again."""

    failure_rate: float = 0.30
    """The share of failed calls at which it opens."""
    window_seconds: float = 10.0
    """The calls that count."""
    min_calls: int = 10
    """With fewer calls in the window it stays closed."""
    open_seconds: float = 1.0
    """The first pause; it doubles each time the server turns out not to be well."""
    max_open_seconds: float = 15.0
    reads_first_seconds: float = 1.0
    """How long only reads are let through after a probe has succeeded."""
    trial_calls: int = 10
    """Successful calls after the probe that close it."""
    vital_per_second: float = 2.0
    """Vital calls that pass while it is not closed."""
    vital_burst: float = 10.0


@dataclass(frozen=True, slots=True)
class SpoolReport:
    """Spans that wait on this machine's disk. Counts are of this client."""

    waiting_spans: int = 0
    waiting_bytes: int = 0
    spooled: int = 0
    """Spans that were written to the disk."""
    delivered: int = 0
    """Spans that the server has taken from it, those of dead runners included."""
    refused: int = 0
    """Spans that the server refused for good; they are in the quarantine file, as far as there is room."""
    discarded: int = 0
    """Those for which there was none."""
    pushed_back: int = 0
    """Calls that had to wait, or failed, because there was no room."""
    adopted: int = 0
    """Spools of dead processes that were taken over."""


@dataclass(frozen=True, slots=True)
class HealthReport:
    """How a client and its server get on. Counts are since the client was made."""

    state: HealthState
    breaker: BreakerState
    breaker_share: float
    """0 while the breaker holds calls back, 1 while it is closed; in between, the share of the trial calls that have
    succeeded."""
    score: float | None
    """How well the last tries went, from 0 to 1: up to 20 of the last minute. None: there were fewer than 5. It is
    Apdex (www.apdex.org): an answer within half a second counts 1, one within two seconds a half, a later one and a
    failure nothing. Below 0.85 the state is ``degraded``."""
    response_seconds: float | None
    """The median time of the answers among them, without those that had a reason to take long."""
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


class FailureWindow:
    """Counts of calls and failures over a sliding window, kept in ten slots of it.

    Args:
        seconds: the length of the window.
    """

    def __init__(self, seconds: float) -> None:
        self._slot_seconds = seconds / _SLOTS
        self._slots: deque[list[int]] = deque(maxlen=_SLOTS)

    def add(self, now: float, *, ok: bool) -> None:
        """A call ended at ``now``, monotonic seconds."""
        number = int(now / self._slot_seconds)
        if not self._slots or self._slots[-1][0] != number:
            self._slots.append([number, 0, 0])
        slot = self._slots[-1]
        slot[1] += 1
        slot[2] += not ok

    def totals(self, now: float) -> tuple[int, int]:
        """(calls, failures) in the window that ends at ``now``."""
        oldest = int(now / self._slot_seconds) - _SLOTS
        recent = [slot for slot in self._slots if slot[0] > oldest]
        return sum(slot[1] for slot in recent), sum(slot[2] for slot in recent)

    def clear(self) -> None:
        """Forget all calls."""
        self._slots.clear()


class RecentTries:
    """How well the last tries went, by success and by time; see ``HealthReport.score``.

    Args:
        fast_seconds: an answer within this time is good.
    """

    def __init__(self, fast_seconds: float) -> None:
        self.fast_seconds = fast_seconds
        """An answer within this time is good."""
        self._tries: deque[tuple[float, float, float | None]] = deque(maxlen=_SCORED_TRIES)
        """When each ended, what it counts, and how long it took."""

    def add(self, now: float, seconds: float | None, *, ok: bool) -> bool:
        """A try ended at ``now``, monotonic seconds. ``seconds``: how long it took; None: that says nothing. Returns
        whether it was good."""
        counts = float(ok)
        if seconds is not None and seconds > self.fast_seconds:
            counts *= 0.5 if seconds <= _TOLERATED * self.fast_seconds else 0.0
        self._tries.append((now, counts, seconds if ok else None))
        return counts == 1.0

    def summary(self, now: float) -> tuple[float | None, float | None]:
        """(score, median response time) of those that ended in the last minute."""
        recent = [each for each in self._tries if each[0] > now - _SCORED_SECONDS]
        if len(recent) < _LEAST_TRIES:
            return None, None
        times = [seconds for _, _, seconds in recent if seconds is not None]
        return statistics.fmean(counts for _, counts, _ in recent), statistics.median(times) if times else None


class Health:
    """Gathers what happens, and decides which calls pass. Safe from any thread; never waits.

    Args:
        server: the server's address, for log lines.
        numbers: when the breaker opens and how it closes.
        monotonic: seconds since some moment.
        random: a number from 0 up to 1, to spread the ends of pauses.
        fast_seconds: an answer within this time is good.
    """

    def __init__(
        self,
        server: str,
        numbers: BreakerNumbers,
        monotonic: Callable[[], float],
        random: Callable[[], float],
        fast_seconds: float = _FAST_SECONDS,
    ) -> None:
        self._server = server
        self._numbers = numbers
        self._monotonic = monotonic
        self._random = random
        self._lock = threading.Lock()
        self.breaker = BreakerState.CLOSED
        """The state after the last call."""
        self.well_answered = 0
        """How many tries brought a reply that does not show the server to be in trouble."""
        self._window = FailureWindow(numbers.window_seconds)
        self._recent = RecentTries(fast_seconds)
        self._is_slow = False
        self._pauses = 0
        self._until = 0.0
        self._permits = 0
        self._renew_at = 0.0
        self._successes = 0
        self._vital_tokens = numbers.vital_burst
        self._vital_at = 0.0
        self._answered_at: float | None = None
        self._failing_since: float | None = None
        self._in_a_row = 0
        self._last_failure: str | None = None
        self._calls = 0
        self._failures = 0
        self._retries = 0
        self._given_up = 0
        self._cached_resources_age: float | None = None

    # --- Which calls pass ------------------------------------------------------------------------

    def admit(self, priority: Priority) -> float:
        """0 if a call may pass: then tell how it ended. Otherwise the seconds after which to ask again."""
        with self._lock:
            now = self._monotonic()
            if self.breaker is BreakerState.CLOSED:
                return 0.0
            if priority in _VITAL:
                return self._admit_vital(now)
            if self.breaker is BreakerState.OPEN:
                if now < self._until:
                    return self._until - now
                self._permits = 1
                self._enter(BreakerState.PROBING)
            if now >= self._renew_at:
                self._permits = max(self._permits, 1)
            only_reads = self.breaker is BreakerState.RETURNING and now < self._until
            if self._permits < 1 or (only_reads and priority != "read"):
                return _ASK_AGAIN_SECONDS * (0.5 + self._random())
            self._permits -= 1
            self._renew_at = now + _PROBE_SECONDS
            return 0.0

    def abandoned(self, priority: Priority) -> None:
        """A call that ``admit`` let through was given up by its caller; it says nothing about the server."""
        with self._lock:
            self._permits += priority not in _VITAL

    def _admit_vital(self, now: float) -> float:
        numbers = self._numbers
        earned = (now - self._vital_at) * numbers.vital_per_second
        self._vital_tokens = min(numbers.vital_burst, self._vital_tokens + earned)
        self._vital_at = now
        if self._vital_tokens < 1:
            return (1 - self._vital_tokens) / numbers.vital_per_second
        self._vital_tokens -= 1
        return 0.0

    def _recover(self, now: float) -> None:
        """A call has succeeded, and the breaker is not closed."""
        if self.breaker is not BreakerState.RETURNING:
            self._until = now + self._numbers.reads_first_seconds
            self._window.clear()
            self._permits = self._successes = 0
            self._enter(BreakerState.RETURNING)
        else:
            self._successes += 1
        self._permits += 2
        if self._successes >= self._numbers.trial_calls:
            self._pauses = 0
            self._enter(BreakerState.CLOSED)

    def _open_if_needed(self, now: float) -> None:
        """A call has failed."""
        numbers = self._numbers
        if self.breaker is not BreakerState.PROBING:
            calls, failures = self._window.totals(now)
            enough = numbers.min_calls if self.breaker is BreakerState.CLOSED else _TRIAL_MIN_CALLS
            if self.breaker is BreakerState.OPEN or calls < enough or failures < calls * numbers.failure_rate:
                return
        pause = min(numbers.max_open_seconds, numbers.open_seconds * 2.0 ** min(self._pauses, 60))
        self._pauses += 1
        self._until = now + pause * (0.75 + 0.25 * self._random())
        if self.breaker is BreakerState.CLOSED:
            self._vital_tokens, self._vital_at = numbers.vital_burst, now
        self._enter(BreakerState.OPEN)

    def _enter(self, state: BreakerState) -> None:
        before, self.breaker = self.breaker, state
        if state is BreakerState.OPEN and before is BreakerState.CLOSED:
            _logger.warning("too many calls to %s fail; they are held back until it is well", self._server)
        elif state is BreakerState.CLOSED:
            _logger.info("%s is well again; all calls pass", self._server)
        else:
            _logger.debug("circuit breaker for %s: %s, then %s", self._server, before, state)

    # --- What happens ----------------------------------------------------------------------------

    def answered(self, status: int, seconds: float | None = None, *, guarded: bool = True) -> None:
        """A try brought a reply.

        Args:
            status: of HTTP.
            seconds: how long it took; None: it had a reason to take long.
            guarded: the breaker had a say in it, and learns from it.
        """
        with self._lock:
            now = self._answered_at = self._monotonic()
            if status in _TROUBLE:
                self._fail(now, f"status {status}", guarded)
                return
            self._calls += 1
            self._in_a_row = 0
            self.well_answered += 1
            is_good = self._recent.add(now, seconds, ok=True)
            since, self._failing_since = self._failing_since, None
            if since is not None:
                _logger.info("%s answers again, after %.1f s", self._server, now - since)
            if guarded:
                self._window.add(now, ok=True)
                if self.breaker is not BreakerState.CLOSED:
                    self._recover(now)
            if self._is_slow or not is_good:  # a good answer makes nobody slow
                self._tell_of_slowness(now)

    def _tell_of_slowness(self, now: float) -> None:
        """Log when answers begin to be slow, and when they are fast again."""
        score, median = self._recent.summary(now)
        if median is None or score is None:
            return
        is_slow = score < _HEALTHY_SCORE and median > self._recent.fast_seconds  # of failures other lines tell
        if is_slow == self._is_slow:
            return
        self._is_slow = is_slow
        level, how = (logging.WARNING, "slowly") if is_slow else (logging.INFO, "in time again")
        _logger.log(level, "%s answers %s: after %.1f s (median), score %.2f", self._server, how, median, score)

    def unanswered(self, why: str, *, guarded: bool = True) -> None:
        """A try brought none. ``guarded``: see ``answered``."""
        with self._lock:
            self._fail(self._monotonic(), why, guarded)

    def _fail(self, now: float, why: str, guarded: bool) -> None:
        self._calls += 1
        self._failures += 1
        self._in_a_row += 1
        self._recent.add(now, None, ok=False)
        self._last_failure = why
        if self._failing_since is None:
            self._failing_since = now
            _logger.warning("%s does not answer as it should: %s", self._server, why)
        if guarded:
            self._window.add(now, ok=False)
            self._open_if_needed(now)

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

    def cached_resources(self, age_seconds: float | None) -> None:
        """Resources were read from the disk, where they have this age; or from the server (None)."""
        if age_seconds is not None and self._cached_resources_age is None:
            _logger.warning(
                "%s is out of reach: resources come from this machine's disk, %.0f s old", self._server, age_seconds
            )
        self._cached_resources_age = age_seconds

    def report(self, spool: SpoolReport | None = None) -> HealthReport:
        """Everything known now, with what the spool says of itself."""
        with self._lock:
            share = float(self.breaker is BreakerState.CLOSED)
            if self.breaker is BreakerState.RETURNING:
                share = self._successes / self._numbers.trial_calls
            now = self._monotonic()
            score, response_seconds = self._recent.summary(now)
            return HealthReport(
                state=self._state(score),
                breaker=self.breaker,
                breaker_share=share,
                score=score,
                response_seconds=response_seconds,
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

    def _state(self, score: float | None) -> HealthState:
        if self._calls == 0:
            return "unknown"
        if self.breaker in (BreakerState.OPEN, BreakerState.PROBING) or self._in_a_row >= _UNREACHABLE_AFTER:
            return "unreachable"
        is_poor = score is not None and score < _HEALTHY_SCORE
        return "degraded" if self._in_a_row or is_poor or self.breaker is BreakerState.RETURNING else "healthy"
