"""What became of rollouts and attempts since the store was opened, and when it was last verified: for metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from agentlightning.lifecycle.states import FINAL, LIVE
from agentlightning.telemetry.metrics import Histogram, Measure
from agentlightning.types import AttemptStatus, RolloutStatus, VerificationReport

_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1_000.0, 3_000.0, 10_000.0)
"""Upper bounds of the histogram of tasks, which take from a moment to hours."""


class Tally:
    """Counts ends. Written in the order of the commits; a reader in another thread may miss the last one."""

    def __init__(self) -> None:
        self._rollouts = {each: 0.0 for each in get_args(RolloutStatus) if each in FINAL}
        self._attempts = {each: Histogram(_SECONDS) for each in get_args(AttemptStatus) if each not in LIVE}
        self._verified: tuple[float, int] | None = None

    def rollout_ended(self, status: RolloutStatus) -> None:
        """A rollout has reached its terminal state."""
        self._rollouts[status] += 1

    def attempt_ended(self, status: AttemptStatus, seconds: float) -> None:
        """An attempt has ended so long after it began."""
        self._attempts[status].note(seconds)

    def verified(self, time: float, report: VerificationReport) -> None:
        """The whole store was checked, and this is what was found then."""
        self._verified = time, len(report.violations)

    def measures(self) -> Sequence[Measure]:
        """The counts."""
        text = "Rollouts that ended since the store was opened."
        ended = Measure("agl_rollouts_ended", text, dict(self._rollouts), True, "status")
        text = "Seconds from the claim of an attempt to its end, since the store was opened."
        found = [ended, Measure("agl_attempt_seconds", text, dict(self._attempts), label="status")]
        if self._verified is not None:
            time, violations = self._verified
            found.append(Measure("agl_verified_timestamp_seconds", "When the store was last verified.", time))
            found.append(Measure("agl_violations", "Broken rules that the last verification found.", float(violations)))
        return found
