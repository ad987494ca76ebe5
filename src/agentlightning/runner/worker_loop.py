"""A worker's shift: claims rollouts until it is told to end."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from agentlightning.errors import (
    AgentLightningError,
    BadRequest,
    InvalidValue,
    NotAllowed,
    NotAuthenticated,
    NotFound,
    StoreClosed,
    StoreForked,
    StoreUnavailable,
    StoreUnreachable,
)
from agentlightning.runner.attempt import ABORTED, AttemptRun, Outcome, Stage
from agentlightning.runner.heartbeat import Directive, Heart
from agentlightning.types import AttemptedRollout

CLAIM_SECONDS = 30.0
"""How long one claim waits for a rollout. Longer makes nothing quicker, since a waiting claim ends with the first."""
GRACE_SECONDS = 5.0
"""How long agents that were told to stop may take to do so."""
GOODBYE_SECONDS = 2.0
FIRST_BEAT_SECONDS = 5.0
"""How long the first claim waits until the store knows the worker, which takes back what it was asked before."""

_FOR_GOOD = (BadRequest, InvalidValue, NotAllowed, NotAuthenticated, StoreClosed, StoreForked)
"""What the store says to a claim that it will say to the next one, too."""

_A = TypeVar("_A")
_logger = logging.getLogger(__name__)


class ShiftSettings(NamedTuple):
    """How a worker works."""

    concurrency: int
    max_rollouts: int | None
    poll_seconds: float
    """Between two claims when the store could not be asked, or does not wait by itself."""
    unreachable_seconds: float | None
    """How long it may be that the store cannot be asked."""


class Shift:
    """One run of a worker.

    Args:
        stage: with whom.
        heart: tells the store of the worker.
        worker_id: the worker's name.
        settings: how.
        stopped: set when nothing new shall be begun.
    """

    def __init__(
        self, stage: Stage, heart: Heart, worker_id: str, settings: ShiftSettings, stopped: asyncio.Event
    ) -> None:
        self._stage = stage
        self._heart = heart
        self._worker_id = worker_id
        self._settings = settings
        self._ending = stopped
        self._gave_up = asyncio.Event()
        self._runs: dict[str, AttemptRun] = {}
        self._tasks: set[asyncio.Task[Outcome]] = set()
        self._begun = 0
        self._claim_left = False
        self._unasked_since: float | None = None

    async def work(self) -> None:
        """Claim and run until the end. Raises as ``LitAgentRunner.iter``."""
        loop = asyncio.get_running_loop()
        self._heart.on_stale = _from_thread(loop, self._lose)
        self._heart.on_directive = _from_thread(loop, self._obey)
        ending = asyncio.create_task(self._ending.wait())
        try:
            await _first(asyncio.wrap_future(self._heart.first_beat), ending, FIRST_BEAT_SECONDS)
            while not self._ending.is_set() and (room := self._room()) is not None:
                if room == 0:
                    await asyncio.wait([*self._tasks, ending], return_when=asyncio.FIRST_COMPLETED)
                else:
                    await self._claim_and_begin(room, ending)
            await self._finish()
        except asyncio.CancelledError:
            self._give_up_all("the runner was interrupted")
            await self._let_them_end()
            raise
        finally:
            self._heart.on_stale = self._heart.on_directive = None
            ending.cancel()
            await self._say_goodbye()

    def _room(self) -> int | None:
        """How many rollouts may be begun now; None: there will be no more."""
        most = self._settings.max_rollouts
        left = self._settings.concurrency if most is None else most - self._begun
        if left <= 0:
            return None
        return min(left, self._settings.concurrency - len(self._tasks))

    # --- Claims ----------------------------------------------------------------------------------

    async def _claim_and_begin(self, room: int, ending: asyncio.Task[Any]) -> None:
        caught_up = self._heart.caught_up()
        if caught_up is not None:  # else it might claim anew what it has had all along
            await _first(asyncio.wrap_future(caught_up), ending, FIRST_BEAT_SECONDS)
        asked = time.monotonic()
        claimed = await self._claim(room, ending)
        for rollout in claimed:
            self._begin(rollout)
        if not claimed and not self._ending.is_set():
            self._heart.beat_now()  # the reply says whether there is a reason for it
            await self._pause(self._settings.poll_seconds - (time.monotonic() - asked), ending)

    async def _claim(self, room: int, ending: asyncio.Task[Any]) -> Sequence[AttemptedRollout]:
        """Claim up to ``room`` rollouts. A claim whose reply was lost is repeated under its old name."""
        request_id = uuid.uuid4().hex
        while not self._ending.is_set():
            claim = asyncio.ensure_future(
                self._stage.store.dequeue_many_rollouts(
                    limit=room, worker_id=self._worker_id, request_id=request_id, wait_seconds=CLAIM_SECONDS
                )
            )
            try:
                if not await _first(claim, ending):
                    self._claim_left = True
                    return []
                claimed = claim.result()
                self._unasked_since = None
                return claimed
            except _FOR_GOOD:
                raise
            except (AgentLightningError, OSError, TimeoutError) as error:
                self._check_patience(error)
                await self._pause(self._settings.poll_seconds, ending)
            finally:
                claim.cancel()
        return []

    def _check_patience(self, error: Exception) -> None:
        """Note that the store could not be asked.

        Raises:
            StoreUnreachable: it has been so for too long.
        """
        now, limit = time.monotonic(), self._settings.unreachable_seconds
        if self._unasked_since is None:
            self._unasked_since = now
            _logger.warning("no rollouts can be claimed, and it is tried again: %s: %s", type(error).__name__, error)
        if limit is not None and now - self._unasked_since >= limit:
            raise StoreUnreachable(f"the store could not be asked for {limit:g} s, the last time: {error}") from error

    async def _pause(self, seconds: float, ending: asyncio.Task[Any]) -> None:
        if seconds > 0:
            await asyncio.wait([ending], timeout=seconds)

    # --- Rollouts --------------------------------------------------------------------------------

    def _begin(self, rollout: AttemptedRollout) -> None:
        run = AttemptRun(self._stage, rollout)
        self._begun += 1
        self._heart.hold(rollout)
        task = asyncio.create_task(run.run(), name=rollout.rollout_id)
        self._runs[run.attempt_id] = run
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._end(run, done))

    def _end(self, run: AttemptRun, task: asyncio.Task[Outcome]) -> None:
        self._heart.release(run.attempt_id)
        self._runs.pop(run.attempt_id, None)
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("attempt %s could not be carried out", run.attempt_id, exc_info=error)

    def _lose(self, attempt_id: str) -> None:
        """The store says that this attempt is lost: give up that one only."""
        run = self._runs.get(attempt_id)
        # One that is just being reported has ended for the store, too, and is named here for no other reason.
        if run is not None and run.give_up(Outcome("failed", ABORTED, "the attempt had lost its rollout")):
            _logger.warning("attempt %s has lost its rollout; it is given up", attempt_id)

    def _obey(self, directive: Directive) -> None:
        """The store asks the worker to end."""
        if not self._ending.is_set():
            _logger.info("worker %s is asked to %s", self._worker_id, directive)
        self._ending.set()
        if directive == "stop":
            self._give_up_all("the worker was asked to stop")

    def _give_up_all(self, message: str) -> None:
        self._gave_up.set()
        for run in list(self._runs.values()):
            run.give_up(Outcome("failed", ABORTED, message))

    async def _finish(self) -> None:
        """Wait for what is being worked on, unless it is given up."""
        giving_up = asyncio.create_task(self._gave_up.wait())
        while self._tasks and not self._gave_up.is_set():
            await asyncio.wait([*self._tasks, giving_up], return_when=asyncio.FIRST_COMPLETED)
        giving_up.cancel()
        if self._gave_up.is_set():
            await self._let_them_end()

    async def _let_them_end(self) -> None:
        """Wait until what was given up has been reported, or will not be."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=GRACE_SECONDS)
        for task in self._tasks:
            _logger.error("rollout %s does not stop; it is left behind", task.get_name())

    async def _say_goodbye(self) -> None:
        """Tell the store that this worker is gone, so that a claim it left is handed out at once to others."""
        if not self._claim_left or self._tasks:
            return
        message = "the runner ended while a claim of its was on the way"
        try:
            async with asyncio.timeout(GOODBYE_SECONDS):
                await self._stage.store.report_worker_lost(self._worker_id, message=message)
        except (StoreUnavailable, NotFound, NotImplementedError, OSError, TimeoutError) as error:
            _logger.info("the store was not told that worker %s is gone: %s", self._worker_id, error)


def _from_thread(loop: asyncio.AbstractEventLoop, function: Callable[[_A], None]) -> Callable[[_A], None]:
    """``function``, to be called from another thread, in the loop."""

    def call(argument: _A) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(function, argument)

    return call


async def _first(one: asyncio.Future[Any], other: asyncio.Future[Any], timeout: float | None = None) -> bool:
    """Whether ``one`` is done before ``other``, and within ``timeout`` seconds; if both are, it was ``one``."""
    await asyncio.wait([one, other], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    return one.done()
