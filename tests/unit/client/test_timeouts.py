"""A reply that does not come is given up after the time that the request allows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agentlightning.errors import StoreUnreachable
from agentlightning.http.client.retry import Resilience, Retrying
from agentlightning.http.client.transport import Transport, WireRequest
from scripted_transport import ScriptedTransport, silent
from virtual_time import in_virtual_time


def _one_try(inner: Transport, clock: Callable[[], float]) -> Retrying:
    probe = WireRequest("GET", "/health")
    numbers = Resilience(probe_interval_seconds=1e9)
    return Retrying(inner, server="http://s", probe=probe, numbers=numbers, retry_delays=(), monotonic=clock)


@pytest.mark.parametrize("allowed", [0.5, 30.0, 3600.0])
def test_a_reply_in_time_is_delivered(allowed: float) -> None:
    async def scene(clock: Callable[[], float]) -> None:
        inner = ScriptedTransport([silent(allowed - 0.1)], clock)
        reply = await _one_try(inner, clock).send(
            WireRequest("GET", "/", timeout_seconds=allowed, patience_seconds=1e6)
        )
        assert reply.status == 200

    in_virtual_time(scene)


@pytest.mark.parametrize("allowed", [0.5, 30.0, 3600.0])
def test_a_reply_too_late_is_given_up_at_that_moment(allowed: float) -> None:
    async def scene(clock: Callable[[], float]) -> None:
        inner = ScriptedTransport([silent(allowed + 0.1)], clock)
        with pytest.raises(StoreUnreachable, match=f"no reply to GET /x within {allowed:g} s"):
            await _one_try(inner, clock).send(WireRequest("GET", "/x", timeout_seconds=allowed, patience_seconds=1e6))
        assert clock() == pytest.approx(allowed)
        assert inner.cancelled == 1

    in_virtual_time(scene)
