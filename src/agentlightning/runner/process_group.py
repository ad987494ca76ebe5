"""A program in a process group of its own: started, read, waited for, and killed with all that it leaves behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress

_LATE_OUTPUT_SECONDS = 2.0
"""How long to read output after the program has ended. Only a child that left the process group can still write."""


async def run_group(
    command: Sequence[str],
    env: Mapping[str, str],
    cwd: str | None,
    stdout: ProgramOutput,
    stderr: ProgramOutput,
    *,
    stop_seconds: float,
) -> int:
    """Run a program in a process group of its own until it ends.

    When this is cancelled, the whole group gets SIGTERM and, ``stop_seconds`` later, SIGKILL. Processes that the
    program leaves in its group when it ends are killed.

    Args:
        command: the program and its arguments.
        env: its whole environment.
        cwd: its working directory; None: that of this process.
        stdout, stderr: receive its output.
        stop_seconds: how long it may take to stop.

    Returns:
        Its exit code; if a signal ended it, minus the signal's number.

    Raises:
        OSError: it cannot be started.
    """
    async with _started(command, env, cwd, stdout, stderr) as process:
        try:
            return await process.wait()
        except asyncio.CancelledError:
            _signal_group(process.pid, signal.SIGTERM)
            with suppress(TimeoutError):
                async with asyncio.timeout(stop_seconds):
                    await process.wait()
            _signal_group(process.pid, signal.SIGKILL)
            await process.wait()
            raise
        finally:
            _signal_group(process.pid, signal.SIGKILL)


@asynccontextmanager
async def _started(
    command: Sequence[str], env: Mapping[str, str], cwd: str | None, stdout: ProgramOutput, stderr: ProgramOutput
) -> AsyncGenerator[asyncio.subprocess.Process]:
    """A program whose output is read until the block ends, and a moment longer: until then it has to be killed."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as reading:
        with ExitStack() as writing:
            ends: list[int] = []
            # With asyncio's own pipes `wait` would wait for grandchildren that keep them open.
            for output in (stdout, stderr):
                read, write = os.pipe()
                writing.callback(os.close, write)
                ends.append(write)
                pipe = os.fdopen(read, "rb", buffering=0)
                transport, _ = await loop.connect_read_pipe(lambda output=output: output, pipe)
                reading.callback(transport.close)
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=ends[0],
                stderr=ends[1],
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LATE_OUTPUT_SECONDS):
                    await stdout.ended.wait()
                    await stderr.ended.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):  # the group is gone, or its id is of another user by now
        os.killpg(group, number)


class ProgramOutput(asyncio.Protocol):
    """Reads a pipe to its end, and keeps ``limit_bytes`` of it, half at each end; the others are only counted."""

    def __init__(self, limit_bytes: int) -> None:
        self.total = 0
        """Bytes written."""
        self.ended = asyncio.Event()
        self._half = limit_bytes // 2
        self._head = bytearray()
        self._tail = bytearray()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()

    def data_received(self, data: bytes) -> None:
        self.total += len(data)
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 2 * self._half:  # cut seldom, since each cut copies
            del self._tail[: -self._half]

    @property
    def missing(self) -> int:
        """Bytes that are not kept."""
        return self.total - len(self._head) - min(len(self._tail), self._half)

    def text(self) -> str:
        """The kept bytes as text, with a note of how many are missing."""
        tail = self._tail[-self._half :] if self._half else b""
        gap = f"\n… {self.missing} bytes are left out …\n".encode() if self.missing else b""
        text = (bytes(self._head) + gap + bytes(tail)).decode("utf-8", "replace")
        return text.replace("\0", "\N{REPLACEMENT CHARACTER}")

    def last_line(self) -> str:
        """The last line that is not empty."""
        lines = [line for line in self.text().splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""
