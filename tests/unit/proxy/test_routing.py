"""Which backend answers for which rollout."""

from __future__ import annotations

from collections import Counter

import pytest

from agentlightning.proxy.dialects.base import ProxyError
from agentlightning.proxy.models import ModelBackend
from agentlightning.proxy.upstream import Routing

ROLLOUTS = [f"ro-{number}" for number in range(600)]


def backends(*names: str) -> dict[str, tuple[ModelBackend, ...]]:
    return {"policy": tuple(ModelBackend(n, "policy", "m", "http://x/v1", None, 1.0, {}, {}, {}, None) for n in names)}


def choices(routing: Routing) -> dict[str, str]:
    return {rollout: routing.order("policy", rollout)[0].name for rollout in ROLLOUTS}


def test_rollouts_spread_evenly_and_stay() -> None:
    chosen = choices(Routing(backends("a", "b", "c")))
    assert all(150 < count < 250 for count in Counter(chosen.values()).values())
    assert choices(Routing(backends("c", "a", "b"))) == chosen, "in every proxy, in whatever order they are listed"


def test_a_backend_that_goes_moves_only_its_own_rollouts() -> None:
    before, after = choices(Routing(backends("a", "b", "c"))), choices(Routing(backends("a", "b")))
    assert {before[rollout] for rollout in ROLLOUTS if before[rollout] != after[rollout]} == {"c"}


def test_the_order_has_every_backend_once() -> None:
    routing = Routing(backends("a", "b", "c"))
    for rollout in (*ROLLOUTS[:20], None):
        assert sorted(backend.name for backend in routing.order("policy", rollout)) == ["a", "b", "c"]


def test_calls_of_nobody_take_turns() -> None:
    routing = Routing(backends("a", "b"))
    assert [routing.order("policy", None)[0].name for _ in range(4)] == ["a", "b", "a", "b"]


def test_a_backend_that_failed_comes_last_for_a_while() -> None:
    now = 100.0
    routing = Routing(backends("a", "b"), clock=lambda: now)
    before = choices(routing)
    failed = routing.order("policy", ROLLOUTS[0])[0]
    routing.failed(failed)
    assert failed.name not in choices(routing).values()
    now += 6.0
    assert choices(routing) == before
    routing.failed(failed)
    routing.answered(failed)
    assert choices(routing) == before


def test_an_unknown_model() -> None:
    with pytest.raises(ProxyError, match="serves: policy"):
        Routing(backends("a")).order("other", None)
    with pytest.raises(ProxyError, match="serves: none"):
        Routing({}).order("other", None)
