"""A worker's loop: claims rollouts and works on them, until it is told to end.

Calls per rollout: one. ``finish_attempt`` carries the last spans of an attempt, its end, and the claim of the next
rollout. A claim of its own (a long poll) is made only while a slot is free and the queue is empty.

While agents are short, the worker also holds one rollout more than it has slots, so that an agent need not wait for
the claim. Such a prefetched rollout must not wait for a slow agent while another worker is idle: it is given back
(``release_attempt``) when it was not begun within ``PREFETCH_HOLD_SECONDS``, and at once when the worker ends. It is
not listed in heartbeats either, so if the worker is killed, the store hands it on after the claim's short lease.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from agentlightning.errors import (
    AgentLightningError,
    BadRequest,
    Conflict,
    InvalidValue,
    NotAllowed,
    NotAuthenticated,
    NotFound,
    StoreClosed,
    StoreForked,
    StoreUnavailable,
    StoreUnreachable,
)
from agentlightning.lifecycle import reasons
from agentlightning.runner.attempt import AttemptOutcome, AttemptParts, AttemptRun
from agentlightning.runner.heartbeat import Directive, Heartbeat
from agentlightning.store.base import LightningStore
from agentlightning.types import AttemptedRollout

CLAIM_SECONDS = 30.0
"""How long one claim waits for a rollout. It ends with the first rollout, so longer waits only save calls."""
GRACE_SECONDS = 5.0
"""How long agents that were told to stop may take to do so."""
DEREGISTER_SECONDS = 2.0
"""How long the end of a worker may take to give back what it holds."""
BEAT_SECONDS = 5.0
"""How long a claim waits for a heartbeat, after a time in which the store was not heard of."""

SHORT_SECONDS = 0.1
"""An agent that took at most so long counts as short."""
SHORT_RUNS = 4
"""A rollout is prefetched after so many consecutive short agents."""
PREFETCH_HOLD_SECONDS = 0.2
"""How long a prefetched rollout may wait for a free slot: far below a claim's confirmation lease (10 s)."""

_PERMANENT = (BadRequest, InvalidValue, NotAllowed, NotAuthenticated, StoreClosed, StoreForked)
"""Errors of a claim that the next claim would get, too."""

_A = TypeVar("_A")
_logger = logging.getLogger(__name__)


class WorkerSettings(NamedTuple):
    """How much a worker does, and how patient it is; see ``LitAgentRunner``."""

    concurrency: int
    max_rollouts: int | None
    poll_seconds: float  # pause between two claims when the store is unreachable, or does not wait by itself
    unreachable_seconds: float | None  # how long the store may be unreachable before the worker fails; None: for ever


class Prefetch:
    """The claimed rollouts of a worker that are not begun, and whether it may claim one more than it has slots.

    All times are seconds on one monotonic clock. ``allowed``: whether this worker may ever prefetch.
    """

    def __init__(self, *, allowed: bool) -> None:
        self._allowed = allowed
        self._short_runs = 0
        self._waiting: deque[tuple[AttemptedRollout, float]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def extra(self) -> int:
        """How many rollouts may be claimed beyond the free slots."""
        return 1 if self._allowed and self._short_runs >= SHORT_RUNS else 0

    def note_run(self, seconds: float) -> None:
        """An agent took so long. One slow agent ends prefetching until ``SHORT_RUNS`` short ones followed it."""
        self._short_runs = self._short_runs + 1 if seconds <= SHORT_SECONDS else 0

    def add(self, rollout: AttemptedRollout, now: float) -> None:
        """Hold a claimed rollout."""
        self._waiting.append((rollout, now))

    def take(self) -> AttemptedRollout:
        """The rollout that was claimed first, to be begun."""
        return self._waiting.popleft()[0]

    def overdue(self, now: float) -> list[AttemptedRollout]:
        """Take out the rollouts that were held for too long: the agents in the slots are slow."""
        overdue: list[AttemptedRollout] = []
        while self._waiting and now - self._waiting[0][1] >= PREFETCH_HOLD_SECONDS:
            overdue.append(self.take())
            self._short_runs = 0
        return overdue

    def clear(self) -> list[AttemptedRollout]:
        """Take out all."""
        waiting = [rollout for rollout, _ in self._waiting]
        self._waiting.clear()
        return waiting


class WorkerLoop:
    """One run of a worker. It begins nothing new once ``ending`` is set."""

    def __init__(
        self, parts: AttemptParts, heartbeat: Heartbeat, settings: WorkerSettings, ending: asyncio.Event
    ) -> None:
        self._parts = parts
        self._heartbeat = heartbeat
        self._worker_id = heartbeat.worker_id
        self._settings = settings
        self._ending = ending
        self._gave_up = False
        self._changed = asyncio.Event()
        """Set when a slot became free, a rollout was claimed, an attempt is reported, or the end begins."""
        self._runs: dict[str, AttemptRun] = {}
        """Attempts that are not reported yet, by id."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._working = 0
        """How many slots are taken: agents at work. An attempt that is only being reported takes none."""
        self._begun = 0
        self._prefetch = Prefetch(allowed=type(parts.store).release_attempt is not LightningStore.release_attempt)
        self._expected = 0
        """How many rollouts the claims and reports under way may bring."""
        self._queue_empty = True
        """Whether the last claim got less than it asked for."""
        self._releases: set[asyncio.Task[None]] = set()
        self._claim_abandoned = False
        self._unreachable_since: float | None = None
        self._context = contextvars.copy_context()

    async def work(self) -> None:
        """Claim and work until the end. Raises as ``LitAgentRunner.iter``."""
        loop = asyncio.get_running_loop()
        self._heartbeat.on_stale = partial(_call_in, loop, self._lose)
        self._heartbeat.on_directive = partial(_call_in, loop, self._follow)
        self._ended = asyncio.create_task(self._ending.wait())
        self._ended.add_done_callback(lambda _: self._stop_beginning())
        most = self._settings.max_rollouts
        try:
            await self._register()
            while not self._ending.is_set() and (most is None or self._begun < most):
                if self._room() > 0:
                    await self._claim_and_begin(self._room(self._prefetch.extra))
                else:
                    self._changed.clear()
                    await self._changed.wait()
            while self._tasks and not self._gave_up:  # agents at work and their reports
                self._changed.clear()
                await self._changed.wait()
            if self._gave_up:
                await self._wait_for_given_up()
        except asyncio.CancelledError:
            self._stop_beginning()
            self._give_up_all("the runner was interrupted")
            await self._wait_for_given_up()
            raise
        finally:
            self._heartbeat.on_stale = self._heartbeat.on_directive = None
            self._stop_beginning()
            self._ended.cancel()
            await self._deregister()

    async def _register(self) -> None:
        """Wait for the first heartbeat: the store would never notice the death of a worker that it does not know.

        Raises:
            StoreUnreachable: there was no answer for ``unreachable_seconds``.
        """
        patience = self._settings.unreachable_seconds
        known = await self._first(asyncio.wrap_future(self._heartbeat.first_beat), patience)
        if not known and not self._ending.is_set():
            raise StoreUnreachable(f"the store was unreachable for {patience:g} s: it answered no heartbeat")

    def _room(self, extra: int = 0) -> int:
        """How many rollouts may be claimed: for slots without one, neither begun nor held nor expected, and extra."""
        most = self._settings.max_rollouts
        held = len(self._prefetch) + self._expected
        room = self._settings.concurrency + extra - self._working - held
        return max(room if most is None else min(room, most - self._begun - held), 0)

    async def _first(self, one: asyncio.Future[Any], timeout: float | None = None) -> bool:
        """Whether ``one`` is done before the end begins, and within ``timeout`` seconds."""
        await asyncio.wait([one, self._ended], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        return one.done()

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            await asyncio.wait([self._ended], timeout=seconds)

    # --- Claims without a report -----------------------------------------------------------------

    async def _claim_and_begin(self, limit: int) -> None:
        if self._heartbeat.silent_too_long:  # the store may have to hear first what this worker still holds
            await self._first(asyncio.wrap_future(self._heartbeat.next_beat()), BEAT_SECONDS)
        clock = asyncio.get_running_loop().time
        asked = clock()
        self._expected += limit
        try:
            claimed = await self._claim(limit)
        finally:
            self._expected -= limit
        self._queue_empty = len(claimed) < limit
        self._accept(claimed)
        if not claimed and not self._ending.is_set():
            self._heartbeat.beat_now()  # the reply may say why there was nothing
            await self._pause(self._settings.poll_seconds - (clock() - asked))

    async def _claim(self, limit: int) -> Sequence[AttemptedRollout]:
        """Claim up to ``limit`` rollouts. A claim whose reply was lost is repeated under the same ``request_id``.

        Raises:
            StoreUnreachable: claims have failed for ``unreachable_seconds``.
        """
        request_id, patience = uuid.uuid4().hex, self._settings.unreachable_seconds
        while not self._ending.is_set():
            claim = asyncio.ensure_future(
                self._parts.store.dequeue_many_rollouts(
                    limit=limit, worker_id=self._worker_id, request_id=request_id, wait_seconds=CLAIM_SECONDS
                )
            )
            try:
                if not await self._first(claim):
                    self._claim_abandoned = True
                    return []
                claimed = claim.result()
                self._unreachable_since = None
                return claimed
            except _PERMANENT:
                raise
            except (AgentLightningError, OSError, TimeoutError) as error:
                now = asyncio.get_running_loop().time()
                if self._unreachable_since is None:
                    self._unreachable_since = now
                    _logger.warning("claiming failed and is retried: %s: %s", type(error).__name__, error)
                if patience is not None and now - self._unreachable_since >= patience:
                    message = f"the store was unreachable for {patience:g} s; the last error: {error}"
                    raise StoreUnreachable(message) from error
                await self._pause(self._settings.poll_seconds)
            finally:
                claim.cancel()
        return []

    # --- Claimed rollouts ------------------------------------------------------------------------

    def _accept(self, claimed: Sequence[AttemptedRollout]) -> None:
        """Begin claimed rollouts as slots are free, and hold the rest for a short time."""
        if self._ending.is_set():
            self._release(claimed)
            return
        loop = asyncio.get_running_loop()
        for rollout in claimed:
            self._prefetch.add(rollout, loop.time())
        self._begin_held()
        if self._prefetch:
            loop.call_later(PREFETCH_HOLD_SECONDS, self._release_overdue)

    def _begin_held(self) -> None:
        """Begin held rollouts while slots are free."""
        self._release_overdue()  # a suspended process may find that its claims have expired
        while self._prefetch and self._working < self._settings.concurrency and not self._ending.is_set():
            run = AttemptRun(self._parts, self._prefetch.take())
            self._begun += 1
            self._working += 1
            self._runs[run.attempt_id] = run
            self._heartbeat.begin(run.rollout)
            # A context of its own: what is called from here may run in the context of another rollout.
            task = asyncio.create_task(self._carry_out(run), name=run.rollout.rollout_id, context=self._context.copy())
            self._tasks.add(task)
            task.add_done_callback(self._note_end)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._changed.set()

    async def _carry_out(self, run: AttemptRun) -> None:
        """Work on one rollout and report it. Its slot is free, and the next rollout begins, before the report."""
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            try:
                outcome = await run.work()
            finally:
                self._working -= 1
            self._prefetch.note_run(clock() - began)
            self._heartbeat.reporting(run.attempt_id)
            self._begin_held()
            self._changed.set()
            self._accept(await self._report(run, outcome))
        except Exception:
            _logger.exception("attempt %s could not be reported", run.attempt_id)
        finally:
            self._runs.pop(run.attempt_id, None)
            self._heartbeat.end(run.attempt_id)

    async def _report(self, run: AttemptRun, outcome: AttemptOutcome) -> Sequence[AttemptedRollout]:
        """Report the end of an attempt, and claim with the same call unless the queue was empty just now."""
        idle = self._ending.is_set() or self._queue_empty or self._heartbeat.silent_too_long
        limit = 0 if idle else self._room(self._prefetch.extra)
        if limit == 0:
            return await run.report(outcome)
        self._expected += limit
        try:
            claimed = await run.report(outcome, claim_limit=limit, worker_id=self._worker_id)
        finally:
            self._expected -= limit
        self._queue_empty = len(claimed) < limit
        return claimed

    # --- Giving back -----------------------------------------------------------------------------

    def _release_overdue(self) -> None:
        self._release(self._prefetch.overdue(asyncio.get_running_loop().time()))

    def _stop_beginning(self) -> None:
        """Begin and claim nothing more, and give back at once what was claimed and not begun."""
        self._ending.set()
        self._release(self._prefetch.clear())
        self._changed.set()

    def _release(self, rollouts: Sequence[AttemptedRollout]) -> None:
        for rollout in rollouts:
            task = asyncio.create_task(self._release_one(rollout), context=self._context.copy())
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)

    async def _release_one(self, rollout: AttemptedRollout) -> None:
        attempt_id = rollout.attempt.attempt_id
        try:
            await self._parts.store.release_attempt(rollout.rollout_id, attempt_id)
        except (Conflict, NotFound) as error:
            _logger.info("attempt %s was not held any more: %s", attempt_id, error)
        except (AgentLightningError, OSError, TimeoutError) as error:
            # Its claim is unconfirmed, so the store hands the rollout on when the short lease of the claim ends.
            _logger.warning("attempt %s could not be given back: %s: %s", attempt_id, type(error).__name__, error)

    def _lose(self, attempt_id: str) -> None:
        """The store says that this attempt has lost its rollout: give up that one only."""
        run = self._runs.get(attempt_id)
        # An attempt that is just being reported has ended for the store as well, and may be named for that reason.
        if run is not None and run.give_up("the attempt had lost its rollout"):
            _logger.warning("attempt %s has lost its rollout; it is given up", attempt_id)

    def _follow(self, directive: Directive) -> None:
        """The store asks the worker to end."""
        if not self._ending.is_set():
            _logger.info("worker %s is asked to %s", self._worker_id, directive)
        self._stop_beginning()
        if directive == "stop":
            self._give_up_all("the worker was asked to stop")

    def _give_up_all(self, message: str) -> None:
        self._gave_up = True
        self._changed.set()
        for run in list(self._runs.values()):
            run.give_up(message)

    # --- The end ---------------------------------------------------------------------------------

    async def _wait_for_given_up(self) -> None:
        """Wait until the attempts that were given up are reported, or the grace period is over."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=GRACE_SECONDS)
        for task in self._tasks:
            _logger.error("rollout %s does not stop within %g s; it is left running", task.get_name(), GRACE_SECONDS)

    async def _deregister(self) -> None:
        """Give back what is left, so that others get it at once: held rollouts, and those of an abandoned claim."""
        if self._releases:
            await asyncio.wait(self._releases, timeout=DEREGISTER_SECONDS)
        if not self._claim_abandoned or self._tasks:
            return
        message = "the runner ended while a claim of its was under way"
        try:
            async with asyncio.timeout(DEREGISTER_SECONDS):
                await self._parts.store.report_worker_lost(
                    self._worker_id, message=message, reason_code=reasons.WORKER_LEFT
                )
        except (StoreUnavailable, NotFound, NotImplementedError, OSError, TimeoutError) as error:
            _logger.info("the store was not told that worker %s is gone: %s", self._worker_id, error)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[_A], None], argument: _A) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, argument)
