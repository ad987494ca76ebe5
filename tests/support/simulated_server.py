"""The server of a simulation: the real application, engine, group commit and SQL, on a database that outlives it.

Replaced are the clock, the thread of the alarm, the thread that commits (both are events in virtual time), and the
file: it is a database in memory, whose transaction is rolled back when the process is killed, as the log of a file
would do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import apsw

from agentlightning.http.server.admin import Operations
from agentlightning.http.server.app import StoreApp
from agentlightning.http.server.endpoints import Endpoints
from agentlightning.http.server.limits import AccessControl, ServerLimits
from agentlightning.security.hosts import AllowedHosts, AllowedOrigins
from agentlightning.store.core import Alarm
from agentlightning.store.engine import EngineStore
from agentlightning.store.sources import Clock, IdSource
from agentlightning.store.sqlite import connections
from agentlightning.store.sqlite.backend import SqliteBackend, Work
from agentlightning.store.sqlite.row_cache import RowCache
from simulated_network import SimulatedExchange
from simulated_time import ProcessLoop, World

__all__ = ["History", "SimulatedServer", "empty_database"]

_TABLES = ("rollouts", "attempts", "spans", "resources", "workers", "counters")
_HISTORY = """
CREATE TEMP TABLE history (seq INTEGER PRIMARY KEY, at REAL, kind TEXT, id TEXT, before TEXT, after TEXT, reason TEXT);
"""
_TRIGGERS = """
CREATE TEMP TRIGGER {table}_{event} AFTER {event} ON main.{table} {when} BEGIN
    INSERT INTO history (at, kind, id, before, after, reason)
    VALUES (virtual_now(), '{table}', NEW.{id}, {before}, NEW.status, NEW.reason_code);
END;
"""
_SPAN_TRIGGER = """
CREATE TEMP TRIGGER spans_INSERT AFTER INSERT ON main.spans BEGIN
    INSERT INTO history (at, kind, id, after) VALUES (
        virtual_now(), 'spans', NEW.span_id, (SELECT attempt_id FROM attempts WHERE seq = NEW.attempt_seq)
    );
END;
"""

History = list[tuple[float, str, str, str | None, str, str | None]]
"""Each change of a status that was committed: when, table, id, before, after, the reason in the row. For each span its
id, and its attempt as ``after``."""

_TURN_SECONDS = 0.05
"""How long a thread waits that found the writer busy."""

_now: list[Callable[[], float]] = []
"""The clock of the world that uses the database."""


@cache
def _connection() -> apsw.Connection:
    """One for all simulations of this process, one after another: to make it takes longer than most of them."""
    connection = connections.open_writer(":memory:", "none", vfs=None)
    connection.create_scalar_function("virtual_now", lambda *_: _now[-1](), 0)
    connection.execute(_HISTORY)
    connection.execute(_SPAN_TRIGGER)
    for table, id in (("rollouts", "rollout_id"), ("attempts", "attempt_id")):
        connection.execute(_TRIGGERS.format(table=table, event="INSERT", when="", before="NULL", id=id))
        changed = "WHEN OLD.status IS NOT NEW.status"
        connection.execute(_TRIGGERS.format(table=table, event="UPDATE", when=changed, before="OLD.status", id=id))
    return connection


def empty_database(world: World) -> apsw.Connection:
    """The database, without rows. What is committed to it until the next call is told in the time of this world."""
    connection = _connection()
    if connection.in_transaction:  # of a server that was in the middle of it when its world ended
        connection.execute("ROLLBACK")
    _now[:] = [lambda: world.now]
    for table in (*_TABLES, "history"):
        connection.execute(f"DELETE FROM {table}")
    return connection


class ServerClock:
    """The clocks of the server's machine.

    Args:
        world: whose time passes.
        since_boot: what the monotonic clock shows at the beginning: another value after each start of a machine.
    """

    def __init__(self, world: World, since_boot: float) -> None:
        self._world = world
        self._since_boot = since_boot
        self.jumped = 0.0
        """By how many seconds somebody has set the clock."""

    def wall(self) -> float:
        """Unix seconds."""
        return 1_800_000_000.0 + self._world.now + self.jumped

    def monotonic(self) -> float:
        """Seconds since the start of the machine."""
        return self._since_boot + self._world.now

    boot = monotonic


class SimulatedBackend(SqliteBackend):
    """A backend on a database that is there before it and after it.

    Args:
        connection: the database.
        clock: where time comes from.
        commit_later: runs what commits, later, as the thread of a file's backend does.
    """

    name = "sqlite"

    def __init__(self, connection: apsw.Connection, clock: Clock, commit_later: Callable[[Work], None]) -> None:
        super().__init__(clock, "simulated.db")
        self._connection = connection
        self._hand_over = commit_later

    def _connect(self) -> tuple[apsw.Connection, RowCache]:
        connections.rebase_leases(self._connection, self.lease_now())
        return self._connection, RowCache(self._connection)

    @property
    def is_committing(self) -> bool:
        """Whether a batch is under way: a thread that wants to write would wait."""
        return self._writer is not None and self._writer._turn.locked()  # pyright: ignore[reportPrivateUsage]


class SimulatedAlarm(Alarm):
    """An alarm whose thread is an event of the world.

    Args:
        loop: the server's process.
        is_busy: whether a thread would have to wait for its turn to write.
        arguments: of an alarm.
    """

    def __init__(self, loop: ProcessLoop, is_busy: Callable[[], bool], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._loop = loop
        self._is_busy = is_busy
        self._looks = 0
        """How often it was told to look; the last of them counts."""

    def set(self, moment: float) -> None:
        """See ``Alarm``."""
        super().set(moment)
        if self._thread is not None:
            self._look_after(0.0)

    def _start(self) -> None:
        self._thread = threading.current_thread()  # so that it is not started again, and never joined
        boot_now = self._boot_now()
        assert boot_now is not None
        self.pulse = boot_now()

    def _look_after(self, seconds: float) -> None:
        self._looks += 1
        self._loop.in_thread(seconds, partial(self._turn, self._looks))

    def _turn(self, number: int) -> None:
        if self._closed or number != self._looks:
            return
        if self._is_busy():
            self._look_after(_TURN_SECONDS)
            return
        pause = self.look()
        if pause == 0:
            self.ring()
        if number == self._looks:  # else it was set meanwhile
            self._look_after(pause)


class SimulatedServer:
    """A server that can be started, stopped and killed again and again.

    Args:
        world: where it is.
        connection: its database.
        ids: makes the ids of its records.
        commit_seconds: the most that a commit takes.
    """

    def __init__(self, world: World, connection: apsw.Connection, ids: IdSource, commit_seconds: float) -> None:
        self._world = world
        self._connection = connection
        self._ids = ids
        self.commit_seconds = commit_seconds
        self.loop: ProcessLoop | None = None
        self.clock = ServerClock(world, 1000.0)
        self.store: EngineStore | None = None
        self._app: StoreApp | None = None
        self._access = AccessControl(None, AllowedHosts(), AllowedOrigins(None))

    def start(self) -> None:
        """Start a process, unless there is one."""
        if self.loop is not None:
            return
        world = self._world
        self.loop = loop = world.process("server")
        jumped = self.clock.jumped
        self.clock = ServerClock(world, world.chance.uniform(0.0, 1e6))
        self.clock.jumped = jumped
        backend = SimulatedBackend(self._connection, self.clock, partial(self._commit_later, loop))
        alarm = partial(SimulatedAlarm, loop, lambda: backend.is_committing)
        self.store = EngineStore(backend, self._ids, alarm=alarm)
        self._app = StoreApp(Endpoints(self.store), self._access, ServerLimits())
        self._app.others = Operations(self.store, self._app).by_path()
        loop.call_soon(self.store._core.open)  # pyright: ignore[reportPrivateUsage]
        world.note("server", "starts")

    def _commit_later(self, loop: ProcessLoop, work: Work) -> None:
        loop.in_thread(self._world.chance.uniform(0.0, self.commit_seconds), work)

    def accept(self, exchange: SimulatedExchange) -> None:
        """See ``Host``."""
        assert self._app is not None
        assert self.loop is not None
        self.loop.create_task(self._app.serve(exchange))

    def drain(self) -> None:
        """Take nothing more, and answer those that wait, as before a stop."""
        if self.loop is not None and self._app is not None:
            self.loop.call_soon(self._app.drain)

    def kill(self) -> bool:
        """End the process at once; returns whether there was one."""
        loop, self.loop = self.loop, None
        if loop is None:
            return False
        self._world.kill(loop)
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        self._world.note("server", "is killed")
        return True
