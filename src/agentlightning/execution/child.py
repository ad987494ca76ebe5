"""The life of a process that the nursery has started, from its first instruction to its last."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from agentlightning.execution.events import ThreadingEvent
from agentlightning.execution.messages import Child, Job, Outcome, Start
from agentlightning.execution.process_tree import die_with_parent

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
STOP = b"S"
"""What the nursery writes to a child to set its stop event. The end of the file means that the nursery is gone."""
READY = b"ready"
"""What a child writes when it begins with its job; its next line, if any, is its outcome."""
_MOST_SAID = 60_000
"""Bytes. What a child says must fit into a pipe that nobody reads meanwhile."""


class Lines(NamedTuple):
    """The two pipes between the nursery and a child: the child's ends."""

    control: int
    """To read from."""
    report: int
    """To write to."""


def live(start: Start, load: Callable[[], Job], lines: Lines, nursery: int) -> NoReturn:
    """Do a job, and end this process with it. Nothing of what was there before the fork is unwound or run.

    Args:
        start: what is to be done.
        load: gets the job; the process is what it will be by then, so what is imported runs within the quotas.
        lines: to the nursery.
        nursery: number of the nursery's process, which must have one thread only.
    """
    code = EXIT_FAILED
    try:
        _settle(start, nursery)
        event = ThreadingEvent()
        threading.Thread(target=_listen, args=(lines.control, event), name="agl-control", daemon=True).start()
        job = load()
        _say(lines.report, READY)
        outcome = Outcome(job(Child(start.slot, event), start.arguments))
        code = 0
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        outcome = Outcome("interrupted")
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else EXIT_FAILED if request.code else 0
        outcome = Outcome("done" if code == 0 else "failed", f"SystemExit: {request.code}")
    except BaseException as error:  # noqa: BLE001 - the boundary of the process: told to its parent
        outcome = outcome_of(error)
    _say(lines.report, _encoded(outcome))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def outcome_of(error: BaseException) -> Outcome:
    """What an exception that ended a job looks like to others."""
    last_line = traceback.format_exception_only(error)[-1].strip()
    exhausted = "its memory" if isinstance(error, MemoryError) else ""
    return Outcome("failed", last_line, "".join(traceback.format_exception(error)), exhausted)


def _encoded(outcome: Outcome) -> bytes:
    """As one line; the middle of a traceback that is too long is left out."""
    encoded = json.dumps(outcome).encode()
    keep = len(outcome.traceback)
    while len(encoded) > _MOST_SAID and keep:
        keep //= 2
        shorter = f"{outcome.traceback[: keep // 2]}\n…\n{outcome.traceback[-(keep // 2) :]}" if keep > 1 else ""
        encoded = json.dumps(outcome._replace(error=outcome.error[:1000], traceback=shorter)).encode()
    return encoded


def _settle(start: Start, nursery: int) -> None:
    """Make this process one of its own: session, signals, environment, limits."""
    if os.getsid(0) != os.getpid():
        os.setsid()
    die_with_parent(nursery)
    signal.set_wakeup_fd(-1)
    for number, way in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGCHLD, signal.SIG_DFL),
    ):
        signal.signal(number, way)
    os.environ.update(start.environment)
    if start.cgroup is not None:
        try:
            Path(start.cgroup, "cgroup.procs").write_text("0")
        except OSError:  # some systems let us make a group and join none; then other ways must do
            if start.memory_is_limited:
                raise
    if start.quotas is not None:
        start.quotas.apply(memory_is_limited=start.memory_is_limited)


def _listen(control: int, event: ThreadingEvent) -> None:
    """Set the event when told; end with the nursery, where the kernel does not see to that."""
    while heard := os.read(control, 64):
        if STOP in heard:
            event.set()
    os.killpg(0, signal.SIGKILL)


def _say(report: int, line: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, BlockingIOError):  # the nursery is gone; so are we, soon
        os.write(report, line + b"\n")
