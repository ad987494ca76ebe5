"""Failures of agents in the log: the first of each kind in full, the others in a line each, and their number."""

from __future__ import annotations

import logging
import traceback
from collections import Counter

_MOST_KINDS = 1000
_logger = logging.getLogger(__name__)


class FailureLog:
    """Logs the failures of one runner's agents.

    Two failures are of one kind if exceptions of one type were raised in one line. The first is a warning with its
    traceback. Of the others each is a line of level INFO, and a warning tells when there are ten, a hundred, and so on.
    """

    def __init__(self) -> None:
        self._counts = Counter[tuple[str, str]]()

    def add(self, rollout_id: str, attempt_id: str, error: BaseException, reason: str) -> None:
        """Log one failure; ``error`` has a traceback that begins in the agent's code."""
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else "an unknown place"
        kind = type(error).__qualname__, place
        if len(self._counts) >= _MOST_KINDS:  # as of code that is made anew for each rollout
            self._counts.clear()
        self._counts[kind] += 1
        count, ids = self._counts[kind], (rollout_id, attempt_id)
        if count == 1:
            _logger.warning("rollout %s, attempt %s: the agent failed", *ids, exc_info=error)
            return
        _logger.info("rollout %s, attempt %s: the agent failed (number %d of its kind): %s", *ids, count, reason)
        if count >= 10 and str(count).strip("0") == "1":
            text = "the agent has failed %d times with %s in %s; the first traceback was shown, agl rollouts has all"
            _logger.warning(text, count, *kind)
