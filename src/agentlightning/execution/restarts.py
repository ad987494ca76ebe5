"""When a runner that crashed is started again. Pure: the time is an argument.

A crash is charged to the rollouts that the process was working on, and the attempts of each are limited. So what a
rollout does again does not count here. What counts is that process after process comes to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

_MINUTE = 60.0


@dataclass(frozen=True)
class RestartPolicy:
    """When a runner that crashed is started again, and after which delay.

    Args:
        most_per_minute: how many crashes of one runner within a minute are answered with a restart; 0: it is never
            started again. An attempt that came to its end in between begins the count anew, and one rollout counts
            once, however many of its attempts crash.
        first_delay: seconds before it is started again.
        factor: multiplies the delay for each consecutive short life.
        longest_delay: the largest delay, in seconds.
        short_life: a runner that lived for fewer seconds counts as a short life: it may crash again at once. One that
            crashed on a rollout does not count as such.
        most_failed_starts: how many crashes of a runner that has never got as far as to register with the store are
            answered with a restart.
    """

    most_per_minute: int = 10
    first_delay: float = 0.1
    factor: float = 2.0
    longest_delay: float = 10.0
    short_life: float = 1.0
    most_failed_starts: int = 2


class Life(NamedTuple):
    """What one process of a runner has done, which has crashed."""

    seconds: float
    began: bool  # whether this process, or one before it, has registered with the store
    claimed: bool  # whether it has claimed a rollout
    worked: bool  # whether it has brought an attempt to its end
    rollouts: frozenset[str]  # on which it was at work when it crashed


@dataclass
class CrashCounter:
    """The crashes of one runner, and how they are answered.

    Args:
        policy: the limits.
        blamed: rollouts that have crashed a runner; shared by all runners of a run.
    """

    policy: RestartPolicy
    blamed: set[str] = field(default_factory=set[str])
    _crashes: list[float] = field(default_factory=list[float])
    _short_lives: int = 0
    _idle_lives: int = 0
    """How many consecutive processes have not even claimed a rollout."""

    def crashed(self, life: Life, now: float) -> float | None:
        """Count a crash; return the delay of the restart in seconds, or None if there is no restart.

        A restart policy without a limit would hide a runner that can never work; one without a delay would keep the
        machine busy with restarts.
        """
        policy, most = self.policy, self.policy.most_per_minute
        if life.worked:
            self._crashes.clear()
            self._short_lives = self._idle_lives = 0
        is_known = bool(life.rollouts) and life.rollouts <= self.blamed
        self.blamed |= life.rollouts
        self._idle_lives = 0 if life.claimed else self._idle_lives + 1
        if self._idle_lives > (most if life.began else min(most, policy.most_failed_starts)):
            return None
        if is_known and most > 0:
            return policy.first_delay
        self._crashes = [each for each in self._crashes if each > now - _MINUTE]
        self._crashes.append(now)
        if len(self._crashes) > most:
            return None
        if life.rollouts:
            return policy.first_delay
        self._short_lives = self._short_lives + 1 if life.seconds < policy.short_life else 0
        return min(policy.first_delay * policy.factor**self._short_lives, policy.longest_delay)
