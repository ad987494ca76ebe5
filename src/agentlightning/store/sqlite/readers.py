"""Connections that only read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager

import apsw

__all__ = ["ReaderPool"]

_IDLE_LIMIT = 4


class ReaderPool:
    """Lends connections, each to one borrower at a time; any thread may borrow.

    Args:
        connect: opens a connection that only reads.
    """

    def __init__(self, connect: Callable[[], apsw.Connection]) -> None:
        self._connect = connect
        self._idle: deque[apsw.Connection] = deque()
        self._closed = False

    @contextmanager
    def snapshot(self) -> Generator[apsw.Connection]:
        """A connection inside a read transaction: everything read through it stands at one moment."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            connection.execute("BEGIN")
            yield connection
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if self._closed or len(self._idle) >= _IDLE_LIMIT:
                connection.close()
            else:
                self._idle.append(connection)

    def close(self) -> None:
        """Close the idle connections; those on loan are closed when they come back."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()
