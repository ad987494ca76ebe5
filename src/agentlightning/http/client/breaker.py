"""The circuit breaker: a server in trouble is left alone until it is well, and then not overrun.

closed → open: too large a share of the calls in a sliding window failed.
open → probing: the pause is over; one call is let through.
probing → open (a longer pause) or returning, as that call ends.
returning → open, or one stage further: 10, 25, 50 % of the calls, then closed again. Reads go first and the
others follow one stage behind, so that the calls which matter least find out how the server is.
Vital calls (heartbeats, completions, aborts) pass in every state, out of a small budget of their own; one that
succeeds ends the pause.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from agentlightning.http.routes import Priority

_SLOTS = 10


class FailureWindow:
    """Counts of calls and failures over a sliding window, kept in ten slots of it.

    Args:
        seconds: the length of the window.
    """

    def __init__(self, seconds: float) -> None:
        self._slot_seconds = seconds / _SLOTS
        self._slots: dict[int, list[int]] = {}

    def add(self, now: float, *, ok: bool) -> None:
        """A call ended at ``now``, monotonic seconds."""
        number = int(now / self._slot_seconds)
        slot = self._slots.get(number)
        if slot is None:
            self._forget(number)
            slot = self._slots[number] = [0, 0]
        slot[0] += 1
        slot[1] += not ok

    def totals(self, now: float) -> tuple[int, int]:
        """(calls, failures) in the window that ends at ``now``."""
        self._forget(int(now / self._slot_seconds))
        return sum(calls for calls, _ in self._slots.values()), sum(failed for _, failed in self._slots.values())

    def clear(self) -> None:
        """Forget all calls."""
        self._slots.clear()

    def _forget(self, newest: int) -> None:
        for number in [number for number in self._slots if number <= newest - _SLOTS]:
            del self._slots[number]


_VITAL: frozenset[Priority] = frozenset({"heartbeat", "completion"})
_SHARES = (0.10, 0.25, 0.50)
_STAGE_MIN_CALLS = 3
_ASK_AGAIN_SECONDS = 0.1
_PROBE_SECONDS = 2.0
"""A call that probes may be one that the server sits on; after this time another one may find out sooner."""


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
    stage_seconds: float = 1.0
    """A stage of the recovery ends after this time or after ``stage_calls``."""
    stage_calls: int = 10
    """Successful calls that end a stage."""
    vital_per_second: float = 2.0
    """Vital calls that pass while it is not closed."""
    vital_burst: float = 10.0


class Breaker:
    """Decides which calls pass. Safe from any thread; never waits.

    Args:
        numbers: when to open and how to close.
        monotonic: seconds since some moment.
        random: a number from 0 up to 1, to spread the ends of pauses.
        on_change: hears of each new state, and what it is after; called under the breaker's lock, so it must be quick.
    """

    def __init__(
        self,
        numbers: BreakerNumbers,
        monotonic: Callable[[], float],
        random: Callable[[], float],
        on_change: Callable[[BreakerState, BreakerState], None],
    ) -> None:
        self._numbers = numbers
        self._monotonic = monotonic
        self._random = random
        self._on_change = on_change
        self._lock = threading.Lock()
        self.state = BreakerState.CLOSED
        """The state after the last call."""
        self._window = FailureWindow(numbers.window_seconds)
        self._pauses = 0
        self._until = 0.0
        self._probe_until = 0.0
        self._stage = 0
        self._let_reads = 0.0
        self._let_others = 0.0
        self._vital_tokens = numbers.vital_burst
        self._vital_at = 0.0

    @property
    def share(self) -> float:
        """The share of reads that pass now."""
        with self._lock:
            if self.state is BreakerState.CLOSED:
                return 1.0
            return _SHARES[self._stage] if self.state is BreakerState.RETURNING else 0.0

    def admit(self, priority: Priority) -> float:
        """0 if a call may pass: then tell how it ended. Otherwise the seconds after which to ask again."""
        if self.state is BreakerState.CLOSED:
            return 0.0
        with self._lock:
            now = self._monotonic()
            if priority in _VITAL:
                return self._spend_vital(now)
            if self.state is BreakerState.OPEN and now >= self._until:
                self._enter(BreakerState.PROBING)
            if self.state is BreakerState.OPEN:
                return max(self._until - now, 0.001)
            if self.state is BreakerState.PROBING:
                if now < self._probe_until:
                    return _ASK_AGAIN_SECONDS
                self._probe_until = now + _PROBE_SECONDS
                return 0.0
            self._advance(now)
            return self._let_share(priority)

    def succeeded(self) -> None:
        """A call that was let through got an answer."""
        with self._lock:
            now = self._monotonic()
            self._window.add(now, ok=True)
            if self.state is BreakerState.RETURNING:
                self._advance(now)
            elif self.state is not BreakerState.CLOSED:
                self._begin_return(now)

    def failed(self) -> None:
        """A call that was let through got no answer, or one that shows the server to be in trouble."""
        with self._lock:
            now = self._monotonic()
            self._window.add(now, ok=False)
            match self.state:
                case BreakerState.PROBING:
                    self._open(now)
                case BreakerState.CLOSED if self._too_many(now, self._numbers.min_calls):
                    self._open(now)
                case BreakerState.RETURNING if self._too_many(now, _STAGE_MIN_CALLS):
                    self._open(now)
                case _:
                    pass

    def abandoned(self) -> None:
        """A call that was let through was given up by its caller; it says nothing about the server."""
        with self._lock:
            self._probe_until = 0.0

    def _too_many(self, now: float, min_calls: int) -> bool:
        calls, failures = self._window.totals(now)
        return calls >= min_calls and failures >= calls * self._numbers.failure_rate

    def _spend_vital(self, now: float) -> float:
        if self.state is BreakerState.CLOSED:
            return 0.0
        numbers = self._numbers
        self._vital_tokens = min(
            numbers.vital_burst, self._vital_tokens + (now - self._vital_at) * numbers.vital_per_second
        )
        self._vital_at = now
        if self._vital_tokens < 1:
            return (1 - self._vital_tokens) / numbers.vital_per_second
        self._vital_tokens -= 1
        return 0.0

    def _let_share(self, priority: Priority) -> float:
        """Let the share of this stage through, evenly spread over the calls."""
        if self.state is BreakerState.CLOSED:
            return 0.0
        if priority == "read":
            self._let_reads, passes = _spread(self._let_reads, _SHARES[self._stage])
        else:
            self._let_others, passes = _spread(self._let_others, _SHARES[self._stage - 1] if self._stage else 0.0)
        return 0.0 if passes else _ASK_AGAIN_SECONDS * (0.5 + self._random())

    def _open(self, now: float) -> None:
        numbers = self._numbers
        pause = min(numbers.max_open_seconds, numbers.open_seconds * 2.0 ** min(self._pauses, 60))
        self._pauses += 1
        self._until = now + pause * (0.75 + 0.25 * self._random())
        if self.state is BreakerState.CLOSED:
            self._vital_tokens, self._vital_at = numbers.vital_burst, now
        self._enter(BreakerState.OPEN)

    def _begin_return(self, now: float) -> None:
        self._stage = 0
        self._begin_stage(now)
        self._enter(BreakerState.RETURNING)

    def _begin_stage(self, now: float) -> None:
        self._until = now + self._numbers.stage_seconds
        self._window.clear()
        self._let_reads = self._let_others = 1.0  # the first of a share passes at once

    def _advance(self, now: float) -> None:
        """Go on to the next stage if this one has gone well for long enough."""
        calls, failures = self._window.totals(now)
        if now < self._until and calls - failures < self._numbers.stage_calls:
            return
        self._stage += 1
        self._begin_stage(now)
        if self._stage == len(_SHARES):
            self._stage = 0
            self._pauses = 0
            self._enter(BreakerState.CLOSED)

    def _enter(self, state: BreakerState) -> None:
        before, self.state = self.state, state
        self._probe_until = 0.0
        self._on_change(before, state)


def _spread(saved: float, share: float) -> tuple[float, bool]:
    """Whether the next of many calls is among the share that passes, and what is saved up for those after it."""
    if share == 0.0:
        return saved, False
    return (saved - 1.0 + share, True) if saved > 1.0 - share / 2 else (saved + share, False)
