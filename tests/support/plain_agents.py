"""Agents that are plain functions and need the main thread, or hold the interpreter; importable by any process."""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from typing import Any

import agentlightning as agl
from agentlightning.runner.main_thread import MAIN_THREAD
from agentlightning.runner.vital_signs import VITAL_SIGNS
from execution_programs import note

__all__ = ["alarms", "has_a_runner", "holds_the_interpreter", "keeps_on", "leaves_an_alarm", "sleeps", "where"]


class TimeIsUp(Exception):
    """Raised by an alarm."""


def _alarm(seconds: float) -> None:
    def late(*_: object) -> None:
        raise TimeIsUp

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)


@agl.rollout
def alarms(task: Any) -> float:
    """It limits its time as math-verify does, and is in a system call when that is over."""
    note("process")
    _alarm(0.05)
    try:
        time.sleep(60)
    except TimeIsUp:
        return 1.0
    return 0.0


@agl.rollout
def leaves_an_alarm(task: Any) -> float:
    """It begins an alarm and ends before; the next rollout is at work when that would go off."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    time.sleep(0.3)
    _alarm(0.1)
    return 1.0


@agl.rollout
async def where(task: Any) -> float:
    """A coroutine."""
    return float(threading.current_thread() is threading.main_thread())


@agl.rollout
def has_a_runner(task: Any) -> float:
    """It would make a runner of its own, which must not take what its own runner was given."""
    return float(MAIN_THREAD.get() is None and VITAL_SIGNS.get() is None)


@agl.rollout
def sleeps(task: Any) -> float:
    """It blocks if it is told to, and cleans up."""
    note("process")
    if task == "sleep":
        try:
            note("asleep")
            time.sleep(600)
        finally:
            note("cleaned-up")
    return float(threading.current_thread() is threading.main_thread())


@agl.rollout
def keeps_on(task: Any) -> float:
    """It does not end if it is told so, whatever is raised in it."""
    while task == "keep on":
        note("at-it")
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            note("swallowed")
    return float(threading.current_thread() is threading.main_thread())


@agl.rollout
def holds_the_interpreter(task: int) -> float:
    """For so many seconds no other Python code of this process runs: a function of ``PyDLL`` keeps the lock."""
    note("holds")
    ctypes.PyDLL(None).sleep(task)
    return 1.0
