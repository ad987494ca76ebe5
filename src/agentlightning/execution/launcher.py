"""The supervisor's side of the nursery: start it, talk to it, see it go."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection

from agentlightning.errors import InvalidValue
from agentlightning.execution.launcher_process import Nursery, Payload, StartMethod, serve
from agentlightning.execution.messages import Close, Exited, Job, Ready, Started, ToNursery
from agentlightning.execution.process_tree import Cgroup
from agentlightning.execution.shipping import pack

_log = logging.getLogger(__name__)
_LAST_SECONDS = 6.0
"""How long a nursery that was told to close may take; its own abort needs less."""


class NurseryLink:
    """The nursery, as its supervisor sees it.

    Args:
        connection: to it.
        pid: its number.
        method: how it starts processes.
    """

    def __init__(self, connection: Connection, pid: int, method: StartMethod) -> None:
        self._connection = connection
        self.pid = pid
        self.method: StartMethod = method
        self._closed = False

    def fileno(self) -> int:
        """What to wait on for messages."""
        return self._connection.fileno()

    def send(self, message: ToNursery) -> None:
        """Tell the nursery something; nothing happens if it is gone, which ``receive`` will say."""
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            self._connection.send(message)

    def receive(self) -> list[Started | Ready | Exited] | None:
        """What it has said since; None: it is gone."""
        messages: list[Started | Ready | Exited] = []
        try:
            while self._connection.poll():
                messages.append(self._connection.recv())
        except (EOFError, ConnectionError):
            return messages or None
        return messages

    def close(self) -> None:
        """Let it end what is left, and wait until it is gone. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.send(Close())
        until = time.monotonic() + _LAST_SECONDS
        while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > until:
                _log.error("the nursery (pid %d) does not end; it is killed", self.pid)
                os.kill(self.pid, 9)
                os.waitpid(self.pid, 0)
                break
            time.sleep(0.005)
        self._connection.close()


def choose_start_method(asked: StartMethod | None, jobs: Mapping[str, Job]) -> StartMethod:
    """How processes are started: as asked; else ``fork`` from a process with one thread, else ``forkserver``.

    Where there are threads and a job cannot be pickled, it is ``fork`` all the same, with a warning.
    """
    if asked is not None:
        return asked
    if _number_of_threads() == 1:
        return "fork"
    try:
        for name, job in jobs.items():
            pack(f"the {name}'s side", job)
    except InvalidValue as error:
        _log.warning("forking a process that has threads, which may hang the new one, because %s", error)
        return "fork"
    return "forkserver"


def open_nursery(jobs: Mapping[str, Job], method: StartMethod, mark: str, cgroup: Cgroup | None = None) -> NurseryLink:
    """Start a nursery that can do these jobs.

    Args:
        jobs: what its children will do, by name.
        method: how it starts them.
        mark: of the processes of the run.
        cgroup: of the run.

    Raises:
        InvalidValue: a job cannot be sent to another process; named, with the ways out.
    """
    if method == "fork":
        return _fork_nursery(jobs, mark, cgroup)
    packed = {name: pack(f"the {name}'s side", job) for name, job in jobs.items()}
    ours, theirs = socket.socketpair()
    with theirs, tempfile.TemporaryFile() as letter:
        pickle.dump((theirs.fileno(), os.getpid(), sys.path, packed, method, mark, cgroup), letter)
        letter.flush()
        process = subprocess.Popen(
            [
                sys.executable,
                *(f"-W{each}" for each in sys.warnoptions),
                "-m",
                "agentlightning.execution.launcher_main",
                str(letter.fileno()),
            ],
            pass_fds=(theirs.fileno(), letter.fileno()),
            start_new_session=True,
        )
    process.returncode = 0  # it is waited for by number, in `close`
    return NurseryLink(Connection(ours.detach()), process.pid, method)


def _fork_nursery(jobs: Mapping[str, Job], mark: str, cgroup: Cgroup | None) -> NurseryLink:
    ours, theirs = socket.socketpair()
    supervisor = os.getpid()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()  # what waits there must not be written twice
    with warnings.catch_warnings():
        # Python 3.12 and later warn of a fork where there are threads. Whoever gets here has asked for it, or was
        # warned by `choose_start_method`.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.setsid()
        ours.close()
        payloads = {name: Payload(job=job) for name, job in jobs.items()}
        serve(lambda: Nursery(Connection(theirs.detach()), payloads, "fork", mark, supervisor, cgroup))
    theirs.close()
    return NurseryLink(Connection(ours.detach()), pid, "fork")


def _number_of_threads() -> int:
    """Also those that Python does not know."""
    try:
        return max(threading.active_count(), len(os.listdir("/proc/self/task")))
    except OSError:
        return threading.active_count()
