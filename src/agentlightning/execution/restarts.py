"""When a runner that crashed is started again, and when it is given up. Pure: time comes in as an argument."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["RestartPolicy", "Restarts"]

_MINUTE = 60.0


@dataclass(frozen=True)
class RestartPolicy:
    """How crashes are answered.

    Args:
        most_per_minute: how many crashes of one runner within a minute are answered with a restart;
            0: it is never started again.
        first_delay: seconds before it is started again.
        factor: what the delay grows by with each life in a row that was too short.
        longest_delay: seconds at most.
        short_life: a life shorter than so many seconds was too short: the runner may crash at once again.
    """

    most_per_minute: int = 10
    first_delay: float = 0.1
    factor: float = 2.0
    longest_delay: float = 10.0
    short_life: float = 1.0


@dataclass
class Restarts:
    """The crashes of one runner.

    Args:
        policy: how they are answered.
    """

    policy: RestartPolicy
    _crashes: list[float] = field(default_factory=list[float])
    _short_lives: int = 0

    def crashed(self, lived_seconds: float, now: float) -> float | None:
        """Note a crash: seconds until the next start, or None: it is given up."""
        self._crashes = [each for each in self._crashes if each > now - _MINUTE]
        self._crashes.append(now)
        if len(self._crashes) > self.policy.most_per_minute:
            return None
        self._short_lives = self._short_lives + 1 if lived_seconds < self.policy.short_life else 0
        return min(self.policy.first_delay * self.policy.factor**self._short_lives, self.policy.longest_delay)
