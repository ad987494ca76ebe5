"""The processes of a run: the messages about them, the slots that they fill, and the life of one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

from agentlightning.execution.base import ThreadingEvent
from agentlightning.execution.process_tree import Cgroup, die_with_parent
from agentlightning.execution.quotas import CrashCounter, Quotas, RestartPolicy, exhausted
from agentlightning.execution.shipping import unpack

# --- Messages between the supervisor and a launcher ------------------------------------------------------------------


class StartProcess(NamedTuple):
    """Command: start a process."""

    slot: str
    """The slot that the process fills: for a runner, its worker id."""
    generation: int
    """1 for the first process of a slot, then counted up."""
    job: str
    """Which of the launcher's jobs it does."""
    arguments: Mapping[str, Any]
    """Plain values for the job."""
    environment: Mapping[str, str]
    """Added to the environment."""
    quotas: Quotas | None = None
    cgroup: str | None = None
    """Directory of the control group that it joins."""
    memory_is_limited: bool = False
    """Whether that group limits its memory."""


class SetStopEvent(NamedTuple):
    """Command: set the stop event of every process."""


class CloseLauncher(NamedTuple):
    """Command: end all processes that are left, then the launcher."""


LauncherCommand = StartProcess | SetStopEvent | CloseLauncher


class ProcessResult(NamedTuple):
    """How a job ended, reported by the process that did it."""

    status: str
    """``done``, another word that the job returned, ``interrupted`` or ``failed``."""
    error: str = ""
    """If it failed: the last line of the traceback."""
    traceback: str = ""
    exhausted: str = ""
    """Which resource was used up, if that is why it failed."""


class ProcessStarted(NamedTuple):
    """Event: the process runs. Its number is 0 if it could not be made; then ``ProcessExited`` follows."""

    slot: str
    generation: int
    pid: int


class ProcessReady(NamedTuple):
    """Event: the process has loaded its job and begins with it."""

    slot: str
    generation: int


class ProcessExited(NamedTuple):
    """Event: the process has ended."""

    slot: str
    generation: int
    pid: int
    code: int
    """As in ``subprocess``: negative for a signal."""
    result: ProcessResult | None
    """None: it ended before it could report one."""


LauncherEvent = ProcessStarted | ProcessReady | ProcessExited


class ProcessJob(Protocol):
    """What a process does."""

    def __call__(self, slot: str, event: ThreadingEvent, arguments: Mapping[str, Any]) -> str:
        """Do the job, and end soon after ``event`` is set; return how it ended in one word."""
        ...


class ChildPipes(NamedTuple):
    """The child's ends of the two pipes between it and the launcher."""

    control: int
    """To read from."""
    report: int
    """To write to."""


# --- Slots -----------------------------------------------------------------------------------------------------------

SlotState = Literal["starting", "running", "waiting", "ended", "given up"]
"""``waiting``: its process crashed, and the next one starts soon. ``ended``: its process has ended without a crash, or
is not needed any more."""


@dataclass(frozen=True)
class Crash:
    """How a process failed."""

    slot: str
    pid: int
    what: str
    """The predicate of a sentence: "was killed by SIGSEGV"."""
    traceback: str
    exhausted: bool
    """Whether it had exceeded one of its quotas."""

    def __str__(self) -> str:
        return f"{self.slot} (pid {self.pid}) {self.what}"


@dataclass
class Slot:
    """A place that one process after another fills (its *generations*).

    A process that crashes is replaced by the next one, until the restart policy gives the slot up.

    Args:
        name: of the slot; for a runner, its worker id.
        job: which job is done here.
        arguments: plain values for the job.
        restart: when a process that crashes is replaced; None: never.
        quotas: limits of each process.
        environment: added to that of each process.
    """

    name: str
    job: str
    arguments: Mapping[str, Any]
    restart: RestartPolicy | None
    quotas: Quotas | None = None
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    cgroup: Cgroup | None = None
    state: SlotState = "ended"
    generation: int = 0
    ready: bool = False
    """Whether the process of this generation has begun with its job."""
    pid: int = 0
    began: float = 0.0
    result: ProcessResult | None = None
    """Of the last process."""
    crash: Crash | None = None
    """The last one."""
    _crashes: CrashCounter | None = None
    _memory_kills: int = 0

    @property
    def is_live(self) -> bool:
        """Whether a process is there, or will be."""
        return self.state in ("starting", "running", "waiting")

    def next_start(self, now: float) -> StartProcess:
        """Begin the next generation; return the command for the launcher."""
        self.generation += 1
        self.state, self.ready, self.pid, self.began, self.result = "starting", False, 0, now, None
        limited = False
        if self.cgroup is not None and self.quotas is not None and self.quotas.memory_bytes is not None:
            limited = self.cgroup.limit_memory(self.quotas.memory_bytes)
        cgroup = None if self.cgroup is None else str(self.cgroup.path)
        return StartProcess(
            self.name, self.generation, self.job, self.arguments, self.environment, self.quotas, cgroup, limited
        )

    def end(self, exited: ProcessExited, allowed_exit_codes: frozenset[int]) -> Crash | None:
        """Note the end of a process; return how it crashed, or None if it did not."""
        self.state, self.result = "ended", exited.result
        kills = 0 if self.cgroup is None else self.cgroup.memory_kills()
        new_kills, self._memory_kills = kills - self._memory_kills, kills
        failed = exited.result is not None and exited.result.status == "failed"
        if exited.code in allowed_exit_codes and not failed:
            return None
        used_up = exhausted(self.quotas, exited.code, memory_kills=new_kills)
        if used_up is None and exited.result is not None and exited.result.exhausted:
            used_up = exited.result.exhausted
        self.crash = Crash(
            slot=self.name,
            pid=exited.pid,
            what=_describe(exited, used_up),
            traceback=exited.result.traceback if exited.result else "",
            exhausted=used_up is not None,
        )
        return self.crash

    def restart_delay(self, now: float) -> float | None:
        """Seconds from a crash until the next start; None: there is none."""
        if self.restart is None:
            return None
        self._crashes = self._crashes or CrashCounter(self.restart)
        return self._crashes.crashed(now - self.began, now)


def _describe(exited: ProcessExited, used_up: str | None) -> str:
    if exited.code < 0 and exited.pid:
        try:
            name = signal.Signals(-exited.code).name
        except ValueError:  # a real-time signal
            name = f"signal {-exited.code}"
        how = f"was killed by {name}"
    elif exited.result is not None and exited.result.status == "failed":
        how = f"failed: {exited.result.error}"
    else:
        how = f"ended with exit code {exited.code}"
    return how if used_up is None else f"{how}, having used up {used_up}"


# --- The life of a child ---------------------------------------------------------------------------------------------

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
STOP = b"S"
"""What the launcher writes into a control pipe to set the stop event. End of file: the launcher has died."""
READY = b"ready"
"""The first line in a report pipe; the next line, if any, is the ``ProcessResult``."""

_MAX_REPORT_BYTES = 60_000
"""A report must fit into the pipe's buffer (64 KiB), because the launcher may be too busy to read it."""


def run_child(start: StartProcess, job: ProcessJob | bytes, pipes: ChildPipes, launcher_pid: int) -> NoReturn:
    """Do a job, then end this process without unwinding anything that existed before the fork.

    Args:
        start: what to do.
        job: the job itself, or packed. It is unpacked only after the quotas apply, because the modules that it imports
            run code of their own.
        pipes: to the launcher.
        launcher_pid: number of the launcher's process.
    """
    code = EXIT_FAILED
    try:
        _settle(start, launcher_pid)
        event = ThreadingEvent()
        threading.Thread(target=_watch_control, args=(pipes.control, event), name="agl-control", daemon=True).start()
        do_job: ProcessJob = unpack(f"the {start.job}'s side", job) if isinstance(job, bytes) else job
        _report(pipes.report, READY)
        result = ProcessResult(do_job(start.slot, event, start.arguments))
        code = 0
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        result = ProcessResult("interrupted")
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else EXIT_FAILED if request.code else 0
        result = ProcessResult("done" if code == 0 else "failed", f"SystemExit: {request.code}")
    except BaseException as error:  # noqa: BLE001 - the boundary of the process: reported to its parent
        result = _failure(error)
    _report(pipes.report, _encode(result))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    # Not `sys.exit`: after a fork it would run the parent's `finally` blocks and exit handlers a second time.
    os._exit(code)


def _failure(error: BaseException) -> ProcessResult:
    last_line = traceback.format_exception_only(error)[-1].strip()
    exhausted = "its memory" if isinstance(error, MemoryError) else ""
    return ProcessResult("failed", last_line, "".join(traceback.format_exception(error)), exhausted)


def _encode(result: ProcessResult) -> bytes:
    """The result as one line; the middle of a traceback that is too long is left out."""
    encoded = json.dumps(result).encode()
    keep = len(result.traceback)
    while len(encoded) > _MAX_REPORT_BYTES and keep:
        keep //= 2
        shorter = f"{result.traceback[: keep // 2]}\n…\n{result.traceback[-(keep // 2) :]}" if keep > 1 else ""
        encoded = json.dumps(result._replace(error=result.error[:1000], traceback=shorter)).encode()
    return encoded


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


def _watch_control(control: int, event: ThreadingEvent) -> None:
    """Set the stop event when the launcher asks for it; kill this process group when the launcher has died."""
    while received := os.read(control, 64):
        if STOP in received:
            event.set()
    # On Linux the kernel has sent SIGKILL already (`die_with_parent`); elsewhere the end of the pipe is the only sign.
    os.killpg(0, signal.SIGKILL)


def _report(pipe: int, line: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, BlockingIOError):  # the launcher has died, so this process ends soon too
        os.write(pipe, line + b"\n")
