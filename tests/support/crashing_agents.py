"""Agents that end their process, or try to; importable by any process. An input may name what to do."""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import os
import signal
import sys
from typing import Any

import agentlightning as agl
from execution_programs import note

__all__ = ["CRASHES", "EXITS", "AskedByHook", "NoException", "ends_its_process", "exits", "exits_in_a_coroutine"]


class NoException(BaseException):
    """As the failures of some test libraries."""


CRASHES = {
    "exit": "ended with exit code 7",
    "segv": "was killed by SIGSEGV",
    "abort": "was killed by SIGABRT",
    "kill": "was killed by SIGKILL",
}
EXITS = {
    "interrupt": "the agent raised KeyboardInterrupt",
    "sys.exit": "the agent called sys.exit(3)",
    "no exception": "NoException: of a library",
    "stop": "a function raised StopIteration",
}


@agl.rollout
def ends_its_process(task: Any) -> float:
    """In the way that its input names."""
    match task:
        case "exit":
            os.write(2, b"the last words of the agent\n")
            os._exit(7)
        case "segv":
            faulthandler.disable()  # or that of pytest would print all threads
            ctypes.string_at(0)
        case "abort":
            faulthandler.disable()
            os.abort()
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case _:
            return 1.0
    raise AssertionError


def _raise(task: Any) -> None:
    match task:
        case "interrupt":
            raise KeyboardInterrupt
        case "sys.exit":
            sys.exit(3)
        case "no exception":
            raise NoException("of a library")
        case "stop":
            raise StopIteration
        case _:
            return


@agl.rollout
def exits(task: Any) -> float:
    """A plain function."""
    note("process")
    _raise(task)
    return 1.0


@agl.rollout
async def exits_in_a_coroutine(task: Any) -> float:
    """It raises by itself, or in a task or a callback of its own."""
    note("process")
    if not isinstance(task, list):
        await asyncio.sleep(0)
        _raise(task)
        return 1.0
    where, what = task

    async def child() -> None:
        await asyncio.sleep(0)
        _raise(what)

    match where:
        case "awaited":
            await asyncio.gather(child(), asyncio.sleep(0.01))
        case "callback":
            asyncio.get_running_loop().call_soon(_raise, what)
            await asyncio.sleep(0.01)
        case _:
            raise AssertionError(where)
    return 1.0


class AskedByHook(agl.LitAgent[Any]):
    """Its hook raises what its input says."""

    def rollout(self, task: Any, resources: Any, rollout: Any) -> float:
        note("process")
        return 1.0

    def on_rollout_end(self, task: Any, rollout: Any, runner: Any, tracer: Any) -> None:
        _raise(task.input)
