"""Calls that wait on the server, cut into requests that a proxy between does not give up; and claims that get lost.

A claim whose reply is lost is repeated under its ``request_id`` by the next claim of the same worker, because the
server holds rollouts for it. A claim that the client gave an id itself is confirmed at once, because its caller does
not know that claims with an id have to be.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from agentlightning.errors import InvalidValue, NotFound, StaleAttempt, StoreUnavailable
from agentlightning.http.client.calls import Caller, plan_of
from agentlightning.store.queries import within
from agentlightning.store.validation import check_finite
from agentlightning.types import Attempt, AttemptedRollout, Rollout

_logger = logging.getLogger(__name__)

_DIRECTIVE_HEADER = "Agl-Directive"
_MOST_OPEN = 1000
LONGEST_SLICE_SECONDS = 20.0
"""How long one request may wait for something to happen; longer waits are made of several."""


def ended_early(slice_seconds: float, took_seconds: float) -> bool:
    """Whether the server answered before the time that it may wait was over: then it had a reason."""
    return took_seconds < 0.9 * slice_seconds


async def wait_in_slices(caller: Caller, rollout_ids: Sequence[str], timeout: float | None) -> list[Rollout]:
    """``wait_for_rollouts`` over HTTP. Each request asks only for the rollouts that have not ended yet."""
    wanted = within("rollout_id", rollout_ids)
    if wanted is None:
        raise InvalidValue("rollout_ids is None; give the ids of the rollouts to wait for")
    ids: list[str] = list(dict.fromkeys(wanted.value))
    started = time.monotonic()
    left = None if timeout is None else max(check_finite(timeout, "timeout"), 0.0)
    ended: dict[str, Rollout] = {}
    while True:
        slice_seconds = LONGEST_SLICE_SECONDS if left is None else min(left, LONGEST_SLICE_SECONDS)
        asked_at = time.monotonic()
        found: list[Rollout] = await caller.call(
            "wait_for_rollouts",
            {"rollout_ids": [each for each in ids if each not in ended], "timeout": slice_seconds},
            timeout_seconds=caller.timeout_seconds + slice_seconds,
            long_poll=slice_seconds > 0,
        )
        ended.update((rollout.rollout_id, rollout) for rollout in found)
        now = time.monotonic()
        if timeout is not None:
            left = max(timeout - (now - started), 0.0)
        # The server waits no longer than it must: if it did not wait, the missing ones are unknown to it.
        if len(ended) == len(ids) or left == 0.0 or ended_early(slice_seconds, now - asked_at):
            return [ended[each] for each in ids if each in ended]


class Claims:
    """Claims rollouts.

    Args:
        caller: makes the calls.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._open = OpenClaims()

    async def claim(
        self, limit: int, worker_id: str | None, request_id: str, wait_seconds: float
    ) -> Sequence[AttemptedRollout]:
        """Claim under this id, waiting in slices; ends early if the server says that there is a reason."""
        plan = plan_of("dequeue_many_rollouts")
        arguments = {"limit": limit, "worker_id": worker_id, "request_id": request_id}
        ends_at = time.monotonic() + max(check_finite(wait_seconds, "wait_seconds"), 0.0)
        while True:
            asked_at = time.monotonic()
            left = max(ends_at - asked_at, 0.0)
            slice_seconds = min(left, LONGEST_SLICE_SECONDS)
            request = self._caller.request(plan, {**arguments, "wait_seconds": slice_seconds})
            if slice_seconds > 0:
                request = request._replace(timeout_seconds=request.timeout_seconds + slice_seconds, long_poll=True)
            reply = await self._caller.send(request)
            claimed: list[AttemptedRollout] = plan.result(reply)
            # A claim that is replaced, or whose worker is asked to drain or stop, is answered before its time.
            early = _DIRECTIVE_HEADER in reply.headers or ended_early(slice_seconds, time.monotonic() - asked_at)
            if claimed or early or slice_seconds >= left:
                return claimed

    async def claim_and_confirm(
        self, limit: int, worker_id: str | None, wait_seconds: float
    ) -> Sequence[AttemptedRollout]:
        """Claim for a caller who gives no id: under one that was made up, or that had no answer before."""
        request_id = self._open.take(worker_id, limit) or self._caller.mint("rq-")
        answered = False
        try:
            claimed = await self.claim(limit, worker_id, request_id, wait_seconds)
            confirmed = await self.confirm_all(claimed)
            answered = True
        except InvalidValue:
            answered = True  # and will be refused again
            raise
        finally:
            if not answered:
                self._open.keep(worker_id, limit, request_id)
        return confirmed

    async def confirm_all(self, claimed: Sequence[AttemptedRollout]) -> list[AttemptedRollout]:
        """Tell the server that the reply to a claim has arrived; without those that were handed out again meanwhile."""
        confirmed = await asyncio.gather(*(self._confirm(each) for each in claimed))
        return [each for each in confirmed if each is not None]

    async def _confirm(self, claim: AttemptedRollout) -> AttemptedRollout | None:
        """Tell the server that the reply to a claim has arrived; None if the attempt is not its caller's any more."""
        ids = {"rollout_id": claim.rollout_id, "attempt_id": claim.attempt.attempt_id}
        try:
            attempt: Attempt = await self._caller.call("update_attempt", ids)
            claim.attempt = attempt
        except (NotFound, StaleAttempt):
            return None  # the reply came so late that the rollout was handed out again
        except StoreUnavailable as error:
            # It is the caller's, and its next sign of life confirms it; without one it is handed out again.
            _logger.debug("claim %s could not be confirmed: %s", claim.attempt.attempt_id, error.message)
        return claim


class OpenClaims:
    """Request ids of claims that were sent and not answered, by worker and limit. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids: dict[tuple[str | None, int], deque[str]] = {}

    def take(self, worker_id: str | None, limit: int) -> str | None:
        """The id of a claim like this one that had no answer; it is the caller's now."""
        with self._lock:
            key = (worker_id, limit)
            waiting = self._ids.get(key)
            if not waiting:
                return None
            taken = waiting.popleft()
            if not waiting:
                del self._ids[key]
            return taken

    def keep(self, worker_id: str | None, limit: int, request_id: str) -> None:
        """A claim had no answer. Of very many, the oldest are let go: the server hands their rollouts out again."""
        with self._lock:
            self._ids.setdefault((worker_id, limit), deque(maxlen=_MOST_OPEN)).append(request_id)
