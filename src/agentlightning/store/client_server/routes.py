"""The one table of routes. Server, client and OpenAPI document all derive from it, so they cannot drift.

A route binds a method of ``LightningStore`` to a verb and a path. The arguments of the method travel by
name: those that the path names in braces in the path; those of the ``query`` model in the query string;
those of the ``body`` model as fields of a JSON object (or, where ``body_argument`` is set, the whole body is
that one argument). An argument that is absent was not given. The result is the reply, or the one field of
it that ``reply_field`` names.

The same routes answer under two prefixes, whose few differences are said by their ``Dialect``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from agentlightning.store.client_server import messages as m
from agentlightning.types import (
    Attempt,
    AttemptedRollout,
    NamedResources,
    PaginatedResult,
    ResourcesUpdate,
    Rollout,
    Span,
    VerificationReport,
    Worker,
)

__all__ = [
    "CANONICAL",
    "CLIENT_ROUTES",
    "COMPATIBLE",
    "DIALECTS",
    "OTLP_TRACES_PATH",
    "ROUTES",
    "SHED_ORDER",
    "Dialect",
    "Permission",
    "Priority",
    "Route",
    "Verb",
]

Verb = Literal["GET", "POST", "DELETE"]

Permission = Literal["read", "submit", "run", "operate"]
"""What a key must allow. ``read``: look at everything. ``submit``: make and change rollouts and resources (an
algorithm). ``run``: claim, report, trace (a runner). ``operate``: direct workers, delete."""

Priority = Literal["heartbeat", "completion", "claim", "span", "write", "read"]
"""What a request is about, for shedding load, retries and the circuit breaker."""

SHED_ORDER: tuple[Priority, ...] = ("read", "write", "claim", "span", "completion", "heartbeat")
"""Which requests a server under load refuses first. Of heartbeats and completions lives depend."""

OTLP_TRACES_PATH = "/v1/traces"
"""Where OTLP/HTTP exporters send spans (OpenTelemetry Protocol 1.x, "OTLP/HTTP"); below no prefix."""


class Dialect(NamedTuple):
    """A prefix, and what differs below it."""

    prefix: str
    unknown_is_null: bool
    """Whether ``get_*`` of an unknown id is answered by 200 and null, instead of 404 and ``not_found``."""
    empty_limit_is_empty: bool
    """Whether a claim with ``limit`` below 1 gets an empty list, instead of 422."""
    overload_status: Literal[429, 503]
    """How load is shed. Clients of 0.3 repeat a request after 503, not after 429."""


CANONICAL = Dialect("/agl/v1", unknown_is_null=False, empty_limit_is_empty=False, overload_status=429)
COMPATIBLE = Dialect("/v1/agl", unknown_is_null=True, empty_limit_is_empty=True, overload_status=503)
"""What clients of agentlightning 0.3 use."""
DIALECTS = (CANONICAL, COMPATIBLE)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Route:
    """One way to call one method of the contract."""

    method: str
    """The method of ``LightningStore``."""
    verb: Verb
    path: str
    """Below the prefix; arguments in braces."""
    permission: Permission
    priority: Priority
    reply: Any
    """The type of the reply, as an annotation."""
    status: int = 200
    query: type[Any] | None = None
    """Model of the arguments in the query string."""
    body: Any = None
    """Model of the arguments in the body, or the type of the one argument that the body is."""
    body_argument: str | None = None
    """The argument that the whole body is."""
    body_optional: bool = False
    """Whether an absent body means an empty one."""
    reply_field: str | None = None
    """The field of the reply that is the result."""
    unknown_is_none: bool = False
    """Whether the method returns None for an unknown id, which is 404 or null by ``Dialect``."""
    mints: Mapping[str, str] | None = None
    """Arguments that a client makes up when its caller gives none, and the prefix of such ids: they make the call
    repeatable. ``rollouts.rollout_id`` is a field of each item of ``rollouts``."""
    hot: bool = False
    """Whether it is so frequent that the server goes from bytes to bytes."""
    primary: bool = True
    """Whether our client calls the method this way, where there are several."""


_ROLLOUT = AttemptedRollout | Rollout
_ROLLOUT_PAGE = PaginatedResult[AttemptedRollout | Rollout]

ROUTES: tuple[Route, ...] = (
    Route(
        method="statistics",
        verb="GET",
        path="/statistics",
        permission="read",
        priority="read",
        reply=dict[str, Any],
    ),
    Route(
        method="verify",
        verb="GET",
        path="/verify",
        permission="read",
        priority="read",
        reply=VerificationReport,
    ),
    # --- The queue ---
    Route(
        method="enqueue_many_rollouts",
        verb="POST",
        path="/queues/rollouts/enqueue",
        permission="submit",
        priority="write",
        body=m.EnqueueBody,
        reply=list[_ROLLOUT],
        status=201,
        mints={"rollouts.rollout_id": "ro-"},
        hot=True,
    ),
    Route(
        method="dequeue_many_rollouts",
        verb="POST",
        path="/queues/rollouts/dequeue",
        permission="run",
        priority="claim",
        body=m.ClaimBody,
        body_optional=True,
        reply=list[AttemptedRollout],
        mints={"request_id": "rq-"},
        hot=True,
    ),
    # --- Rollouts ---
    Route(
        method="start_rollout",
        verb="POST",
        path="/rollouts",
        permission="run",
        priority="write",
        body=m.StartRolloutBody,
        reply=AttemptedRollout,
        status=201,
        mints={"rollout_id": "ro-"},
    ),
    Route(
        method="query_rollouts",
        verb="GET",
        path="/rollouts",
        permission="read",
        priority="read",
        query=m.RolloutsQuery,
        reply=_ROLLOUT_PAGE,
        primary=False,
    ),
    Route(
        method="delete_finished_rollouts",
        verb="DELETE",
        path="/rollouts",
        permission="operate",
        priority="write",
        query=m.DeleteQuery,
        reply=m.Deleted,
        reply_field="deleted",
    ),
    Route(
        method="query_rollouts",
        verb="POST",
        path="/rollouts/search",
        permission="read",
        priority="read",
        body=m.RolloutsQuery,
        body_optional=True,
        reply=_ROLLOUT_PAGE,
    ),
    Route(
        method="get_rollout_by_id",
        verb="GET",
        path="/rollouts/{rollout_id}",
        permission="read",
        priority="read",
        reply=_ROLLOUT,
        unknown_is_none=True,
    ),
    Route(
        method="update_rollout",
        verb="POST",
        path="/rollouts/{rollout_id}",
        permission="submit",
        priority="completion",
        body=m.UpdateRolloutBody,
        reply=_ROLLOUT,
    ),
    Route(
        method="cancel_rollout",
        verb="POST",
        path="/rollouts/{rollout_id}/cancel",
        permission="submit",
        priority="completion",
        body=m.CancelBody,
        body_optional=True,
        reply=_ROLLOUT,
    ),
    Route(
        method="wait_for_rollouts",
        verb="POST",
        path="/waits/rollouts",
        permission="read",
        priority="read",
        body=m.WaitBody,
        reply=list[_ROLLOUT],
    ),
    # --- Attempts ---
    Route(
        method="start_attempt",
        verb="POST",
        path="/rollouts/{rollout_id}/attempts",
        permission="run",
        priority="write",
        body=m.StartAttemptBody,
        body_optional=True,
        reply=AttemptedRollout,
        status=201,
        mints={"attempt_id": "at-"},
    ),
    Route(
        method="query_attempts",
        verb="GET",
        path="/rollouts/{rollout_id}/attempts",
        permission="read",
        priority="read",
        query=m.AttemptsQuery,
        reply=PaginatedResult[Attempt],
        primary=False,
    ),
    Route(
        method="query_attempts",
        verb="POST",
        path="/rollouts/{rollout_id}/attempts/search",
        permission="read",
        priority="read",
        body=m.AttemptsQuery,
        body_optional=True,
        reply=PaginatedResult[Attempt],
    ),
    Route(
        method="get_latest_attempt",
        verb="GET",
        path="/rollouts/{rollout_id}/attempts/latest",
        permission="read",
        priority="read",
        reply=Attempt | None,
    ),
    Route(
        method="update_attempt",
        verb="POST",
        path="/rollouts/{rollout_id}/attempts/{attempt_id}",
        permission="run",
        priority="completion",
        body=m.UpdateAttemptBody,
        body_optional=True,
        reply=Attempt,
        hot=True,
    ),
    # --- Spans ---
    Route(
        method="add_span",
        verb="POST",
        path="/spans",
        permission="run",
        priority="span",
        body=Span,
        body_argument="span",
        reply=Span | None,
        status=201,
        hot=True,
    ),
    Route(
        method="add_many_spans",
        verb="POST",
        path="/spans/bulk",
        permission="run",
        priority="span",
        body=m.SpansBody,
        reply=m.SequenceIds,
        reply_field="sequence_ids",
        status=201,
        hot=True,
    ),
    Route(
        method="query_spans",
        verb="GET",
        path="/spans",
        permission="read",
        priority="read",
        query=m.SpansQuery,
        reply=PaginatedResult[Span],
        primary=False,
    ),
    Route(
        method="query_spans",
        verb="POST",
        path="/spans/search",
        permission="read",
        priority="read",
        body=m.SpansQuery,
        reply=PaginatedResult[Span],
    ),
    Route(
        method="get_next_span_sequence_id",
        verb="POST",
        path="/spans/next",
        permission="run",
        priority="span",
        body=m.AttemptIds,
        reply=m.SequenceId,
        reply_field="sequence_id",
    ),
    Route(
        method="get_many_span_sequence_ids",
        verb="POST",
        path="/spans/next/bulk",
        permission="run",
        priority="span",
        body=m.AttemptIdsBody,
        reply=m.SequenceIds,
        reply_field="sequence_ids",
    ),
    # --- Resources ---
    Route(
        method="query_resources",
        verb="GET",
        path="/resources",
        permission="read",
        priority="read",
        query=m.ResourcesQuery,
        reply=PaginatedResult[ResourcesUpdate],
        primary=False,
    ),
    Route(
        method="query_resources",
        verb="POST",
        path="/resources/search",
        permission="read",
        priority="read",
        body=m.ResourcesQuery,
        body_optional=True,
        reply=PaginatedResult[ResourcesUpdate],
    ),
    Route(
        method="add_resources",
        verb="POST",
        path="/resources",
        permission="submit",
        priority="write",
        query=m.NewResourcesQuery,
        body=NamedResources,
        body_argument="resources",
        reply=ResourcesUpdate,
        status=201,
        mints={"resources_id": "rs-"},
    ),
    Route(
        method="get_latest_resources",
        verb="GET",
        path="/resources/latest",
        permission="read",
        priority="read",
        reply=ResourcesUpdate | None,
    ),
    Route(
        method="get_resources_by_id",
        verb="GET",
        path="/resources/{resources_id}",
        permission="read",
        priority="read",
        query=m.ResourcesByIdQuery,
        reply=ResourcesUpdate,
        unknown_is_none=True,
    ),
    Route(
        method="update_resources",
        verb="POST",
        path="/resources/{resources_id}",
        permission="submit",
        priority="write",
        query=m.ResourcesUpdateQuery,
        body=NamedResources,
        body_argument="resources",
        reply=ResourcesUpdate,
        mints={"request_id": "rq-"},
    ),
    Route(
        method="rollback_resources",
        verb="POST",
        path="/resources/{resources_id}/rollback",
        permission="submit",
        priority="write",
        body=m.RollbackBody,
        reply=ResourcesUpdate,
        mints={"request_id": "rq-"},
    ),
    Route(
        method="query_resource_versions",
        verb="GET",
        path="/resources/{resources_id}/versions",
        permission="read",
        priority="read",
        query=m.VersionsQuery,
        reply=PaginatedResult[ResourcesUpdate],
        primary=False,
    ),
    Route(
        method="query_resource_versions",
        verb="POST",
        path="/resources/{resources_id}/versions/search",
        permission="read",
        priority="read",
        body=m.VersionsQuery,
        body_optional=True,
        reply=PaginatedResult[ResourcesUpdate],
    ),
    # --- Workers ---
    Route(
        method="query_workers",
        verb="GET",
        path="/workers",
        permission="read",
        priority="read",
        query=m.WorkersQuery,
        reply=PaginatedResult[Worker],
        primary=False,
    ),
    Route(
        method="query_workers",
        verb="POST",
        path="/workers/search",
        permission="read",
        priority="read",
        body=m.WorkersQuery,
        body_optional=True,
        reply=PaginatedResult[Worker],
    ),
    Route(
        method="direct_workers",
        verb="POST",
        path="/workers/bulk/directive",
        permission="operate",
        priority="completion",
        body=m.DirectBody,
        reply=list[Worker],
    ),
    Route(
        method="get_worker_by_id",
        verb="GET",
        path="/workers/{worker_id}",
        permission="read",
        priority="read",
        reply=Worker,
        unknown_is_none=True,
    ),
    Route(
        method="update_worker",
        verb="POST",
        path="/workers/{worker_id}",
        permission="run",
        priority="heartbeat",
        body=m.UpdateWorkerBody,
        body_optional=True,
        reply=Worker,
        hot=True,
    ),
    Route(
        method="report_worker_lost",
        verb="POST",
        path="/workers/{worker_id}/lost",
        permission="run",
        priority="completion",
        body=m.LostBody,
        reply=list[Attempt],
    ),
)
"""Every route below a prefix. A path that is written out goes before one with an argument in the same place."""

CLIENT_ROUTES: Mapping[str, Route] = {route.method: route for route in ROUTES if route.primary}
"""How our client calls each method of the contract."""
