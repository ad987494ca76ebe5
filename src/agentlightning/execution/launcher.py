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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import IO, Any, NamedTuple, NoReturn

from agentlightning.execution.abort import Abort, abort_stages
from agentlightning.execution.child import (
    READY,
    STOP,
    LauncherCommand,
    ProcessEvent,
    ProcessJob,
    ProcessResult,
    StartMethod,
    StartProcess,
    pack,
    run_child,
)
from agentlightning.execution.output import OutputRelay, Printed
from agentlightning.execution.process_tree import Cgroup, ProcessTree, adopt_orphans

_log = logging.getLogger(__name__)

_CLOSE_SECONDS = 6.0
"""How long a launcher may take to close; its own abort needs at most 4 seconds."""


class LauncherOrders(NamedTuple):
    """What a launcher is started with."""

    supervisor: int  # number of the supervisor's process
    side: str  # whose job its processes do, for messages
    job: ProcessJob | bytes  # the job, or packed
    method: StartMethod
    """``fork`` and ``forkserver``: processes are forks of the launcher; ``spawn``: each is a new interpreter."""
    mark: str  # of the processes of the run
    cgroup: Cgroup | None  # of the run; the launcher removes it at the end
    signs_file: int  # descriptor of the memory for vital signs


class Launcher:
    """The launcher as its supervisor sees it. This starts it, and packs its job if it is a new interpreter.

    Raises:
        InvalidValue: the job cannot be sent to another process; the message names it and the alternatives.
    """

    def __init__(self, orders: LauncherOrders) -> None:
        if orders.method != "fork":
            orders = orders._replace(job=pack(orders.side, orders.job))
        ours, theirs = socket.socketpair()
        for each in (ours, theirs):
            each.setblocking(True)  # whatever `socket.setdefaulttimeout` the program has called
        with theirs:
            if orders.method == "fork":
                self.pid = _fork(ours, theirs, orders)
            else:
                with _letter(theirs.fileno(), orders) as letter:
                    passed = (theirs.fileno(), letter.fileno(), orders.signs_file)
                    process = subprocess.Popen(_command(letter), pass_fds=passed, start_new_session=True)
                process.returncode = 0  # `close` waits for it; without this Popen would warn that it still runs
                self.pid = process.pid
        self._connection = Connection(ours.detach())

    def fileno(self) -> int:
        """A file that is readable when ``receive`` has something to return."""
        return self._connection.fileno()

    def send(self, command: LauncherCommand) -> None:
        """Send a command. If the launcher has died nothing happens; ``receive`` reports that."""
        with contextlib.suppress(ConnectionError):
            self._connection.send(command)

    def receive(self) -> list[ProcessEvent] | None:
        """The events since the last call; None: the launcher has died."""
        events: list[ProcessEvent] = []
        try:
            while self._connection.poll():
                events.append(self._connection.recv())
        except (EOFError, ConnectionError):
            return events or None
        return events

    def close(self) -> None:
        """End all processes that are left, and the launcher; blocks."""
        self.send("close")
        until = time.monotonic() + _CLOSE_SECONDS
        while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > until:
                _log.error("the launcher (pid %d) does not end within %g s and is killed", self.pid, _CLOSE_SECONDS)
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
            time.sleep(0.005)
        self._connection.close()


def _fork(ours: socket.socket, theirs: socket.socket, orders: LauncherOrders) -> int:
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
    return pid


# --- New interpreters: a launcher (spawn, forkserver) or a child (spawn). They get an open file with their orders. ----

PRELOADED = ("agentlightning.execution.run", "agentlightning.runner.agent", "agentlightning.tracer.otel")
"""What runners need and a forkserver imports once, for all of them. None of it starts a thread."""


def _letter(*content: Any) -> IO[bytes]:
    """A file without a name that has the orders of a new interpreter, and this one's module search path.

    The orders may have a key in them, so the file is in memory; on a system without such files it is a temporary one.
    """
    letter: IO[bytes]
    try:
        letter = open(os.memfd_create("agl-letter"), "w+b")  # noqa: SIM115 - the caller closes it
    except (AttributeError, OSError):  # another system than Linux
        letter = tempfile.TemporaryFile()  # noqa: SIM115
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


def _do_nothing(*_: object) -> None:
    return


@dataclass
class _RunningProcess:
    """A process that the launcher has started and not yet collected."""

    slot: str
    pid: int
    channel: socket.socket
    printed: Printed
    received: bytes = b""  # the beginning of a line
    result: ProcessResult | None = None


class LauncherProcess:
    """The launcher, in its own process. ``connection`` leads to the supervisor."""

    def __init__(self, connection: Connection, orders: LauncherOrders) -> None:
        self._connection = connection
        self._orders = orders
        self._tree = ProcessTree(orders.mark, os.getpid(), orders.cgroup)
        self._running: dict[int, _RunningProcess] = {}
        self._selector = selectors.DefaultSelector()
        self._output = OutputRelay(self._selector)
        self._wake_read, self._wake_write = os.pipe()
        self._closing = False

    def run(self) -> None:
        """Obey the supervisor until it sends ``close`` or dies; then end every process of the run."""
        adopt_orphans()
        gc.freeze()  # a later collection would write to objects, and so copy pages that forked children share
        for end in (self._wake_read, self._wake_write):
            os.set_blocking(end, False)
        # A handler that does nothing, and not SIG_IGN: only then does Python write to the wake-up file.
        signal.signal(signal.SIGCHLD, _do_nothing)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor handles Ctrl+C
        signal.signal(signal.SIGTERM, self._close)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._selector.register(self._connection, selectors.EVENT_READ, self._obey)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._wake)
        # The end of the connection alone does not show that the supervisor died: its other children may hold it open.
        with contextlib.suppress(AttributeError, OSError):  # not Linux; or it has died already
            watch = os.pidfd_open(self._orders.supervisor)
            self._selector.register(watch, selectors.EVENT_READ, self._close)
        if os.getppid() != self._orders.supervisor:
            self._close()
        while not self._closing:
            self._step(None)
        self._end_all()

    def _step(self, seconds: float | None) -> None:
        """Wait for something to happen, at most so long, and handle it."""
        for key, _ in self._selector.select(seconds):
            if isinstance(key.data, _RunningProcess):
                self._read(key.data)
            else:
                key.data()
        self._collect()

    def _close(self, *_: object) -> None:
        self._closing = True

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, _MAX_READ_BYTES)

    def _obey(self) -> None:
        try:
            while not self._closing and self._connection.poll():
                command: LauncherCommand = self._connection.recv()
                if isinstance(command, StartProcess):
                    self._start(command)
                elif command == "stop":
                    self._set_stop_events()
                else:
                    self._close()
        except (EOFError, ConnectionError):  # the supervisor has died
            self._close()

    def _set_stop_events(self) -> None:
        for process in self._running.values():
            with contextlib.suppress(OSError):  # it has just ended, or has many of them already
                process.channel.send(STOP)

    def _start(self, start: StartProcess) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            with theirs:
                printed, write = self._output.begin()
                try:
                    spawned = self._orders.method == "spawn"
                    pid = self._spawn(start, theirs, write) if spawned else self._fork(start, ours, theirs, write)
                finally:
                    os.close(write)
        except OSError as error:  # no memory, or too many processes: the supervisor may try again later
            ours.close()
            result = ProcessResult("failed", f"it could not be started: {error}")
            self._send(ProcessEvent(start.slot, "exited", 0, -1, result))
            return
        self._running[pid] = process = _RunningProcess(start.slot, pid, ours, printed)
        self._tree.add_session(pid)
        self._selector.register(ours, selectors.EVENT_READ, process)
        self._send(ProcessEvent(start.slot, "started", pid))

    def _fork(self, start: StartProcess, ours: socket.socket, theirs: socket.socket, write: int) -> int:
        launcher = os.getpid()
        pid = os.fork()
        if pid == 0:
            # The child must not hold the launcher's ends open, or nobody would see the end of the launcher.
            self._selector.close()
            self._connection.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            for channel in (ours, *(process.channel for process in self._running.values())):
                channel.close()
            self._output.give(write)
            run_child(start, self._orders.side, self._orders.job, theirs.detach(), launcher, self._orders.signs_file)
        return pid

    def _spawn(self, start: StartProcess, theirs: socket.socket, write: int) -> int:
        orders = self._orders
        content = (start, orders.side, orders.job, theirs.fileno(), os.getpid(), orders.signs_file)
        with _letter(*content) as letter:
            passed = (theirs.fileno(), letter.fileno(), orders.signs_file)
            for end in passed:
                os.set_inheritable(end, True)  # only for a moment: there is no other thread that could pass them on
            try:
                streams = [(os.POSIX_SPAWN_DUP2, write, each) for each in self._output.streams]
                return os.posix_spawn(sys.executable, _command(letter), os.environ, file_actions=streams)
            finally:
                for end in passed:
                    os.set_inheritable(end, False)

    def _read(self, process: _RunningProcess) -> None:
        try:
            received = process.channel.recv(_MAX_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._selector.unregister(process.channel)
        *lines, process.received = (process.received + received).split(b"\n")
        for line in lines:
            if line == READY:
                self._send(ProcessEvent(process.slot, "ready", process.pid))
            else:
                process.result = ProcessResult(*json.loads(line))

    def _collect(self) -> None:
        """Collect all processes that have ended, also adopted orphans, which would stay zombies otherwise."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                process = self._running.pop(ended[0], None)
                if process is None:
                    continue
                # Read once more, but not to the end: a program that the process started may hold the socket open.
                if process.channel in self._selector.get_map():
                    self._read(process)
                if process.channel in self._selector.get_map():
                    self._selector.unregister(process.channel)
                process.channel.close()
                self._output.drain(process.printed)
                code, end = os.waitstatus_to_exitcode(ended[1]), process.printed.end()
                self._send(ProcessEvent(process.slot, "exited", process.pid, code, process.result, end))

    def _send(self, event: ProcessEvent) -> None:
        with contextlib.suppress(ConnectionError):  # noticed where the connection is read
            self._connection.send(event)

    def _end_all(self) -> None:
        """Leave nothing of the run behind."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for key in [each for each in self._selector.get_map().values() if each.data in (self._close, self._obey)]:
            self._selector.unregister(key.fileobj)
        names = {pid: process.slot for pid, process in self._running.items()}
        steps = Abort(self._tree.living, names, self._set_stop_events).steps(
            abort_stages(_GRACE_SECONDS, _TERMINATE_SECONDS)
        )
        for seconds in steps:  # go on collecting processes, while the abort waits for their end
            until = time.monotonic() + seconds
            while (left := until - time.monotonic()) > 0:
                self._step(left)
        if self._orders.cgroup is not None:
            self._orders.cgroup.remove()


if __name__ == "__main__":
    main()
