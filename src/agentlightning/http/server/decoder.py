"""Large bodies are read in processes of their own.

To decode and check a body takes time in proportion to its size, most of it in calls that hold the interpreter's lock
from their beginning to their end, so that a thread would hold up the event loop all the same. Another process does not.
It gets the bytes and sends back, in parts of moderate size, what there is to do. It keeps nothing from one body to the
next, so it may end at any time.

There are two, so that bodies of a usual size do not wait behind huge ones. Each starts with the first body for it, and
ends when there has been none for a while.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from agentlightning.errors import AgentLightningError, StoreUnavailable

_log = logging.getLogger(__name__)

Read = Callable[[bytes], Iterable[Any]]
"""What a process is to do with a body: a function that it can import, perhaps with arguments (``functools.partial``).
It returns the parts of the result, and raises ``AgentLightningError`` for a body that is refused."""

_USUAL_BYTES = 1024 * 1024
_IDLE_SECONDS = 60.0
_ANSWER_SECONDS = 120.0
"""The longest silence of a process before it is taken for stuck. The worst body takes a tenth of it."""
_LOOK_SECONDS = 1.0
_NICE = 5
"""The process yields to those that answer requests, where there are too few cores."""
_LENGTH_BYTES = 4
_PIECE_BYTES = 256 * 1024


class _Job(NamedTuple):
    read: Read
    parts: list[bytes]
    done: concurrent.futures.Future[list[Any]]


class Decoder:
    """Reads bodies in other processes. For any event loop; ``close`` ends all processes.

    Args:
        idle_seconds: how long a process may stay without a body.
    """

    def __init__(self, idle_seconds: float = _IDLE_SECONDS) -> None:
        self._usual, self._huge = _Lane(idle_seconds), _Lane(idle_seconds)

    async def read(self, read: Read, parts: list[bytes]) -> list[Any]:
        """The parts of what ``read`` makes of a body.

        Args:
            read: called in another process with the whole body.
            parts: the body; the list is emptied as it is sent.

        Raises:
            AgentLightningError: what ``read`` raises.
            StoreUnavailable: the process has died, or cannot be started.
        """
        lane = self._usual if sum(map(len, parts)) <= _USUAL_BYTES else self._huge
        return await asyncio.wrap_future(lane.submit(read, parts))

    def close(self) -> None:
        """End the processes; what they were reading fails. Idempotent; blocks."""
        self._usual.close()
        self._huge.close()


class _Lane:
    """One process, and the thread that talks to it: one body after another."""

    def __init__(self, idle_seconds: float) -> None:
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._closed = False

    def submit(self, read: Read, parts: list[bytes]) -> concurrent.futures.Future[list[Any]]:
        job = _Job(read, parts, concurrent.futures.Future())
        with self._lock:
            if self._closed:
                raise StoreUnavailable("the server is stopping; retry at its successor")
            self._jobs.put(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="agl-decoder", daemon=True)
                self._thread.start()
        return job.done

    def close(self) -> None:
        with self._lock:
            self._closed = True
            thread, process = self._thread, self._process
            self._jobs.put(None)
        if process is not None:
            process.kill()  # it has nothing to finish: whoever waits for it is told to retry
        if thread is not None:
            thread.join()

    # --- In the thread ---

    def _run(self) -> None:
        while (job := self._next()) is not None:
            if not job.done.set_running_or_notify_cancel():
                continue
            try:
                job.done.set_result(self._exchange(job.read, job.parts))
            except Exception as error:  # noqa: BLE001 - the boundary of the thread: raised where the result is awaited
                job.done.set_exception(error)
            del job  # its result is somebody else's

    def _next(self) -> _Job | None:
        """The next job; None when the thread has to end, after the process."""
        while True:
            try:
                job = self._jobs.get(timeout=self._idle_seconds)
            except queue.Empty:
                self._end()
                with self._lock:
                    if self._jobs.empty():
                        self._thread = None
                        return None
            else:
                if job is None:
                    self._end()
                return job

    def _exchange(self, read: Read, parts: list[bytes]) -> list[Any]:
        try:
            connection = self._connected()
            _send(connection, read, sum(map(len, parts)))
            parts.reverse()
            while parts:
                connection.sendall(parts.pop())
            received: list[Any] = []
            while True:
                kind, content = _receive(connection)
                if kind == "end":
                    return received
                if kind == "refused":
                    raise content
                if kind == "failed":
                    raise RuntimeError(content)
                received.append(content)
        except (OSError, EOFError) as error:
            self._end()
            why = f"the process that reads large bodies has ended or cannot be started ({error!r})"
            raise StoreUnavailable(f"{why}; nothing was done, retry") from error

    def _connected(self) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._connection is None:
            ours, theirs = socket.socketpair()
            ours.settimeout(_ANSWER_SECONDS)
            with theirs:
                command = [sys.executable, *[f"-W{each}" for each in sys.warnoptions], "-m", __name__]
                arguments = [str(theirs.fileno()), str(os.getpid())]
                with self._lock:
                    if self._closed:
                        ours.close()
                        raise EOFError("the server is stopping")
                    self._process = subprocess.Popen(
                        [*command, *arguments], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
                    )
            self._connection = ours
        return self._connection

    def _end(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


# --- What they tell each other: (function, size) and the body; parts of the result and how it ended -----


def _send(connection: socket.socket, *message: Any) -> None:
    content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    connection.sendall(len(content).to_bytes(_LENGTH_BYTES, "big") + content)


def _receive(connection: socket.socket) -> tuple[Any, Any]:
    """A message. Raises ``EOFError`` at the end of the connection."""
    length = int.from_bytes(_receive_bytes(connection, _LENGTH_BYTES), "big")
    return pickle.loads(_receive_bytes(connection, length))


def _receive_bytes(connection: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = connection.recv(min(size, _PIECE_BYTES))
        if not part:
            raise EOFError("the connection has ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# --- The other process -----------------------------------------------------------------------------


def main() -> None:
    """Read bodies until the connection or the process at its other end has ended."""
    for each in (signal.SIGINT, signal.SIGTERM):  # for whole groups of processes; the server finishes what it began
        signal.signal(each, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    server = int(sys.argv[2])
    with socket.socket(fileno=int(sys.argv[1])) as connection, contextlib.suppress(EOFError, ConnectionError):
        while _has_request(connection, server):
            read, size = _receive(connection)
            _answer(connection, read, _receive_bytes(connection, size))


def _has_request(connection: socket.socket, server: int) -> bool:
    """Wait for the next request. A server that was killed may have left its end of the connection to a fork."""
    connection.settimeout(_LOOK_SECONDS)
    while os.getppid() == server:
        with contextlib.suppress(TimeoutError):
            connection.recv(1, socket.MSG_PEEK)
            connection.settimeout(None)
            return True
    return False


def _answer(connection: socket.socket, read: Read, raw: bytes) -> None:
    try:
        for part in read(raw):
            _send(connection, "part", part)
    except AgentLightningError as error:
        _send(connection, "refused", error)
    except OSError:
        raise
    except Exception:  # noqa: BLE001 - the boundary of the process: the server logs it
        _send(connection, "failed", traceback.format_exc())
    else:
        _send(connection, "end", None)


if __name__ == "__main__":
    main()
