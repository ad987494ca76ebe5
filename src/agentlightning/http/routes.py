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
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

from agentlightning.errors import InvalidValue
from agentlightning.http import messages as m
from agentlightning.types import (
    Attempt,
    AttemptedRollout,
    FinishedAttempt,
    NamedResources,
    PaginatedResult,
    ResourcesUpdate,
    Rollout,
    Span,
    VerificationReport,
    Worker,
)

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


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """One way to call one method of the contract."""

    verb: Verb
    path: str
    """Below the prefix; arguments in braces."""
    method: str
    """The method of ``LightningStore``."""
    permission: Permission
    priority: Priority
    reply: Any
    """The type of the reply, as an annotation."""
    _: KW_ONLY
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
    Route("GET", "/statistics", "statistics", "read", "read", dict[str, Any]),
    Route("GET", "/verify", "verify", "read", "read", VerificationReport),
    # --- The queue ---
    Route(
        "POST",
        "/queues/rollouts/enqueue",
        "enqueue_many_rollouts",
        "submit",
        "write",
        list[_ROLLOUT],
        body=m.EnqueueBody,
        status=201,
        mints={"rollouts.rollout_id": "ro-"},
        hot=True,
    ),
    Route(
        "POST",
        "/queues/rollouts/dequeue",
        "dequeue_many_rollouts",
        "run",
        "claim",
        list[AttemptedRollout],
        body=m.ClaimBody,
        body_optional=True,
        mints={"request_id": "rq-"},
        hot=True,
    ),
    # --- Rollouts ---
    Route(
        "POST",
        "/rollouts",
        "start_rollout",
        "run",
        "write",
        AttemptedRollout,
        body=m.StartRolloutBody,
        status=201,
        mints={"rollout_id": "ro-"},
    ),
    Route("GET", "/rollouts", "query_rollouts", "read", "read", _ROLLOUT_PAGE, query=m.RolloutsQuery, primary=False),
    Route(
        "DELETE",
        "/rollouts",
        "delete_finished_rollouts",
        "operate",
        "write",
        m.Deleted,
        query=m.DeleteQuery,
        reply_field="deleted",
    ),
    Route(
        "POST",
        "/rollouts/search",
        "query_rollouts",
        "read",
        "read",
        _ROLLOUT_PAGE,
        body=m.RolloutsQuery,
        body_optional=True,
    ),
    Route("GET", "/rollouts/{rollout_id}", "get_rollout_by_id", "read", "read", _ROLLOUT, unknown_is_none=True),
    Route(
        "POST", "/rollouts/{rollout_id}", "update_rollout", "submit", "completion", _ROLLOUT, body=m.UpdateRolloutBody
    ),
    Route(
        "POST",
        "/rollouts/{rollout_id}/cancel",
        "cancel_rollout",
        "submit",
        "completion",
        _ROLLOUT,
        body=m.CancelBody,
        body_optional=True,
    ),
    Route("POST", "/waits/rollouts", "wait_for_rollouts", "read", "read", list[_ROLLOUT], body=m.WaitBody),
    # --- Attempts ---
    Route(
        "POST",
        "/rollouts/{rollout_id}/attempts",
        "start_attempt",
        "run",
        "write",
        AttemptedRollout,
        body=m.StartAttemptBody,
        body_optional=True,
        status=201,
        mints={"attempt_id": "at-"},
    ),
    Route(
        "GET",
        "/rollouts/{rollout_id}/attempts",
        "query_attempts",
        "read",
        "read",
        PaginatedResult[Attempt],
        query=m.AttemptsQuery,
        primary=False,
    ),
    Route(
        "POST",
        "/rollouts/{rollout_id}/attempts/search",
        "query_attempts",
        "read",
        "read",
        PaginatedResult[Attempt],
        body=m.AttemptsQuery,
        body_optional=True,
    ),
    Route("GET", "/rollouts/{rollout_id}/attempts/latest", "get_latest_attempt", "read", "read", Attempt | None),
    Route(
        "POST",
        "/rollouts/{rollout_id}/attempts/{attempt_id}",
        "update_attempt",
        "run",
        "completion",
        Attempt,
        body=m.UpdateAttemptBody,
        body_optional=True,
        hot=True,
    ),
    Route(
        "POST",
        "/rollouts/{rollout_id}/attempts/{attempt_id}/finish",
        "finish_attempt",
        "run",
        "completion",
        FinishedAttempt,
        body=m.FinishAttemptBody,
        hot=True,
    ),
    Route(
        "POST", "/rollouts/{rollout_id}/attempts/{attempt_id}/release", "release_attempt", "run", "completion", Attempt
    ),
    # --- Spans ---
    Route(
        "POST", "/spans", "add_span", "run", "span", Span | None, body=Span, body_argument="span", status=201, hot=True
    ),
    Route(
        "POST",
        "/spans/bulk",
        "add_many_spans",
        "run",
        "span",
        m.SequenceIds,
        body=m.SpansBody,
        reply_field="sequence_ids",
        status=201,
        hot=True,
    ),
    Route("GET", "/spans", "query_spans", "read", "read", PaginatedResult[Span], query=m.SpansQuery, primary=False),
    Route("POST", "/spans/search", "query_spans", "read", "read", PaginatedResult[Span], body=m.SpansQuery),
    Route(
        "POST",
        "/spans/next",
        "get_next_span_sequence_id",
        "run",
        "span",
        m.SequenceId,
        body=m.AttemptIds,
        reply_field="sequence_id",
    ),
    Route(
        "POST",
        "/spans/next/bulk",
        "get_many_span_sequence_ids",
        "run",
        "span",
        m.SequenceIds,
        body=m.AttemptIdsBody,
        reply_field="sequence_ids",
    ),
    # --- Resources ---
    Route(
        "GET",
        "/resources",
        "query_resources",
        "read",
        "read",
        PaginatedResult[ResourcesUpdate],
        query=m.ResourcesQuery,
        primary=False,
    ),
    Route(
        "POST",
        "/resources/search",
        "query_resources",
        "read",
        "read",
        PaginatedResult[ResourcesUpdate],
        body=m.ResourcesQuery,
        body_optional=True,
    ),
    Route(
        "POST",
        "/resources",
        "add_resources",
        "submit",
        "write",
        ResourcesUpdate,
        query=m.NewResourcesQuery,
        body=NamedResources,
        body_argument="resources",
        status=201,
        mints={"resources_id": "rs-"},
    ),
    Route("GET", "/resources/latest", "get_latest_resources", "read", "read", ResourcesUpdate | None),
    Route(
        "GET",
        "/resources/{resources_id}",
        "get_resources_by_id",
        "read",
        "read",
        ResourcesUpdate,
        query=m.ResourcesByIdQuery,
        unknown_is_none=True,
    ),
    Route(
        "POST",
        "/resources/{resources_id}",
        "update_resources",
        "submit",
        "write",
        ResourcesUpdate,
        query=m.ResourcesUpdateQuery,
        body=NamedResources,
        body_argument="resources",
        mints={"request_id": "rq-"},
    ),
    Route(
        "POST",
        "/resources/{resources_id}/rollback",
        "rollback_resources",
        "submit",
        "write",
        ResourcesUpdate,
        body=m.RollbackBody,
        mints={"request_id": "rq-"},
    ),
    Route(
        "GET",
        "/resources/{resources_id}/versions",
        "query_resource_versions",
        "read",
        "read",
        PaginatedResult[ResourcesUpdate],
        query=m.VersionsQuery,
        primary=False,
    ),
    Route(
        "POST",
        "/resources/{resources_id}/versions/search",
        "query_resource_versions",
        "read",
        "read",
        PaginatedResult[ResourcesUpdate],
        body=m.VersionsQuery,
        body_optional=True,
    ),
    # --- Workers ---
    Route(
        "GET", "/workers", "query_workers", "read", "read", PaginatedResult[Worker], query=m.WorkersQuery, primary=False
    ),
    Route(
        "POST",
        "/workers/search",
        "query_workers",
        "read",
        "read",
        PaginatedResult[Worker],
        body=m.WorkersQuery,
        body_optional=True,
    ),
    Route(
        "POST", "/workers/bulk/directive", "direct_workers", "operate", "completion", list[Worker], body=m.DirectBody
    ),
    Route("GET", "/workers/{worker_id}", "get_worker_by_id", "read", "read", Worker, unknown_is_none=True),
    Route(
        "POST",
        "/workers/{worker_id}",
        "update_worker",
        "run",
        "heartbeat",
        Worker,
        body=m.UpdateWorkerBody,
        body_optional=True,
        hot=True,
    ),
    Route(
        "POST", "/workers/{worker_id}/lost", "report_worker_lost", "run", "completion", list[Attempt], body=m.LostBody
    ),
)
"""Every route below a prefix. A path that is written out goes before one with an argument in the same place."""

CLIENT_ROUTES: Mapping[str, Route] = {route.method: route for route in ROUTES if route.primary}
"""How our client calls each method of the contract."""


# --- The address of a server, as people write it ---


class ServerAddress(NamedTuple):
    """Where a server is, and who comes."""

    root: str
    """Scheme, host, port, and the path that a reverse proxy puts in front; no slash at the end."""
    dialect: Dialect
    """The prefix that was asked for; ours if none was."""
    api_key: str | None
    """The key in the address (``http://agl:KEY@host``)."""

    @property
    def name(self) -> str:
        """For the name of a folder."""
        return "".join(char if char.isalnum() else "-" for char in self.root.partition("://")[2])[:80]


def parse_address(text: str) -> ServerAddress:
    """Take ``http://host:port``, with or without a key, and with or without one of the prefixes.

    Raises:
        InvalidValue: it is no such address.
    """
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidValue(f"{text!r} is not the address of a server; give one like http://host:4747")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise InvalidValue(
            f"{_masked(text)!r} is not the address of a server; give one like http://host:4747"
        ) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InvalidValue(f"{_masked(text)!r} is not the address of a server; give one like http://host:4747")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = parts.path.rstrip("/")
    dialect = CANONICAL
    for each in DIALECTS:
        if path.endswith(each.prefix):
            path, dialect = path.removesuffix(each.prefix), each
            break
    netloc = host if port is None else f"{host}:{port}"
    key = None if parts.password is None else unquote(parts.password)
    return ServerAddress(urlunsplit((parts.scheme, netloc, path, "", "")), dialect, key)


def _masked(text: str) -> str:
    """The text without what may be a password."""
    return text if "@" not in text else f"…@{text.rpartition('@')[2]}"
