"""A transaction whose operations can be undone one by one, for a batch in which one has failed after it had written."""

from __future__ import annotations

from agentlightning.store.sqlite.transaction import SqliteTransaction


class GuardedTransaction(SqliteTransaction):
    """A transaction in which each operation can be undone alone: it has a savepoint of its own."""

    def keep(self) -> None:
        """The operation succeeded: its effects stay. The next one begins."""
        self._flush()  # inside the savepoint, so that the next operation cannot undo it
        if self._wrote_statement:
            self._execute("RELEASE operation")
        super().keep()

    def undo(self) -> None:
        """The operation failed: as if it had never been. The next one begins."""
        if self._wrote_statement:
            self._execute("ROLLBACK TO operation; RELEASE operation")
        self._forget_operation()

    def _write(self) -> None:
        if not self._wrote_statement:
            self._execute("SAVEPOINT operation")
        super()._write()
