"""What happens in a simulation, drawn from its seed: the work, the machines, and the trouble.

Each seed draws first which kinds of trouble there may be, so that some runs have much of one kind and none of the
others (A. Groce et al., "Swarm Testing", ISSTA 2012).
"""

from __future__ import annotations

import random
from typing import Any, Literal, NamedTuple

from agentlightning.types import RolloutConfig
from simulated_network import Mix

__all__ = ["Behaviour", "Kind", "RolloutPlan", "RunnerPlan", "Scenario", "Step", "Trouble", "draw"]

Kind = Literal[
    "kill_runner", "lose_machine", "stop_runner", "drain_runner", "kill_server", "stop_server", "drain_server",
    "cut", "disturb", "jump", "cancel", "slow_disk",
]  # fmt: skip
_KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]

LAST_TROUBLE_SECONDS = 45.0
"""No trouble begins later."""


class Step(NamedTuple):
    """One thing that an agent does."""

    do: Literal["work", "record", "add"]
    """``work``: take time; ``record``: spans that go with the report; ``add``: spans that are stored at once."""
    amount: float
    """Seconds, or spans."""


class Behaviour(NamedTuple):
    """What an agent does on one attempt."""

    steps: tuple[Step, ...]
    ends: Literal["well", "raises", "fails_for_good"]


class RolloutPlan(NamedTuple):
    """One rollout, and what its agents do on each attempt; on further ones what they do on the last."""

    config: RolloutConfig
    tries: tuple[Behaviour, ...]
    enqueued_after: float
    """Seconds since the rollout before was enqueued."""


class RunnerPlan(NamedTuple):
    """One runner; each has a machine of its own."""

    concurrency: int
    starts_at: float


class Trouble(NamedTuple):
    """Something that goes wrong."""

    kind: Kind
    at: float
    seconds: float
    """How long it lasts, or how long the process is away."""
    target: int
    """Which runner, client or rollout."""
    detail: Any = None


class Scenario(NamedTuple):
    """All of it."""

    rollouts: tuple[RolloutPlan, ...]
    runners: tuple[RunnerPlan, ...]
    troubles: tuple[Trouble, ...]
    latency: tuple[float, float]
    commit_seconds: float
    """The most that a commit takes on a disk that is well."""
    with_resources: bool


def draw(seed: int) -> Scenario:
    """The scenario of a seed."""
    chance = random.Random(seed)
    runners = tuple(
        RunnerPlan(chance.choice((1, 1, 2)), chance.uniform(0.0, 2.0)) for _ in range(chance.choice((1, 1, 2)))
    )
    rollouts = tuple(_rollout(chance) for _ in range(chance.choice((1, 1, 2, 2, 3))))
    kinds: list[Kind] = [kind for kind in _KINDS if chance.random() < 0.4] or [chance.choice(_KINDS)]
    count = chance.choice((0, 1, 1, 2, 2, 3, 4, 6))
    troubles = tuple(_trouble(chance, chance.choice(kinds), len(runners), len(rollouts)) for _ in range(count))
    latency = chance.choice(((0.0001, 0.002), (0.001, 0.05), (0.01, 1.0)))
    return Scenario(
        rollouts, runners, troubles, latency, chance.choice((0.0005, 0.01, 0.2)), with_resources=chance.random() < 0.15
    )


def _rollout(chance: random.Random) -> RolloutPlan:
    conditions = ["unresponsive", "timeout", *(["failed"] if chance.random() < 0.5 else [])]
    config = RolloutConfig(
        max_attempts=chance.choice((1, 2, 3)),
        retry_condition=conditions,  # type: ignore[arg-type]
        timeout_seconds=chance.choice((None, None, 20.0)),
        unresponsive_seconds=chance.choice((None, None, 12.0)),
    )
    tries = tuple(_behaviour(chance) for _ in range(chance.choice((1, 2))))
    return RolloutPlan(config, tries, chance.choice((0.0, 0.0, 0.3, 8.0)))


def _behaviour(chance: random.Random) -> Behaviour:
    steps: list[Step] = []
    for _ in range(chance.choice((1, 2, 3))):
        match chance.choice(("work", "record", "add")):
            case "work":
                steps.append(Step("work", chance.choice((0.01, 0.01, 0.3, 3.0, chance.uniform(5.0, 25.0)))))
            case "record":
                steps.append(Step("record", chance.choice((1, 3))))
            case _:
                steps.append(Step("add", chance.choice((1, 2))))
    return Behaviour(tuple(steps), chance.choice(("well",) * 5 + ("raises", "fails_for_good")))


def _trouble(chance: random.Random, kind: Kind, runners: int, rollouts: int) -> Trouble:
    at = chance.choice((chance.uniform(0.0, 3.0), chance.uniform(0.0, LAST_TROUBLE_SECONDS)))
    seconds = chance.choice((chance.uniform(0.1, 2.0), chance.uniform(2.0, 12.0), chance.uniform(12.0, 40.0)))
    target, detail = chance.randrange(runners), None
    match kind:
        case "cancel":
            target = chance.randrange(rollouts)
        case "cut" | "disturb":
            target = chance.randrange(runners + 1)  # the last is the algorithm's machine
            detail = _mix(chance) if kind == "disturb" else None
        case "jump":
            detail = chance.choice((-1, 1)) * chance.choice((2.0, 60.0, 1e5))
        case "slow_disk":
            detail = chance.uniform(0.1, 4.0)
        case _:
            pass
    return Trouble(kind, at, seconds, target, detail)


def _mix(chance: random.Random) -> Mix:
    """Some fates of requests, each as likely as drawn; half of the requests arrive at least."""
    shares = [chance.choice((0.0, 0.0, 1.0)) * chance.random() for _ in Mix._fields]
    whole = max(sum(shares) / 0.5, 1e-9)
    return Mix(*(share / max(whole, 1.0) for share in shares))
