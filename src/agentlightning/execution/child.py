"""The processes of a run: the messages about them, how a job gets into one, and its life."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, Literal, NamedTuple, NoReturn, cast

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]

from agentlightning.errors import InvalidValue
from agentlightning.execution.base import ThreadingEvent
from agentlightning.execution.process_tree import die_with_parent
from agentlightning.execution.quotas import Quotas
from agentlightning.runner.main_thread import MainThread
from agentlightning.runner.vital_signs import VITAL_SIGNS, VitalSigns

_log = logging.getLogger(__name__)

ProcessJob = Callable[[str, ThreadingEvent, Mapping[str, Any]], str]
"""What the processes of a run do. It gets the name of its slot, the stop event, soon after which it ends, and plain
values; it returns in one word how it ended. If it has a method ``wants_main_thread``, that gets the same values first,
and if it is true, the job runs in another thread, with a ``MAIN_THREAD``."""

# --- Messages between the supervisor and a launcher ------------------------------------------------------------------


class StartProcess(NamedTuple):
    """Command: start a process."""

    slot: str  # the slot that the process fills: for a runner, its worker id
    arguments: Mapping[str, Any]  # plain values for the job
    environment: Mapping[str, str]  # added to the environment
    quotas: Quotas | None = None
    cgroup: str | None = None  # directory of the control group that it joins
    memory_is_limited: bool = False  # whether that group limits its memory
    signs_place: int | None = None  # its place in the memory for vital signs


LauncherCommand = StartProcess | Literal["stop", "close"]
"""``stop`` sets the stop event of every process; ``close`` ends all processes that are left, then the launcher."""


class ProcessResult(NamedTuple):
    """How a job ended, reported by the process that did it."""

    status: str  # `done`, another word that the job returned, `interrupted` or `failed`
    error: str = ""  # if it failed: the last line of the traceback
    traceback: str = ""
    exhausted: str = ""  # which resource was used up, if that is why it failed


class ProcessEvent(NamedTuple):
    """What the launcher reports of a process."""

    slot: str
    what: Literal["started", "ready", "exited"]  # `ready`: it has loaded its job and begins with it
    pid: int  # 0: it could not be made
    code: int = 0  # of one that has exited, as in `subprocess`: negative for a signal
    result: ProcessResult | None = None  # None: it ended before it could report one
    output: str = ""  # of one that has exited: the last lines that it printed


# --- How a job gets into a process: by a fork, or packed and sent to a new interpreter --------------------------------
# Packed with cloudpickle, because pickle itself refuses closures, lambdas and what a script or a notebook defines.

StartMethod = Literal["fork", "spawn", "forkserver"]


_BUNDLE = ".bundle."
"""The way from a side's job to what the user gave."""


def choose_start_method(requested: StartMethod | None, what: str, job: object) -> StartMethod:
    """How processes are started: as requested; else ``fork`` from a process with one thread, else ``forkserver``.

    If there are more threads and the job, which ``what`` names, cannot be pickled, the method is ``fork`` nevertheless,
    with a warning.
    """
    if requested is not None:
        return requested
    try:  # threads that Python does not know count too
        threads = max(threading.active_count(), len(os.listdir("/proc/self/task")))
    except OSError:
        threads = threading.active_count()
    if threads == 1:
        return "fork"
    try:
        pack(what, job)
    except InvalidValue as error:
        _log.warning("forking a process that has threads, which may block the new one for ever, because %s", error)
        return "fork"
    return "forkserver"


def pack(what: str, value: object) -> bytes:
    """``value`` as bytes; ``what`` names it in an error message.

    Raises:
        InvalidValue: something in it cannot be packed; the message names it and the alternatives.
    """
    try:
        return cloudpickle.dumps(value)  # pyright: ignore[reportUnknownMemberType]
    except Exception as error:  # the objects' own code runs here, and may raise anything
        path, culprit = _find_culprit(value)
        named = f"{what}{path}"
        if path.startswith(_BUNDLE):  # what a user knows: the agent, the tracer
            named = path.removeprefix(_BUNDLE)
        raise InvalidValue(
            f"{named}, a {type(culprit).__module__}.{type(culprit).__qualname__}, cannot be sent to another "
            f"process: {error}. Make it where it is used (in the agent's rollout, or when it is first asked for); or "
            "use start_method='fork', which needs no pickling; or strategy 'shm', which has no other processes"
        ) from error


def unpack(what: str, data: bytes) -> Any:
    """The object that was packed. Raises what its modules raise when they are imported here."""
    try:
        return pickle.loads(data)
    except ModuleNotFoundError as error:
        error.add_note(f"{what} was defined in a module that cannot be imported in this process")
        raise


def _find_culprit(value: object) -> tuple[str, object]:
    """The object that cannot be packed, and the path to it from ``value``."""
    visited: list[object] = []

    class Recorder(cloudpickle.Pickler):
        # Called with each object before that is packed. The last one is the culprit.
        persistent_id = staticmethod(visited.append)  # pyright: ignore[reportAssignmentType]

    with contextlib.suppress(Exception):
        Recorder(io.BytesIO()).dump(value)  # pyright: ignore[reportUnknownMemberType]
    culprit, known = visited[-1], {id(each) for each in visited}
    ways, pending = {id(value): ""}, deque([value])
    while pending and id(culprit) not in ways:
        owner = pending.popleft()
        for step, part in _parts(owner):
            if id(part) in known and id(part) not in ways:
                ways[id(part)] = ways[id(owner)] + step
                if not isinstance(part, str):
                    pending.append(part)
    return ways.get(id(culprit), " …"), culprit


def _parts(owner: object) -> Iterable[tuple[str, object]]:
    """What an object refers to, each with how code writes the way there."""
    match owner:
        case MethodType():
            return [(".__self__", owner.__self__)]
        case FunctionType():
            code = owner.__code__
            cells = dict(zip(code.co_freevars, owner.__closure__ or (), strict=True))
            found = {name: cell.cell_contents for name, cell in cells.items()}
            found |= {name: owner.__globals__[name] for name in code.co_names if name in owner.__globals__}
            return zip(map(" → {}".format, found), found.values(), strict=True)
        case Mapping():
            items = cast("Mapping[object, object]", owner)
            return zip(map("[{!r}]".format, items), items.values(), strict=True)
        case list() | tuple() | set() | frozenset():
            return zip(map("[{}]".format, count()), cast("Iterable[object]", owner), strict=False)
        case _:
            attributes = cast("dict[str, object]", getattr(owner, "__dict__", {}))
            return zip(map(".{}".format, attributes), attributes.values(), strict=True)


# --- The life of a child ---------------------------------------------------------------------------------------------

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
STOP = b"S"
"""What the launcher sends to set the stop event. The end of the connection: the launcher has died."""
READY = b"ready"
"""The first line that a child sends; the next one, if any, is its ``ProcessResult`` as JSON."""
_MAX_CHARACTERS = 40_000
"""Of the traceback that is reported, and of its last line."""


def run_child(
    start: StartProcess, side: str, job: ProcessJob | bytes, channel: int, launcher_pid: int, signs_file: int
) -> NoReturn:
    """Do a job, then end this process without unwinding anything that existed before the fork.

    A job that is packed is unpacked only after the quotas apply, because the modules that it imports run code of their
    own. ``channel`` is the descriptor of the socket to the launcher, ``signs_file`` that of the memory for vital signs.
    """
    connection = socket.socket(fileno=channel)
    connection.settimeout(None)  # whatever `socket.setdefaulttimeout` the program has called

    def do_all() -> str:
        _settle(start, launcher_pid)
        if start.signs_place is not None:
            VITAL_SIGNS.set(VitalSigns(signs_file, start.signs_place))
        os.close(signs_file)
        event = ThreadingEvent()
        threading.Thread(target=_watch_launcher, args=(connection, event), name="agl-control", daemon=True).start()
        do_job: ProcessJob = unpack(side, job) if isinstance(job, bytes) else job
        _report(connection, READY)
        work = partial(do_job, start.slot, event, start.arguments)
        wants_main_thread = getattr(do_job, "wants_main_thread", None)
        if wants_main_thread is not None and wants_main_thread(start.arguments):
            MainThread().serve(partial(_end_with, connection, work))
        return work()

    _end_with(connection, do_all)


def _end_with(connection: socket.socket, work: Callable[[], str]) -> NoReturn:
    """Do the work, report how that ended, and end this process; any thread may call."""
    code = EXIT_FAILED
    try:
        result = ProcessResult(work())
        code = 0
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        result = ProcessResult("interrupted")
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else EXIT_FAILED if request.code else 0
        result = ProcessResult("done" if code == 0 else "failed", f"SystemExit: {request.code}")
    except BaseException as error:  # noqa: BLE001 - the boundary of the process: reported to its parent
        last_line = _shortened(traceback.format_exception_only(error)[-1].strip())
        text = _shortened("".join(traceback.format_exception(error)))
        result = ProcessResult("failed", last_line, text, "its memory" if isinstance(error, MemoryError) else "")
    _report(connection, json.dumps(result).encode())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    # Not `sys.exit`: after a fork it would run the parent's `finally` blocks and exit handlers a second time.
    os._exit(code)


def _shortened(text: str) -> str:
    half = _MAX_CHARACTERS // 2
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:half]}\n…\n{text[-half:]}"


def _settle(start: StartProcess, launcher_pid: int) -> None:
    """Give this process its own session, signal handlers, environment and limits."""
    # A session of its own: Ctrl+C in the terminal reaches only the main process, which stops the others in order, and
    # everything that the agent starts can be found and signalled by the session's number.
    if os.getsid(0) != os.getpid():
        os.setsid()
    die_with_parent(launcher_pid)
    # A fork inherits the launcher's signal handling, which would wake the launcher's selector.
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # What an agent prints shall be seen when it prints it, also if its process crashes.
    with contextlib.suppress(AttributeError, ValueError):  # another object has taken the place of the stream
        cast("io.TextIOWrapper", sys.stdout).reconfigure(line_buffering=True)
    os.environ.update(start.environment)
    if start.cgroup is not None:
        try:
            Path(start.cgroup, "cgroup.procs").write_text("0")  # 0: the process that writes (cgroups(7))
        except OSError:
            # Some systems let us make a group but join none. The process tree then finds processes in other ways, but
            # nothing else would limit the memory.
            if start.memory_is_limited:
                raise
    if start.quotas is not None:
        start.quotas.apply(memory_is_limited=start.memory_is_limited)


def _watch_launcher(connection: socket.socket, event: ThreadingEvent) -> None:
    """Set the stop event when the launcher asks for it; kill this process group when the launcher has died."""
    with contextlib.suppress(OSError):
        while received := connection.recv(64):
            if STOP in received:
                event.set()
    # On Linux the kernel has sent SIGKILL already (`die_with_parent`); elsewhere the end of the pipe is the only sign.
    os.killpg(0, signal.SIGKILL)


def _report(connection: socket.socket, line: bytes) -> None:
    with contextlib.suppress(OSError):  # the launcher has died, so this process ends soon too
        connection.sendall(line + b"\n")
