"""For which attempt a request is: said by its path, or else by its headers."""

from __future__ import annotations

import re

from starlette.requests import Request

from agentlightning.errors import InvalidId
from agentlightning.proxy.records import Caller
from agentlightning.proxy.refusals import Refused
from agentlightning.store.door import check_id

__all__ = ["caller_of"]

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")


def caller_of(request: Request) -> Caller | None:
    """Who calls; None: nobody in particular, and the call is not recorded.

    The ids are those of ``/rollout/{rollout_id}/attempt/{attempt_id}/`` or of the headers ``x-rollout-id`` and
    ``x-attempt-id``. A ``traceparent`` (https://www.w3.org/TR/trace-context/) says of which span of the agent the
    call is a child.

    Raises:
        Refused: there is one id without the other, or one that is none (400).
    """
    given = request.path_params
    rollout_id = given.get("rollout_id") or request.headers.get("x-rollout-id")
    attempt_id = given.get("attempt_id") or request.headers.get("x-attempt-id")
    if rollout_id is None and attempt_id is None:
        return None
    try:
        rollout_id = check_id(rollout_id, "rollout_id")
        attempt_id = check_id(attempt_id, "attempt_id")
    except InvalidId as error:
        raise Refused(400, "invalid_id", f"The call says for which attempt it is, but {error}.") from error
    found = _TRACEPARENT.fullmatch(request.headers.get("traceparent", ""))
    if found is None or not found[1].strip("0") or not found[2].strip("0"):
        return Caller(rollout_id, attempt_id)
    return Caller(rollout_id, attempt_id, found[1], found[2])
