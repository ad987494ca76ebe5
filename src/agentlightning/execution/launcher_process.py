"""The nursery: a process with one thread that starts all others of a run, collects them, and outlives none.

Having one thread, it may fork at any time, and the kernel's watch over its children
(``die_with_parent``) is reliable. It adopts every descendant that loses its parent, so that none gets
away. When the supervisor dies, it ends all of them, and itself.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import selectors
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Literal, NoReturn

from agentlightning.execution.abort import abort, abort_stages
from agentlightning.execution.child import READY, STOP, Lines, live
from agentlightning.execution.messages import Close, Exited, Job, Outcome, Ready, Start, Started, Stop, ToNursery
from agentlightning.execution.process_tree import Cgroup, Kin, adopt_orphans
from agentlightning.execution.shipping import unpack

StartMethod = Literal["fork", "spawn", "forkserver"]

_GRACE_SECONDS = 1.0
_TERMINATE_SECONDS = 0.75
"""For each stage, when the supervisor is gone: all is over within 4 seconds."""
_WHOLE = 1 << 20
_SUPERVISOR = "supervisor"


@dataclass
class Payload:
    """A job, as the nursery holds it: the object itself, or packed."""

    job: Job | None = None
    packed: bytes = b""

    def load(self, name: str) -> Job:
        """The job, in the process that does it."""
        return self.job if self.job is not None else unpack(f"the {name}'s side", self.packed)


@dataclass
class _Life:
    """A process that the nursery has started and not yet collected."""

    slot: str
    life: int
    pid: int
    control: int
    report: int
    heard: bytearray = field(default_factory=bytearray)
    ready: bool = False

    @property
    def outcome(self) -> Outcome | None:
        """What it said of its job."""
        lines = bytes(self.heard).split(b"\n")
        for line in lines[:-1]:  # a line that was cut off is none
            if line != READY:
                return Outcome(*json.loads(line))
        return None


class Nursery:
    """The nursery's own side.

    Args:
        connection: to the supervisor.
        jobs: what children do, by name.
        method: ``fork`` and ``forkserver``: children are forks of this process; ``spawn``: each is a new interpreter.
        mark: of the processes of the run.
        supervisor: number of the supervisor's process.
        cgroup: of the run; removed at the end.
    """

    def __init__(
        self,
        connection: Connection,
        jobs: Mapping[str, Payload],
        method: StartMethod,
        mark: str,
        supervisor: int,
        cgroup: Cgroup | None,
    ) -> None:
        self._connection = connection
        self._jobs = jobs
        self._method: StartMethod = method
        self._supervisor = supervisor
        self._cgroup = cgroup
        self._kin = Kin(mark, os.getpid(), frozenset[int] if cgroup is None else cgroup.processes)
        self._lives: dict[int, _Life] = {}
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        self._closing = False

    def run(self) -> None:
        """Serve the supervisor until it says ``Close`` or is gone; then nothing of the run is left."""
        adopt_orphans()
        gc.freeze()  # so that children share what is there
        self._watch_signals()
        self._selector.register(self._connection, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._watch_supervisor()
        try:
            while not self._closing:
                self._attend(None)
        except (EOFError, ConnectionError):  # the supervisor is gone
            pass
        self._end_all()

    # --- Waiting ---------------------------------------------------------------------------------

    def _watch_signals(self) -> None:
        for end in (self._wake_read, self._wake_write):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, _ignore)  # not SIG_IGN: the wake-up file shall be written to
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the supervisor's business
        signal.signal(signal.SIGTERM, self._close)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def _watch_supervisor(self) -> None:
        """Other children of the supervisor may hold its end of the connection, so its end alone says nothing."""
        try:
            watch = os.pidfd_open(self._supervisor)
        except (AttributeError, OSError):  # not Linux; or it is gone already
            watch = None
        if watch is not None:
            self._selector.register(watch, selectors.EVENT_READ, data=_SUPERVISOR)
        if os.getppid() != self._supervisor:
            self._closing = True

    def _close(self, *_: object) -> None:
        self._closing = True

    def _attend(self, seconds: float | None) -> None:
        """Do what there is to do, waiting for it at most so long."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._connection:
                while not self._closing and self._connection.poll():
                    self._obey(self._connection.recv())
            elif key.fileobj == self._wake_read:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, _WHOLE)
            elif key.data == _SUPERVISOR:
                self._closing = True
            else:
                self._hear(self._lives[key.data])
        self._collect()

    def _obey(self, message: ToNursery) -> None:
        match message:
            case Start():
                self._start(message)
            case Stop():
                self._stop()
            case Close():
                self._closing = True

    def _stop(self) -> None:
        for life in self._lives.values():
            with contextlib.suppress(BrokenPipeError, BlockingIOError):
                os.write(life.control, STOP)

    # --- Starting --------------------------------------------------------------------------------

    def _start(self, start: Start) -> None:
        control_read, control = os.pipe()
        report, report_write = os.pipe()
        for end in (control, report, report_write):
            os.set_blocking(end, False)
        lines = Lines(control_read, report_write)
        try:
            pid = self._spawn(start, lines) if self._method == "spawn" else self._fork(start, lines)
        except OSError as error:  # no memory, or too many processes: the supervisor may try again later
            for end in (control, report, *lines):
                os.close(end)
            self._tell(Started(start.slot, start.life, 0))
            self._tell(Exited(start.slot, start.life, 0, -1, Outcome("failed", f"it could not be started: {error}")))
            return
        os.close(lines.control)
        os.close(lines.report)
        life = _Life(start.slot, start.life, pid, control, report)
        self._lives[pid] = life
        self._kin.note(pid)
        self._selector.register(report, selectors.EVENT_READ, data=pid)
        self._tell(Started(start.slot, start.life, pid))

    def _fork(self, start: Start, lines: Lines) -> int:
        nursery = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._leave_behind()
            live(start, lambda: self._jobs[start.job].load(start.job), lines, nursery)
        return pid

    def _leave_behind(self) -> None:
        """In a child: let go of what is the nursery's, so that its end is seen by all."""
        self._selector.close()
        self._connection.close()
        for end in (self._wake_read, self._wake_write):
            os.close(end)
        for life in self._lives.values():
            os.close(life.control)
            os.close(life.report)

    def _spawn(self, start: Start, lines: Lines) -> int:
        with tempfile.TemporaryFile() as letter:
            pickle.dump((start, lines, os.getpid(), sys.path, self._jobs[start.job].packed), letter)
            letter.flush()
            return _new_interpreter(
                "agentlightning.execution.launcher_main", [str(letter.fileno())], (*lines, letter.fileno())
            )

    # --- Collecting ------------------------------------------------------------------------------

    def _hear(self, life: _Life) -> None:
        try:
            heard = os.read(life.report, _WHOLE)
        except BlockingIOError:
            return
        life.heard += heard
        if not heard:
            self._selector.unregister(life.report)
        if not life.ready and READY in bytes(life.heard).split(b"\n")[:-1]:
            life.ready = True
            self._tell(Ready(life.slot, life.life))

    def _collect(self) -> None:
        """Take note of processes that have ended; orphans that were adopted are only buried."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            life = self._lives.pop(pid, None)
            if life is not None:
                self._bury(life, os.waitstatus_to_exitcode(status))

    def _bury(self, life: _Life, code: int) -> None:
        watched = life.report in self._selector.get_map()
        if watched:
            self._hear(life)  # its last words; others may hold the pipe open, so there may be no end of it
        if life.report in self._selector.get_map():
            self._selector.unregister(life.report)
        os.close(life.report)
        os.close(life.control)
        self._tell(Exited(life.slot, life.life, life.pid, code, life.outcome))

    def _tell(self, message: Started | Ready | Exited) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionError):  # noticed where it is read from
            self._connection.send(message)

    # --- The end ---------------------------------------------------------------------------------

    def _end_all(self) -> None:
        """Nothing of the run is left after, as far as that is in anybody's power."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for key in [each for each in self._selector.get_map().values() if each.data == _SUPERVISOR]:
            self._selector.unregister(key.fileobj)
        self._selector.unregister(self._connection)
        names = {pid: life.slot for pid, life in self._lives.items()}
        stages = abort_stages(_GRACE_SECONDS, _TERMINATE_SECONDS)
        abort(stages, self._kin.living, names, self._stop, pause=self._attend_for)
        if self._cgroup is not None:
            self._cgroup.remove()

    def _attend_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._attend(left)


def _ignore(*_: object) -> None:
    return


def _new_interpreter(module: str, arguments: list[str], passed: Sequence[int]) -> int:
    """Start Python anew; ``passed`` are the files that it gets. There is no other thread that could pass them on."""
    for end in passed:
        os.set_inheritable(end, True)
    try:
        command = [sys.executable, *(f"-W{each}" for each in sys.warnoptions), "-m", module, *arguments]
        return os.posix_spawn(sys.executable, command, os.environ)
    finally:
        for end in passed:
            os.set_inheritable(end, False)


def serve(make: Callable[[], Nursery]) -> NoReturn:
    """Be the nursery, and end this process with it."""
    code = 1
    try:
        make().run()
        code = 0
    except BaseException:  # noqa: BLE001 - the boundary of the process
        traceback.print_exc()
    os._exit(code)
