"""The launcher: a process with one thread that starts all others of a run, collects them, and outlives none.

Processes are not forked from the main process, because that has threads and event loops, and a lock that another thread
holds at the moment of a fork stays locked in the child for ever. The launcher has one thread, so it may fork at any
time, and the kernel's watch over its children (``die_with_parent``) is reliable. It adopts every descendant that loses
its parent, so that none escapes. When the supervisor dies, even by SIGKILL, it ends all of them and itself.

The first half of this file runs in the supervisor's process, the second in the launcher.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import IO, Any, NamedTuple, NoReturn

from agentlightning.execution.abort import abort, abort_stages
from agentlightning.execution.child import (
    READY,
    STOP,
    ChildPipes,
    CloseLauncher,
    LauncherCommand,
    LauncherEvent,
    ProcessExited,
    ProcessJob,
    ProcessReady,
    ProcessResult,
    ProcessStarted,
    SetStopEvent,
    StartProcess,
    run_child,
)
from agentlightning.execution.process_tree import Cgroup, ProcessTree, adopt_orphans
from agentlightning.execution.shipping import StartMethod, pack

_log = logging.getLogger(__name__)

_CLOSE_SECONDS = 6.0
"""How long a launcher may take to close; its own abort needs at most 4 seconds."""


class LauncherOrders(NamedTuple):
    """What a launcher is started with."""

    supervisor: int
    """Number of the supervisor's process."""
    jobs: Mapping[str, ProcessJob | bytes]
    """What processes do, by name: as objects, or packed."""
    method: StartMethod
    """``fork`` and ``forkserver``: processes are forks of the launcher; ``spawn``: each is a new interpreter."""
    mark: str
    """Of the processes of the run."""
    cgroup: Cgroup | None
    """Of the run; the launcher removes it at the end."""


class Launcher:
    """The launcher as its supervisor sees it.

    Args:
        connection: to it.
        pid: its number.
    """

    def __init__(self, connection: Connection, pid: int) -> None:
        self._connection = connection
        self.pid = pid
        self._closed = False

    def fileno(self) -> int:
        """A file that is readable when ``receive`` has something to return."""
        return self._connection.fileno()

    def send(self, command: LauncherCommand) -> None:
        """Send a command. If the launcher has died nothing happens; ``receive`` reports that."""
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            self._connection.send(command)

    def receive(self) -> list[LauncherEvent] | None:
        """The events since the last call; None: the launcher has died."""
        events: list[LauncherEvent] = []
        try:
            while self._connection.poll():
                events.append(self._connection.recv())
        except (EOFError, ConnectionError):
            return events or None
        return events

    def close(self) -> None:
        """End all processes that are left, and the launcher; blocks. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.send(CloseLauncher())
        until = time.monotonic() + _CLOSE_SECONDS
        while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > until:
                _log.error("the launcher (pid %d) does not end within %g s and is killed", self.pid, _CLOSE_SECONDS)
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
            time.sleep(0.005)
        self._connection.close()


def open_launcher(
    jobs: Mapping[str, ProcessJob], method: StartMethod, mark: str, cgroup: Cgroup | None = None
) -> Launcher:
    """Start a launcher that can do these jobs.

    Args:
        jobs: what its processes will do, by name.
        method: how it starts them.
        mark: of the processes of the run.
        cgroup: of the run.

    Raises:
        InvalidValue: a job cannot be sent to another process; the message names it and the alternatives.
    """
    if method == "fork":
        return _fork_launcher(LauncherOrders(os.getpid(), jobs, method, mark, cgroup))
    packed = {name: pack(f"the {name}'s side", job) for name, job in jobs.items()}
    ours, theirs = socket.socketpair()
    with theirs, _letter(theirs.fileno(), LauncherOrders(os.getpid(), packed, method, mark, cgroup)) as letter:
        process = subprocess.Popen(
            _command(letter), pass_fds=(theirs.fileno(), letter.fileno()), start_new_session=True
        )
    process.returncode = 0  # `close` waits for it by number; without this Popen would warn that it still runs
    return Launcher(Connection(ours.detach()), process.pid)


def _fork_launcher(orders: LauncherOrders) -> Launcher:
    ours, theirs = socket.socketpair()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()  # or both processes would write what is in the buffer
    with warnings.catch_warnings():
        # Python 3.12 and later warn of a fork where there are threads. The caller has asked for it, or was warned by
        # `choose_start_method`.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.setsid()
        ours.close()
        _be_launcher(Connection(theirs.detach()), orders)
    theirs.close()
    return Launcher(Connection(ours.detach()), pid)


# --- New interpreters: a launcher (spawn, forkserver) or a child (spawn). They get an open file with their orders. ----

PRELOADED = ("agentlightning.execution.run", "agentlightning.runner.agent", "agentlightning.tracer.otel")
"""What runners need and a forkserver imports once, for all of them. None of it starts a thread."""


def _letter(*content: Any) -> IO[bytes]:
    """A temporary file with the orders of a new interpreter, and this one's module search path."""
    letter = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    pickle.dump((sys.path, content), letter)
    letter.flush()
    return letter


def _command(letter: IO[bytes]) -> list[str]:
    warning_options = [f"-W{each}" for each in sys.warnoptions]
    return [sys.executable, *warning_options, "-m", "agentlightning.execution.launcher", str(letter.fileno())]


def main() -> None:
    """Be what the letter says, in a new interpreter: a child or the launcher."""
    with open(int(sys.argv[1]), "rb") as letter:
        letter.seek(0)
        sys.path[:], content = pickle.load(letter)
    if isinstance(content[0], StartProcess):
        run_child(*content)
    connection, orders = content
    for module in PRELOADED if orders.method == "forkserver" else ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            _log.debug("%s is not preloaded: %s", module, error)
    _be_launcher(Connection(connection), orders)


def _do_nothing(*_: object) -> None:
    return


def _be_launcher(connection: Connection, orders: LauncherOrders) -> NoReturn:
    """Be the launcher, and end this process with it."""
    code = 1
    try:
        LauncherProcess(connection, orders).run()
        code = 0
    except BaseException:  # noqa: BLE001 - the boundary of the process
        traceback.print_exc()
    os._exit(code)


# --- The launcher's own side -----------------------------------------------------------------------------------------

_GRACE_SECONDS = 1.0
_TERMINATE_SECONDS = 0.75
"""For each stage of the abort when the supervisor has died: everything is over within 4 seconds."""
_MAX_READ_BYTES = 1 << 20
_SUPERVISOR_DIED = "supervisor"


@dataclass
class _RunningProcess:
    """A process that the launcher has started and not yet collected."""

    slot: str
    generation: int
    pid: int
    control: int
    report: int
    received: bytearray = field(default_factory=bytearray)
    ready: bool = False

    def lines(self) -> list[bytes]:
        """The complete lines of its report; one that was cut off by the end of the process is not complete."""
        return bytes(self.received).split(b"\n")[:-1]

    def result(self) -> ProcessResult | None:
        """How its job ended, if it has reported that."""
        return next((ProcessResult(*json.loads(line)) for line in self.lines() if line != READY), None)


class LauncherProcess:
    """The launcher, in its own process.

    Args:
        connection: to the supervisor.
        orders: what it is started with.
    """

    def __init__(self, connection: Connection, orders: LauncherOrders) -> None:
        self._connection = connection
        self._orders = orders
        self._tree = ProcessTree(orders.mark, os.getpid(), orders.cgroup)
        self._running: dict[int, _RunningProcess] = {}
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        self._closing = False

    def run(self) -> None:
        """Obey the supervisor until it sends ``CloseLauncher`` or dies; then end every process of the run."""
        adopt_orphans()
        gc.freeze()  # a later collection would write to objects, and so copy pages that forked children share
        for end in (self._wake_read, self._wake_write):
            os.set_blocking(end, False)
        # A handler that does nothing, and not SIG_IGN: only then does Python write to the wake-up file.
        signal.signal(signal.SIGCHLD, _do_nothing)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor handles Ctrl+C
        signal.signal(signal.SIGTERM, self._close)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._selector.register(self._connection, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._watch_supervisor()
        try:
            while not self._closing:
                self._step(None)
        except (EOFError, ConnectionError):  # the supervisor has died
            pass
        self._end_all()

    def _watch_supervisor(self) -> None:
        """Notice the supervisor's death by a pidfd.

        The end of the connection alone would not do: other children of the supervisor may hold its end open.
        """
        try:
            watch = os.pidfd_open(self._orders.supervisor)
        except (AttributeError, OSError):  # not Linux; or the supervisor has died already
            watch = None
        if watch is not None:
            self._selector.register(watch, selectors.EVENT_READ, data=_SUPERVISOR_DIED)
        if os.getppid() != self._orders.supervisor:
            self._closing = True

    def _close(self, *_: object) -> None:
        self._closing = True

    def _step(self, seconds: float | None) -> None:
        """Wait for something to happen, at most so long, and handle it."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._connection:
                while not self._closing and self._connection.poll():
                    self._obey(self._connection.recv())
            elif key.fileobj == self._wake_read:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, _MAX_READ_BYTES)
            elif key.data == _SUPERVISOR_DIED:
                self._closing = True
            else:
                self._read_report(self._running[key.data])
        self._collect()

    def _obey(self, command: LauncherCommand) -> None:
        match command:
            case StartProcess():
                self._start(command)
            case SetStopEvent():
                self._set_stop_events()
            case CloseLauncher():
                self._closing = True

    def _set_stop_events(self) -> None:
        for process in self._running.values():
            with contextlib.suppress(BrokenPipeError, BlockingIOError):
                os.write(process.control, STOP)

    def _start(self, start: StartProcess) -> None:
        control_read, control = os.pipe()
        report, report_write = os.pipe()
        for end in (control, report, report_write):
            os.set_blocking(end, False)
        pipes = ChildPipes(control_read, report_write)
        try:
            pid = self._spawn(start, pipes) if self._orders.method == "spawn" else self._fork(start, pipes)
        except OSError as error:  # no memory, or too many processes: the supervisor may try again later
            for end in (control, report, *pipes):
                os.close(end)
            result = ProcessResult("failed", f"it could not be started: {error}")
            self._send(ProcessStarted(start.slot, start.generation, 0))
            self._send(ProcessExited(start.slot, start.generation, 0, -1, result))
            return
        for end in pipes:
            os.close(end)
        self._running[pid] = _RunningProcess(start.slot, start.generation, pid, control, report)
        self._tree.add_session(pid)
        self._selector.register(report, selectors.EVENT_READ, data=pid)
        self._send(ProcessStarted(start.slot, start.generation, pid))

    def _fork(self, start: StartProcess, pipes: ChildPipes) -> int:
        launcher = os.getpid()
        pid = os.fork()
        if pid == 0:
            # The child must not hold the launcher's ends of pipes open, or nobody would see the end of the launcher.
            self._selector.close()
            self._connection.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            for process in self._running.values():
                os.close(process.control)
                os.close(process.report)
            run_child(start, self._orders.jobs[start.job], pipes, launcher)
        return pid

    def _spawn(self, start: StartProcess, pipes: ChildPipes) -> int:
        with _letter(start, self._orders.jobs[start.job], pipes, os.getpid()) as letter:
            passed = (*pipes, letter.fileno())
            for end in passed:
                os.set_inheritable(end, True)  # only for a moment: there is no other thread that could pass them on
            try:
                return os.posix_spawn(sys.executable, _command(letter), os.environ)
            finally:
                for end in passed:
                    os.set_inheritable(end, False)

    def _read_report(self, process: _RunningProcess) -> None:
        try:
            received = os.read(process.report, _MAX_READ_BYTES)
        except BlockingIOError:
            return
        process.received += received
        if not received:
            self._selector.unregister(process.report)
        if not process.ready and READY in process.lines():
            process.ready = True
            self._send(ProcessReady(process.slot, process.generation))

    def _collect(self) -> None:
        """Collect all processes that have ended, also adopted orphans, which would stay zombies otherwise."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            process = self._running.pop(pid, None)
            if process is None:
                continue
            # Read once more, but not to the end: a program that the process started may hold the pipe open.
            if process.report in self._selector.get_map():
                self._read_report(process)
            if process.report in self._selector.get_map():
                self._selector.unregister(process.report)
            os.close(process.report)
            os.close(process.control)
            code = os.waitstatus_to_exitcode(status)
            self._send(ProcessExited(process.slot, process.generation, pid, code, process.result()))

    def _send(self, event: LauncherEvent) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionError):  # noticed where the connection is read
            self._connection.send(event)

    def _end_all(self) -> None:
        """Leave nothing of the run behind."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for key in [each for each in self._selector.get_map().values() if each.data == _SUPERVISOR_DIED]:
            self._selector.unregister(key.fileobj)
        self._selector.unregister(self._connection)
        names = {pid: process.slot for pid, process in self._running.items()}
        stages = abort_stages(_GRACE_SECONDS, _TERMINATE_SECONDS)
        abort(stages, self._tree.living, names, self._set_stop_events, pause=self._step_for)
        if self._orders.cgroup is not None:
            self._orders.cgroup.remove()

    def _step_for(self, seconds: float) -> None:
        """Go on collecting processes for so long, while an abort waits for their end."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._step(left)


if __name__ == "__main__":
    main()
