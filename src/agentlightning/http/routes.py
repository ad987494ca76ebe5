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
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints
from urllib.parse import unquote, urlsplit, urlunsplit

from pydantic import BaseModel, FailFast, Field, StrictFloat, StrictInt, create_model

from agentlightning.errors import InvalidValue
from agentlightning.http.signatures import Argument, arguments_of
from agentlightning.security.access import Permission
from agentlightning.store.base import LightningStore, LightningStoreStatistics
from agentlightning.types import UNSET, AttemptedRollout, EnqueueRolloutRequest, PaginatedResult, Rollout, Unset
from agentlightning.types.plain_spans import PlainSpan

Verb = Literal["GET", "POST", "DELETE"]

Priority = Literal["heartbeat", "completion", "claim", "span", "write", "read"]
"""What a request is about, for shedding load, retries and the circuit breaker."""

SHED_ORDER: tuple[Priority, ...] = ("read", "write", "claim", "span", "completion", "heartbeat")
"""The order in which a server under load refuses requests. Heartbeats come last: without them live attempts expire."""

LONGEST_WAIT_SECONDS = 60.0
"""How long one request may wait for something to happen, whatever it asks for: one that waits for ever could not be
told from one whose client is gone, and work may be handed to either."""

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
    default_limit: int
    """How many records a page has at most when the request does not say; -1: all, as clients of 0.3 expect."""


CANONICAL = Dialect(
    "/agl/v1", unknown_is_null=False, empty_limit_is_empty=False, overload_status=429, default_limit=1000
)
COMPATIBLE = Dialect("/v1/agl", unknown_is_null=True, empty_limit_is_empty=True, overload_status=503, default_limit=-1)
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
    mints: Mapping[str, str] | None = None
    """Arguments that a client makes up when its caller gives none, and the prefix of such ids: they make the call
    repeatable."""
    minted_unless: str | None = None
    """The argument that makes the call repeatable as well, so that nothing is made up when it is given."""
    work_seconds: float | None = None
    """How long the answer may take, where that is much longer than usual."""

    @cached_property
    def in_path(self) -> Sequence[str]:
        """The arguments that travel in the path."""
        return re.findall(r"{(\w+)}", self.path)

    @cached_property
    def wait_argument(self) -> str | None:
        """The argument that says how long the server may wait before it answers, in seconds; None: without limit."""
        return next((name for name in ("wait_seconds", "timeout") if name in arguments_of(self.method)), None)

    @cached_property
    def is_query(self) -> bool:
        """Whether the reply is a page of records."""
        return self.method.startswith("query_")

    @cached_property
    def sends_sequence_ids(self) -> bool:
        """Whether the reply has the sequence ids of the spans that came, instead of the spans."""
        return self.method == "add_many_spans"

    @cached_property
    def unknown_is_none(self) -> bool:
        """Whether the method returns None for an unknown id, which is 404 or null by ``Dialect``."""
        return self.method.endswith("_by_id")

    @cached_property
    def query(self) -> type[BaseModel] | None:
        """The model of the query string; None if nothing travels there."""
        if self.verb == "POST" and self.body_argument is None:
            return None
        arguments = [each for each in self._outside_path if each.name != self.body_argument]
        return self._model_of("Query", arguments, in_query=True) if arguments else None

    @cached_property
    def body(self) -> Any:
        """The type of the body; None if there is none."""
        if self.verb != "POST":
            return None
        if self.body_argument is not None:
            return wire_type(arguments_of(self.method)[self.body_argument].annotation)
        return self._model_of("Body", self._outside_path, in_query=False) if self._outside_path else None

    @cached_property
    def body_optional(self) -> bool:
        """Whether an absent body means that no argument was given."""
        required = self.body_argument is not None or any(each.required for each in self._outside_path)
        return not (self.body_required or required)

    @cached_property
    def reply(self) -> Any:
        """The type of the reply."""
        result = wire_type(get_type_hints(getattr(LightningStore, self.method), include_extras=True)["return"])
        if self.sends_sequence_ids:
            result = list[int]
        if self.unknown_is_none:
            result = Union[tuple(part for part in get_args(result) if part is not NoneType)]  # noqa: UP007 - at run time
        if self.reply_field is None:
            return result
        return self._model("Reply", {self.reply_field: (result, ...)})

    @property
    def _outside_path(self) -> Sequence[Argument]:
        unsent = {*self.in_path, *(self.renamed or ())}
        return [each for name, each in arguments_of(self.method).items() if name not in unsent]

    def _model_of(self, kind: str, arguments: Sequence[Argument], *, in_query: bool) -> type[BaseModel]:
        """A model whose fields are arguments of the method.

        A field that is absent was not given; the contract's own default applies. That is not what null means.
        Unknown fields are ignored, because clients of other versions may send more.
        """
        base = self.body_record
        fields: dict[str, Any] = {}
        for each in arguments:
            if base is not None and each.name in base.model_fields:
                continue
            wire = wire_type(each.annotation, in_query=in_query)
            if list in {get_origin(part) for part in (wire, *get_args(wire))}:
                wire = Annotated[wire, FailFast()]  # of ten thousand wrong items pydantic would list all, for seconds
            default: dict[str, Any] = {} if each.required else {"default": each.default}
            text = each.help
            if self.is_query and each.name == "limit":
                text = f"At least 1, or -1 for all. Absent: {_default_limits()}."
                default = {"default_factory": int}
            if each.default is UNSET:  # a factory, because a default would be shown in the schema
                default = {"default_factory": NoneType}
            fields[each.name] = wire, Field(description=text, **default)
        return self._model(kind, fields, base)

    def _model(self, kind: str, fields: dict[str, Any], base: type[BaseModel] | None = None) -> type[BaseModel]:
        title = "".join(word.capitalize() for word in self.method.split("_")) + kind
        summary = (inspect.getdoc(getattr(LightningStore, self.method)) or "").partition("\n")[0]
        return create_model(title, __base__=base or BaseModel, __doc__=summary, **fields)


def _default_limits() -> str:
    said = {each.prefix: "all" if each.default_limit < 0 else f"{each.default_limit:,}" for each in DIALECTS}
    return ", ".join(f"{limit} below {prefix}" for prefix, limit in said.items())


def wire_type(annotation: Any, *, in_query: bool = False) -> Any:
    """The type that pydantic is to check what travels against, for an annotation of the contract.

    JSON has fewer types than Python: a ``Sequence`` arrives as a list, ``UNSET`` as an absent field. Numbers are
    strict, since otherwise pydantic takes the text ``"1"`` and ``true`` for numbers; but a query string is all text.
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    page = getattr(annotation, "__pydantic_generic_metadata__", {"origin": None})
    if isinstance(annotation, TypeVar):  # a method that takes both forms of a span returns the form that it got
        return wire_type(annotation.__bound__, in_query=in_query)
    if annotation is float:
        return float if in_query else StrictFloat
    if annotation is int:
        return StrictInt
    if annotation is Rollout:  # the store attaches the latest attempt, where there is one
        return AttemptedRollout | Rollout
    if annotation is LightningStoreStatistics:  # newer servers may count more
        return dict[str, Any]
    if page["origin"] is PaginatedResult:
        return cast(Any, PaginatedResult)[wire_type(page["args"][0])]
    if origin is Sequence or origin is list:
        return list[wire_type(parts[0], in_query=in_query)]
    if origin is Mapping:
        return dict[parts[0], parts[1]]
    if origin in (Union, UnionType):
        kept = [part for part in parts if part not in (Unset, PlainSpan)]  # a plain span has the same JSON as a span
        if str in kept:
            kept = [part for part in kept if get_origin(part) is not Literal]
        return Union[tuple(wire_type(part, in_query=in_query) for part in kept)]  # noqa: UP007 - made at run time
    return annotation


_ROLLOUT_ID, _ATTEMPT_ID = {"rollout_id": "ro-"}, {"attempt_id": "at-"}
_RESOURCES_ID, _REQUEST_ID = {"resources_id": "rs-"}, {"request_id": "rq-"}
_OLD_NAMES = {"status": "status_in", "rollout_ids": "rollout_id_in"}

ROUTES: tuple[Route, ...] = (
    Route("GET", "/statistics", "statistics", "read", "read"),
    Route("GET", "/verify", "verify", "read", "read", work_seconds=600.0),
    # --- The queue ---
    Route("POST", "/queues/rollouts/enqueue", "enqueue_many_rollouts", "submit", "write", status=201),
    Route("POST", "/queues/rollouts/dequeue", "dequeue_many_rollouts", "run", "claim", mints=_REQUEST_ID),
    # --- Rollouts ---
    Route(
        "POST",
        "/rollouts",
        "start_rollout",
        "run",
        "write",
        status=201,
        body_record=EnqueueRolloutRequest,
        mints=_ROLLOUT_ID,
        minted_unless="attempt_id",
    ),
    Route("GET", "/rollouts", "query_rollouts", "read", "read", renamed=_OLD_NAMES),
    Route(
        "DELETE", "/rollouts", "delete_finished_rollouts", "operate", "write", reply_field="deleted", work_seconds=600.0
    ),
    Route("POST", "/rollouts/search", "query_rollouts", "read", "read", renamed=_OLD_NAMES),
    Route("GET", "/rollouts/{rollout_id}", "get_rollout_by_id", "read", "read"),
    Route("POST", "/rollouts/{rollout_id}", "update_rollout", "submit", "completion", body_required=True),
    Route("POST", "/rollouts/{rollout_id}/cancel", "cancel_rollout", "submit", "completion"),
    Route("POST", "/waits/rollouts", "wait_for_rollouts", "read", "read"),
    # --- Attempts ---
    Route("POST", "/rollouts/{rollout_id}/attempts", "start_attempt", "run", "write", status=201, mints=_ATTEMPT_ID),
    Route("GET", "/rollouts/{rollout_id}/attempts", "query_attempts", "read", "read"),
    Route("POST", "/rollouts/{rollout_id}/attempts/search", "query_attempts", "read", "read"),
    Route("GET", "/rollouts/{rollout_id}/attempts/latest", "get_latest_attempt", "read", "read"),
    Route("POST", "/rollouts/{rollout_id}/attempts/{attempt_id}", "update_attempt", "run", "completion"),
    Route("POST", "/rollouts/{rollout_id}/attempts/{attempt_id}/finish", "finish_attempt", "run", "completion"),
    Route("POST", "/rollouts/{rollout_id}/attempts/{attempt_id}/release", "release_attempt", "run", "completion"),
    # --- Spans ---
    Route("POST", "/spans", "add_span", "run", "span", body_argument="span", status=201),
    Route("POST", "/spans/bulk", "add_many_spans", "run", "span", reply_field="sequence_ids", status=201),
    Route("GET", "/spans", "query_spans", "read", "read"),
    Route("POST", "/spans/search", "query_spans", "read", "read"),
    Route("POST", "/spans/next", "get_next_span_sequence_id", "run", "span", reply_field="sequence_id"),
    Route("POST", "/spans/next/bulk", "get_many_span_sequence_ids", "run", "span", reply_field="sequence_ids"),
    # --- Resources ---
    Route("GET", "/resources", "query_resources", "read", "read"),
    Route("POST", "/resources/search", "query_resources", "read", "read"),
    Route(
        "POST",
        "/resources",
        "add_resources",
        "submit",
        "write",
        body_argument="resources",
        status=201,
        mints=_RESOURCES_ID,
    ),
    Route("GET", "/resources/latest", "get_latest_resources", "read", "read"),
    Route("GET", "/resources/{resources_id}", "get_resources_by_id", "read", "read"),
    Route(
        "POST",
        "/resources/{resources_id}",
        "update_resources",
        "submit",
        "write",
        body_argument="resources",
        mints=_REQUEST_ID,
    ),
    Route("POST", "/resources/{resources_id}/rollback", "rollback_resources", "submit", "write", mints=_REQUEST_ID),
    Route("GET", "/resources/{resources_id}/versions", "query_resource_versions", "read", "read"),
    Route("POST", "/resources/{resources_id}/versions/search", "query_resource_versions", "read", "read"),
    # --- Workers ---
    Route("GET", "/workers", "query_workers", "read", "read"),
    Route("POST", "/workers/search", "query_workers", "read", "read"),
    Route("POST", "/workers/bulk/directive", "direct_workers", "operate", "completion"),
    Route("POST", "/workers/bulk/delete", "delete_workers", "operate", "write", reply_field="deleted"),
    Route("GET", "/workers/{worker_id}", "get_worker_by_id", "read", "read"),
    Route("POST", "/workers/{worker_id}", "update_worker", "run", "heartbeat"),
    Route("POST", "/workers/{worker_id}/lost", "report_worker_lost", "run", "completion"),
)
"""Every route below a prefix. A path that is written out goes before one with an argument in the same place."""

CLIENT_ROUTES: Mapping[str, Route] = {route.method: route for route in ROUTES}
"""How our client calls each method of the contract: of several ways the last one, which takes long lists in a body."""


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
    try:
        parts = urlsplit(text)
        port, host = parts.port, parts.hostname
    except (ValueError, AttributeError):
        parts = port = host = None
    if parts is None or parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        _, masked, shown = str(text).rpartition("@")  # without a possible password
        shown = f"…@{shown}" if masked else text
        raise InvalidValue(f"{shown!r} is not the address of a server; give one like http://host:4747")
    path, dialect = parts.path.rstrip("/"), CANONICAL
    for each in DIALECTS:
        if path.endswith(each.prefix):
            path, dialect = path.removesuffix(each.prefix), each
            break
    netloc = (f"[{host}]" if ":" in host else host) + ("" if port is None else f":{port}")
    key = None if parts.password is None else unquote(parts.password)
    return ServerAddress(urlunsplit((parts.scheme, netloc, path, "", "")), dialect, key)
