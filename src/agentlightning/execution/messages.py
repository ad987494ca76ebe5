"""What supervisor, nursery and child say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from agentlightning.execution.events import ThreadingEvent
from agentlightning.execution.quotas import Quotas


class Start(NamedTuple):
    """To the nursery: start a process."""

    slot: str
    """Name of the place that the process fills: for a runner, its worker id."""
    life: int
    """1 for the first process of a slot, then one more each."""
    job: str
    """Which of the nursery's jobs it does."""
    arguments: Mapping[str, Any]
    """Plain values for the job."""
    environment: Mapping[str, str]
    """Added to the environment."""
    quotas: Quotas | None = None
    cgroup: str | None = None
    """Directory of the control group that it joins."""
    memory_is_limited: bool = False
    """Whether that group limits its memory."""


class Stop(NamedTuple):
    """To the nursery: set the stop event of all processes."""


class Close(NamedTuple):
    """To the nursery: end whatever is left, and go."""


ToNursery = Start | Stop | Close


class Outcome(NamedTuple):
    """What a job came to, told by the process that did it."""

    word: str
    """``done``, what a job says otherwise, or ``failed``."""
    error: str = ""
    """Of one that failed: the last line of the traceback."""
    traceback: str = ""
    exhausted: str = ""
    """What it had used up, if that is why it failed."""


class Started(NamedTuple):
    """From the nursery: the process is there. With number 0 it could not be made; then it has exited, too."""

    slot: str
    life: int
    pid: int


class Ready(NamedTuple):
    """From the nursery: the process has loaded its job and begins with it."""

    slot: str
    life: int


class Exited(NamedTuple):
    """From the nursery: the process has ended."""

    slot: str
    life: int
    pid: int
    code: int
    """As of ``subprocess``: negative for a signal."""
    outcome: Outcome | None
    """None: it did not come to say."""


class Child(NamedTuple):
    """What a job knows of the process that it is done in."""

    slot: str
    event: ThreadingEvent
    """Set when the job shall come to an end."""


class Job(Protocol):
    """Something to do in a process of its own."""

    def __call__(self, child: Child, arguments: Mapping[str, Any]) -> str:
        """Do it; returns in one word how it ended."""
        ...
