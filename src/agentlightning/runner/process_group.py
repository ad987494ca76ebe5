"""A program with all that it starts: run, listened to, and stopped as a whole."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress

__all__ = ["Output", "run_group"]

_CHUNK_BYTES = 64 * 1024
_LEFTOVER_SECONDS = 2.0
"""How long output may still come after the program has ended; only a child that left the group can send any."""


class Output:
    """The beginning and the end of what a program writes; what is between is counted.

    Args:
        limit_bytes: how much is kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.total = 0
        """Bytes written."""
        self._half = limit_bytes // 2
        self._head = bytearray()
        self._tail = bytearray()

    def add(self, data: bytes) -> None:
        """Take what was written."""
        self.total += len(data)
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 2 * self._half:
            del self._tail[: -self._half]

    @property
    def missing(self) -> int:
        """Bytes that are not kept."""
        return self.total - len(self._head) - min(len(self._tail), self._half)

    def text(self) -> str:
        """What is kept, with a note of what is missing."""
        tail = self._tail[-self._half :] if self._half else b""
        gap = f"\n… {self.missing} bytes are left out …\n".encode() if self.missing else b""
        return (
            (bytes(self._head) + gap + bytes(tail))
            .decode("utf-8", "replace")
            .replace("\0", "\N{REPLACEMENT CHARACTER}")
        )

    def last_line(self) -> str:
        """The last line that is not empty."""
        lines = [line for line in self.text().splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""


async def run_group(
    command: Sequence[str],
    env: Mapping[str, str],
    cwd: str | None,
    stdout: Output,
    stderr: Output,
    *,
    stop_seconds: float,
) -> int:
    """Run a program in a process group of its own, until it ends.

    When this is cancelled, the whole group gets SIGTERM and, ``stop_seconds`` later, SIGKILL. What the program
    leaves behind in its group when it ends by itself is killed.

    Args:
        command: the program and its arguments.
        env: its whole environment.
        cwd: its working directory; None: ours.
        stdout, stderr: take what it writes.
        stop_seconds: how long it may take to stop.

    Returns:
        Its exit code; if a signal ended it, minus the signal's number.

    Raises:
        OSError: it cannot be started.
    """
    process, readers = await _start(command, env, cwd, stdout, stderr)
    try:
        return await process.wait()
    except asyncio.CancelledError:
        await _stop(process, stop_seconds)
        raise
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        await asyncio.wait(readers, timeout=_LEFTOVER_SECONDS)
        for reader in readers:
            reader.cancel()


async def _start(
    command: Sequence[str], env: Mapping[str, str], cwd: str | None, stdout: Output, stderr: Output
) -> tuple[asyncio.subprocess.Process, list[asyncio.Task[None]]]:
    """The process, and the tasks that read what it writes.

    The pipes are ours: those that asyncio makes would keep ``wait`` waiting for children that hold on to them.
    """
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    readers = [asyncio.create_task(_read(out_read, stdout)), asyncio.create_task(_read(err_read, stderr))]
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out_write,
            stderr=err_write,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    except BaseException:
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
        raise
    finally:
        os.close(out_write)
        os.close(err_write)
    return process, readers


async def _stop(process: asyncio.subprocess.Process, seconds: float) -> None:
    _signal_group(process.pid, signal.SIGTERM)
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await process.wait()
            return
    _signal_group(process.pid, signal.SIGKILL)
    await process.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):  # gone, or of another user by now
        os.killpg(group, number)


async def _read(descriptor: int, output: Output) -> None:
    """Read a pipe to its end, then close it."""
    reader = asyncio.StreamReader(limit=_CHUNK_BYTES)
    pipe = os.fdopen(descriptor, "rb", buffering=0)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    try:
        while data := await reader.read(_CHUNK_BYTES):
            output.add(data)
    finally:
        transport.close()
