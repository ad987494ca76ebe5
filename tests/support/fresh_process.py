"""Run a function in an interpreter of its own: for what must not happen in the process that runs the tests."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["FreshProcess", "run_fresh", "say"]

_SUPPORT = str(Path(__file__).parent)
_PROGRAM = "import importlib, sys; getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(*sys.argv[3:])"
_PATIENCE_SECONDS = 60


def say(word: object) -> None:
    """In the function: tell the test something, as one line."""
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


class FreshProcess:
    """A new interpreter that calls ``function``, a module-level one of a module in this folder, with strings.

    A context manager: at its end the process is killed if it still runs. Standard input stays open meanwhile.
    """

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._command = [sys.executable, "-c", _PROGRAM, _name_of(function), function.__name__, *map(str, arguments)]

    def __enter__(self) -> Self:
        self._process: subprocess.Popen[str] = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": _SUPPORT},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:
            self._process.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    def hear(self) -> str:
        """The next line that the function says.

        Raises:
            AssertionError: it ended without a word; the message has what it wrote to standard error.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.finish()
            raise AssertionError("the process has ended and said nothing more")
        return line.removesuffix("\n")

    def tell(self, word: object) -> None:
        """Write a line to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """Send SIGKILL, and wait until it is dead (of that, or because it was done)."""
        self._process.kill()
        assert self._process.wait() in (-signal.SIGKILL, 0)

    def finish(self) -> list[str]:
        """Close its standard input and wait for its end; the lines that were not heard yet.

        Raises:
            AssertionError: it failed; the message has what it wrote to standard error.
        """
        out, err = self._process.communicate(timeout=_PATIENCE_SECONDS)
        assert self._process.returncode == 0, f"exit code {self._process.returncode}:\n{err}"
        return out.splitlines()


def run_fresh(function: Callable[..., object], *arguments: object) -> list[str]:
    """Call ``function`` in a new interpreter; returns the lines that it said. Raises as `FreshProcess.finish`."""
    with FreshProcess(function, *arguments) as process:
        return process.finish()


def _name_of(function: Callable[..., object]) -> str:
    module = inspect.getmodule(function)
    assert module is not None
    return module.__name__
