"""The one table of routes, from which server, client and OpenAPI document derive.

A route binds a method of ``LightningStore`` to a verb and a path. Which arguments there are, of which types, and what
comes back is read from the method's signature, so a new method needs one line here and none anywhere else in this
package. The same routes answer under two prefixes; a ``Dialect`` says what differs between them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from types import NoneType
from typing import Any, Literal, NamedTuple, Union, get_args
from urllib.parse import unquote, urlsplit, urlunsplit

from pydantic import BaseModel, create_model

from agentlightning.errors import InvalidValue
from agentlightning.http.signatures import Argument, arguments_of, model_of, reply_type, wire_type
from agentlightning.security.access import Permission
from agentlightning.store.base import LightningStore
from agentlightning.types import EnqueueRolloutRequest

Verb = Literal["GET", "POST", "DELETE"]

Priority = Literal["heartbeat", "completion", "claim", "span", "write", "read"]
"""What a request is about, for shedding load, retries and the circuit breaker."""

SHED_ORDER: tuple[Priority, ...] = ("read", "write", "claim", "span", "completion", "heartbeat")
"""The order in which a server under load refuses requests. Heartbeats come last: without them live attempts expire."""

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
    """The status of a request refused because of load. Clients of 0.3 retry after 503, not after 429."""


CANONICAL = Dialect("/agl/v1", unknown_is_null=False, empty_limit_is_empty=False, overload_status=429)
COMPATIBLE = Dialect("/v1/agl", unknown_is_null=True, empty_limit_is_empty=True, overload_status=503)
"""What clients of agentlightning 0.3 use."""
DIALECTS = (CANONICAL, COMPATIBLE)


@dataclass(frozen=True, eq=False)
class Route:
    """One way to call one method of the contract. Everything that is not said here follows from its signature.

    Arguments that the path names in braces travel there. The others are fields of a JSON object in the body of a
    POST, and parameters of the query string otherwise.
    """

    verb: Verb
    path: str
    """Below the prefix; arguments in braces."""
    method: str
    """The method of ``LightningStore``."""
    permission: Permission
    priority: Priority
    _: KW_ONLY
    status: int = 200
    body_argument: str | None = None
    """The argument that is the whole body; the others travel in the query string then."""
    body_record: type[BaseModel] | None = None
    """A record whose fields are arguments, and say more of them than the signature."""
    body_required: bool = False
    """Whether there must be a body, even though no argument is required."""
    renamed: Mapping[str, str] | None = None
    """Arguments that do not travel under this, their old name, but under another argument's."""
    reply_field: str | None = None
    """The field of the reply that is the result."""
    sends_sequence_ids: bool = False
    """Whether the reply has the sequence ids of the spans that came, instead of the spans."""
    unknown_is_none: bool = False
    """Whether the method returns None for an unknown id, which is 404 or null by ``Dialect``."""
    mints: Mapping[str, str] | None = None
    """Arguments that a client makes up when its caller gives none, and the prefix of such ids: they make the call
    repeatable."""
    minted_unless: str | None = None
    """The argument that makes the call repeatable as well, so that nothing is made up when it is given."""
    wait_argument: str | None = None
    """The argument that says how long the server may wait before it answers, in seconds; None: without limit."""
    work_seconds: float | None = None
    """How long the answer may take, where that is much longer than usual."""
    hot: bool = False
    """Whether it is so frequent that the server answers it without ASGI, to save the cost."""
    primary: bool = True
    """Whether our client calls the method this way, where there are several."""

    @cached_property
    def in_path(self) -> Sequence[str]:
        """The arguments that travel in the path."""
        return re.findall(r"{(\w+)}", self.path)

    @cached_property
    def query(self) -> type[BaseModel] | None:
        """The model of the query string; None if nothing travels there."""
        if self.verb == "POST" and self.body_argument is None:
            return None
        arguments = [each for each in self._outside_path if each.name != self.body_argument]
        return self._model("Query", arguments, in_query=True) if arguments else None

    @cached_property
    def body(self) -> Any:
        """The type of the body; None if there is none."""
        if self.verb != "POST":
            return None
        if self.body_argument is not None:
            return wire_type(arguments_of(self.method)[self.body_argument].annotation)
        return self._model("Body", self._outside_path, in_query=False) if self._outside_path else None

    @cached_property
    def body_optional(self) -> bool:
        """Whether an absent body means that no argument was given."""
        required = self.body_argument is not None or any(each.required for each in self._outside_path)
        return not (self.body_required or required)

    @cached_property
    def reply(self) -> Any:
        """The type of the reply."""
        result = list[int] if self.sends_sequence_ids else reply_type(self.method)
        if self.unknown_is_none:
            result = Union[tuple(part for part in get_args(result) if part is not NoneType)]  # noqa: UP007 - at run time
        if self.reply_field is None:
            return result
        fields: dict[str, Any] = {self.reply_field: (result, ...)}
        return create_model(f"{self._title}Reply", __doc__=self._summary, **fields)

    @property
    def _outside_path(self) -> Sequence[Argument]:
        unsent = {*self.in_path, *(self.renamed or ())}
        return [each for name, each in arguments_of(self.method).items() if name not in unsent]

    @property
    def _title(self) -> str:
        return "".join(word.capitalize() for word in self.method.split("_"))

    @property
    def _summary(self) -> str:
        return (inspect.getdoc(getattr(LightningStore, self.method)) or "").partition("\n")[0]

    def _model(self, kind: str, arguments: Sequence[Argument], *, in_query: bool) -> type[BaseModel]:
        return model_of(self._title + kind, self._summary, arguments, self.body_record, in_query=in_query)


_OLD_NAMES = {"status": "status_in", "rollout_ids": "rollout_id_in"}

ROUTES: tuple[Route, ...] = (
    Route("GET", "/statistics", "statistics", "read", "read"),
    Route("GET", "/verify", "verify", "read", "read", work_seconds=600.0),
    # --- The queue ---
    Route("POST", "/queues/rollouts/enqueue", "enqueue_many_rollouts", "submit", "write", status=201, hot=True),
    Route(
        "POST",
        "/queues/rollouts/dequeue",
        "dequeue_many_rollouts",
        "run",
        "claim",
        mints={"request_id": "rq-"},
        wait_argument="wait_seconds",
        hot=True,
    ),
    # --- Rollouts ---
    Route(
        "POST",
        "/rollouts",
        "start_rollout",
        "run",
        "write",
        status=201,
        body_record=EnqueueRolloutRequest,
        mints={"rollout_id": "ro-"},
        minted_unless="attempt_id",
    ),
    Route("GET", "/rollouts", "query_rollouts", "read", "read", renamed=_OLD_NAMES, primary=False),
    Route(
        "DELETE", "/rollouts", "delete_finished_rollouts", "operate", "write", reply_field="deleted", work_seconds=600.0
    ),
    Route("POST", "/rollouts/search", "query_rollouts", "read", "read", renamed=_OLD_NAMES),
    Route("GET", "/rollouts/{rollout_id}", "get_rollout_by_id", "read", "read", unknown_is_none=True),
    Route("POST", "/rollouts/{rollout_id}", "update_rollout", "submit", "completion", body_required=True),
    Route("POST", "/rollouts/{rollout_id}/cancel", "cancel_rollout", "submit", "completion"),
    Route("POST", "/waits/rollouts", "wait_for_rollouts", "read", "read", wait_argument="timeout"),
    # --- Attempts ---
    Route(
        "POST",
        "/rollouts/{rollout_id}/attempts",
        "start_attempt",
        "run",
        "write",
        status=201,
        mints={"attempt_id": "at-"},
    ),
    Route("GET", "/rollouts/{rollout_id}/attempts", "query_attempts", "read", "read", primary=False),
    Route("POST", "/rollouts/{rollout_id}/attempts/search", "query_attempts", "read", "read"),
    Route("GET", "/rollouts/{rollout_id}/attempts/latest", "get_latest_attempt", "read", "read"),
    Route("POST", "/rollouts/{rollout_id}/attempts/{attempt_id}", "update_attempt", "run", "completion", hot=True),
    Route(
        "POST",
        "/rollouts/{rollout_id}/attempts/{attempt_id}/finish",
        "finish_attempt",
        "run",
        "completion",
        hot=True,
    ),
    Route("POST", "/rollouts/{rollout_id}/attempts/{attempt_id}/release", "release_attempt", "run", "completion"),
    # --- Spans ---
    Route("POST", "/spans", "add_span", "run", "span", body_argument="span", status=201, hot=True),
    Route(
        "POST",
        "/spans/bulk",
        "add_many_spans",
        "run",
        "span",
        reply_field="sequence_ids",
        sends_sequence_ids=True,
        status=201,
        hot=True,
    ),
    Route("GET", "/spans", "query_spans", "read", "read", primary=False),
    Route("POST", "/spans/search", "query_spans", "read", "read"),
    Route("POST", "/spans/next", "get_next_span_sequence_id", "run", "span", reply_field="sequence_id"),
    Route("POST", "/spans/next/bulk", "get_many_span_sequence_ids", "run", "span", reply_field="sequence_ids"),
    # --- Resources ---
    Route("GET", "/resources", "query_resources", "read", "read", primary=False),
    Route("POST", "/resources/search", "query_resources", "read", "read"),
    Route(
        "POST",
        "/resources",
        "add_resources",
        "submit",
        "write",
        body_argument="resources",
        status=201,
        mints={"resources_id": "rs-"},
    ),
    Route("GET", "/resources/latest", "get_latest_resources", "read", "read"),
    Route("GET", "/resources/{resources_id}", "get_resources_by_id", "read", "read", unknown_is_none=True),
    Route(
        "POST",
        "/resources/{resources_id}",
        "update_resources",
        "submit",
        "write",
        body_argument="resources",
        mints={"request_id": "rq-"},
    ),
    Route(
        "POST",
        "/resources/{resources_id}/rollback",
        "rollback_resources",
        "submit",
        "write",
        mints={"request_id": "rq-"},
    ),
    Route("GET", "/resources/{resources_id}/versions", "query_resource_versions", "read", "read", primary=False),
    Route("POST", "/resources/{resources_id}/versions/search", "query_resource_versions", "read", "read"),
    # --- Workers ---
    Route("GET", "/workers", "query_workers", "read", "read", primary=False),
    Route("POST", "/workers/search", "query_workers", "read", "read"),
    Route("POST", "/workers/bulk/directive", "direct_workers", "operate", "completion"),
    Route("GET", "/workers/{worker_id}", "get_worker_by_id", "read", "read", unknown_is_none=True),
    Route("POST", "/workers/{worker_id}", "update_worker", "run", "heartbeat", hot=True),
    Route("POST", "/workers/{worker_id}/lost", "report_worker_lost", "run", "completion"),
)
"""Every route below a prefix. A path that is written out goes before one with an argument in the same place."""

CLIENT_ROUTES: Mapping[str, Route] = {route.method: route for route in ROUTES if route.primary}
"""How our client calls each method of the contract."""


# --- The address of a server, as people write it ---


class ServerAddress(NamedTuple):
    """The address of a server, taken apart."""

    root: str
    """Scheme, host, port, and the path that a reverse proxy puts in front; no slash at the end."""
    dialect: Dialect
    """That of the prefix in the address; the canonical one if there is none."""
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
    """The text without a possible password."""
    return text if "@" not in text else f"…@{text.rpartition('@')[2]}"
