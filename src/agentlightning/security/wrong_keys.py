"""Wrong API keys, by the address that they come from: which are told of, and which are answered slowly."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import NamedTuple

_log = logging.getLogger(__name__)

_WINDOW_SECONDS = 60.0
_FREE = 10
"""So many wrong keys within a minute may be mistakes."""
_ADDRESSES = 1024
"""Of more addresses, those that were quiet for longest are forgotten."""


class _Count(NamedTuple):
    since: float
    number: int


class WrongKeys:
    """Counts wrong keys. A right key is never looked up here, so nobody can be locked out."""

    def __init__(self) -> None:
        self._counts: OrderedDict[str, _Count] = OrderedDict()

    def note(self, address: str, now: float) -> bool:
        """Count a wrong key, and log the first from an address, the tenth, the hundredth and so on.

        Args:
            address: of the connection; behind a reverse proxy it is that one's.
            now: seconds on a clock that never jumps.

        Returns:
            Whether there are so many that the address is guessing.
        """
        before = self._counts.pop(address, None)
        if before is None or now - before.since >= _WINDOW_SECONDS:
            before = _Count(now, 0)
        number = before.number + 1
        self._counts[address] = _Count(before.since, number)
        if len(self._counts) > _ADDRESSES:
            self._counts.popitem(last=False)
        if number == 10 ** (len(str(number)) - 1):
            _log.warning("%d wrong API key(s) from %s within %.0f s", number, address, now - before.since)
        return number > _FREE
