"""Workers: runner processes as the store sees them."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel

__all__ = ["Worker", "WorkerDirective", "WorkerStatus"]

WorkerStatus: TypeAlias = Literal["idle", "busy", "unknown"]
"""`busy`: it holds an attempt; `unknown`: it was never heard of, or not for too long."""

WorkerDirective: TypeAlias = Literal["drain", "stop"]
"""`drain`: finish what you hold, take nothing new, then end; `stop`: give up what you hold, then end."""


class Worker(BaseModel):
    """A runner process as the store sees it. Times are seconds since the Unix epoch, `None` where it never happened."""

    worker_id: str
    status: WorkerStatus = "unknown"

    heartbeat_stats: dict[str, Any] | None = None
    """What the worker last said of itself (load, memory, and so on). Any JSON object."""

    last_heartbeat_time: float | None = None

    last_dequeue_time: float | None = None
    """When it last claimed a rollout and got one."""

    last_busy_time: float | None = None
    """When it last became `busy`."""

    last_idle_time: float | None = None
    """When it last became `idle`, or, while it is, asked for work in vain; within a minute."""

    current_rollout_id: str | None = None
    current_attempt_id: str | None = None

    stale_attempt_ids: list[str] | None = None
    """The attempts the worker listed in its heartbeat that it no longer holds: stop working on them.

    Only in the reply to a heartbeat; `None` everywhere else.
    """

    lease_seconds: float | None = None
    """For how long the store counts the worker as alive after a heartbeat."""

    registration: dict[str, Any] | None = None
    """What the worker said of itself when it began: host, process, versions, labels. Any JSON object."""

    directive: WorkerDirective | None = None
    """What the worker has been asked to do; a worker that begins anew is free of it."""
