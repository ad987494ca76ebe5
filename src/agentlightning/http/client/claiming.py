"""Claims over a network: long ones in slices, lost ones repeated, those of callers who know nothing of it confirmed."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from agentlightning.errors import InvalidValue, NotFound, StaleAttempt, StoreUnavailable
from agentlightning.http.client.calls import Caller, given, result_of
from agentlightning.http.client.reads import LONGEST_SLICE_SECONDS, ended_early
from agentlightning.http.routes import CLIENT_ROUTES
from agentlightning.types import Attempt, AttemptedRollout

_logger = logging.getLogger(__name__)

_DIRECTIVE_HEADER = "Agl-Directive"
_MOST_OPEN = 1000


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
        ends_at = time.monotonic() + wait_seconds
        arguments = given(limit=limit, worker_id=worker_id, request_id=request_id)
        while True:
            asked_at = time.monotonic()
            left = max(ends_at - asked_at, 0.0)
            slice_seconds = min(left, LONGEST_SLICE_SECONDS)
            reply = await self._caller.send(
                "dequeue_many_rollouts",
                {**arguments, "wait_seconds": slice_seconds},
                timeout_seconds=self._caller.timeout_seconds + slice_seconds,
                long_poll=slice_seconds > 0,
            )
            claimed: list[AttemptedRollout] = result_of(CLIENT_ROUTES["dequeue_many_rollouts"], reply)
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
