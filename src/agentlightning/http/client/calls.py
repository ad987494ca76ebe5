"""Calls of the contract's methods as requests, and replies as their results.

What is sent follows from the table of routes and the signatures of the contract: where an argument goes, how it is
checked, and what is made up to make the call repeatable. Arguments are checked here as the store checks them, as far
as JSON could not carry a wrong one to the server unchanged: a NaN would arrive as null, an id with a slash as another
path. Everything else is left to the server, which refuses it with the same error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin
from urllib.parse import urlencode

import msgspec

from agentlightning.errors import InvalidValue, NotFound
from agentlightning.http.client.transport import Transport, WireReply, WireRequest
from agentlightning.http.codec import decode_error, decode_reply
from agentlightning.http.routes import CLIENT_ROUTES
from agentlightning.http.signatures import Argument, arguments_of
from agentlightning.store.arguments import check_batch, check_claim_limit, check_pairs
from agentlightning.store.base import LightningStore
from agentlightning.store.queries import either, text_filter, within
from agentlightning.store.sources import IdSource
from agentlightning.store.validation import (
    INT64_END,
    check_finite,
    check_id,
    check_one_of,
    check_text,
    encode_json,
    encode_object,
    encode_policy,
    encode_required,
    encode_resources,
    reason_of,
    shown,
)
from agentlightning.types import EnqueueRolloutRequest

_encode = msgspec.json.Encoder().encode
_raw = msgspec.Raw

Encoder = Callable[[Any], Any]
"""Checks the value of an argument and returns what msgspec is to encode."""


class Caller:
    """Makes calls.

    Args:
        transport: sends the requests.
        prefix: of the paths, without a slash at the end.
        ids: makes ids.
        timeout_seconds: how long one try of an ordinary call may take.
        patience_seconds: how long all tries of a call may take.
    """

    def __init__(
        self, transport: Transport, prefix: str, ids: IdSource, *, timeout_seconds: float, patience_seconds: float
    ) -> None:
        self._transport = transport
        self.send = transport.send
        """Brings the server's reply to a request, whatever its status."""
        self._prefix = prefix
        self._ids = ids
        self.timeout_seconds = timeout_seconds
        self.patience_seconds = patience_seconds

    async def call(self, method: str, arguments: Mapping[str, Any], **limits: Any) -> Any:
        """The result of a method of the contract.

        Args:
            method: its name.
            arguments: those given, by name.
            limits: fields of ``WireRequest`` that are not as usual.

        Raises:
            AgentLightningError: what the method raised on the server, or an argument is not valid.
            StoreUnreachable: no answer.
        """
        plan = plan_of(method)
        request = self.request(plan, arguments)
        return plan.result(await self._transport.send(request._replace(**limits) if limits else request))

    async def post(self, method: str, body: bytes, **limits: Any) -> Any:
        """As ``call``, with a body that is encoded already and no other arguments."""
        plan = plan_of(method)
        request = WireRequest(
            "POST",
            self._prefix + plan.path,
            body,
            plan.route.priority,
            self.timeout_seconds,
            self.patience_seconds,
        )
        return plan.result(await self._transport.send(request._replace(**limits) if limits else request))

    def mint(self, prefix: str) -> str:
        """A new id."""
        return self._ids.mint(prefix)

    def request(self, plan: Plan, arguments: Mapping[str, Any]) -> WireRequest:
        """The request for a call. Raises ``InvalidValue`` if an argument is not valid."""
        target, body = plan.encode(arguments, self._ids)
        timeout, patience = self.timeout_seconds, self.patience_seconds
        if plan.route.work_seconds is not None:
            timeout = patience = plan.route.work_seconds
        elif plan.is_query:  # a long page may take as long as the caller is ready to wait
            timeout = patience
        return WireRequest(plan.route.verb, self._prefix + target, body, plan.route.priority, timeout, patience)


class _Field(NamedTuple):
    """How one argument travels."""

    default: Any
    encode: Encoder
    place: Literal["path", "query", "body", "content"]
    """``content``: it is the whole body."""


class Plan:
    """How the calls of one method are sent.

    Args:
        method: its name.
    """

    def __init__(self, method: str) -> None:
        self.route = route = CLIENT_ROUTES[method]
        self.path = route.path
        self.is_query = method.startswith("query_")
        self._signature = inspect.signature(getattr(LightningStore, method))
        arguments = arguments_of(method)
        self._positional = [each.name for each in arguments.values() if not each.keyword_only]
        self._required = {each.name for each in arguments.values() if each.required}
        self.fields = {name: self._field(each) for name, each in arguments.items()}
        self._has_body = any(each.place == "body" for each in self.fields.values())

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, without defaults. Raises ``TypeError`` as a function call does."""
        arguments = {**dict(zip(self._positional, args, strict=False)), **kwargs}
        is_whole = len(arguments) == len(args) + len(kwargs)
        if not is_whole or not self._required <= arguments.keys() <= self.fields.keys():
            self._signature.bind(None, *args, **kwargs)
        return arguments

    def encode(self, arguments: Mapping[str, Any], ids: IdSource) -> tuple[str, bytes | None]:
        """Path with query, and body. Raises ``InvalidValue`` if an argument is not valid."""
        places: dict[str, dict[str, Any]] = {"path": {}, "query": {}, "body": {}, "content": {}}
        for name, value in arguments.items():
            field = self.fields[name]
            if value is not field.default:
                places[field.place][name] = field.encode(value)
        route = self.route
        if route.renamed:
            self._translate(route.renamed, arguments, places["body"])
        for name, prefix in (route.mints or {}).items():
            place = places[self.fields[name].place]
            if name not in place and arguments.get(route.minted_unless or "") is None:
                place[name] = ids.mint(prefix)
        target = self.path.format_map(places["path"]) if places["path"] else self.path
        if places["query"]:
            target = f"{target}?{urlencode(places['query'])}"
        for content in places["content"].values():
            return target, content
        if "rollouts" in places["body"]:
            places["body"]["rollouts"] = [_new_rollout(each, ids) for each in places["body"]["rollouts"]]
        return target, _encode(places["body"]) if self._has_body else None

    def result(self, reply: WireReply) -> Any:
        """What the method returns for this reply, or raises."""
        if 200 <= reply.status < 300:
            nothing = self.route.unknown_is_none and reply.body == b"null"
            return None if nothing else decode_reply(self.route, reply.body)
        error = decode_error(reply.status, reply.body)
        if self.route.unknown_is_none and type(error) is NotFound:
            return None
        raise error

    def _field(self, argument: Argument) -> _Field:
        route = self.route
        if argument.name in route.in_path:
            place = "path"
        elif argument.name == route.body_argument:
            place = "content"
        else:
            place = "body" if route.verb == "POST" and route.body_argument is None else "query"
        return _Field(argument.default, _encoder_of(route.method, argument), place)

    def _translate(self, renamed: Mapping[str, str], arguments: Mapping[str, Any], body: dict[str, Any]) -> None:
        """Move what was given under an old name to the new one."""
        for old, new in renamed.items():
            if arguments.get(old) is not None:
                either(new, arguments.get(new), old, arguments[old])
                body[new] = body.pop(old)


@cache
def plan_of(method: str) -> Plan:
    """How the calls of a method are sent."""
    return Plan(method)


# --- How the value of an argument is checked and encoded ------------------------------------------


def _encoder_of(method: str, argument: Argument) -> Encoder:
    """The encoder of an argument, chosen by its name where the name says more than its type."""
    name = argument.name
    parts = {argument.annotation, *get_args(argument.annotation)}
    encode = _BY_NAME.get(name)
    if method == "dequeue_many_rollouts" and name == "limit":
        encode = _claim_limit
    elif encode is None:
        is_filter = method.startswith("query_") and argument.keyword_only
        encode = _encoder_by_type(name, parts, is_id=name.endswith("_id") and not is_filter)
    return _or_none(encode) if NoneType in parts else encode


def _encoder_by_type(name: str, parts: set[Any], *, is_id: bool) -> Encoder:
    literals = [each for part in parts if get_origin(part) is Literal for each in get_args(part)]
    literals += [part for part in parts if isinstance(part, str)]  # of an annotation that is one Literal
    lists = [part for part in parts if get_origin(part) is Sequence]
    if is_id:
        return lambda value: value if value in literals else check_id(value, name)
    if literals and str not in parts:
        return lambda value: _one_of(value, literals, name)
    if lists:
        [item] = get_args(lists[0])
        allowed = get_args(item) if get_origin(item) is Literal else None
        return lambda value: _strings(value, name.removesuffix("_in"), allowed)
    if float in parts:
        return lambda value: check_finite(value, name)
    if int in parts:
        return lambda value: _integer(value, name)
    if str in parts:
        return lambda value: text_filter(name, value)
    return lambda value: _raw(encode_json(value, name))


def _or_none(encode: Encoder) -> Encoder:
    return lambda value: None if value is None else encode(value)


def _one_of(value: Any, allowed: Sequence[str], what: str) -> Any:
    check_one_of(value, allowed, what)
    return value


def _strings(value: Any, what: str, allowed: Sequence[str] | None) -> Any:
    checked = within(what, value, allowed)
    if checked is None:
        raise InvalidValue(f"{what} is None; give a list of strings")
    return list(dict.fromkeys(checked.value))


def _integer(value: Any, what: str) -> int:
    if type(value) is not int or not -INT64_END <= value < INT64_END:
        raise InvalidValue(f"{what} {shown(value)} is not valid; give a whole number")
    return value


def _claim_limit(value: Any) -> int:
    check_claim_limit(value)
    return value


def _ids(what: str) -> Encoder:
    def encode(value: Any) -> list[str]:
        check_batch(value, f"{what}s")
        return [check_id(each, what) for each in value]

    return encode


def _config(value: Any) -> Any:
    if value is None:
        raise InvalidValue("config cannot be None; give a RolloutConfig, or leave it out")
    return encode_policy(value)


def _reason_code(value: Any) -> Any:
    reason_of(value, None, "")
    return value


def _rollouts(value: Any) -> Any:
    check_batch(value, "rollouts")
    return value


_BY_NAME: Mapping[str, Encoder] = {
    "attempt_ids": _ids("attempt_id"),
    "worker_ids": _ids("worker_id"),
    "config": _config,
    "heartbeat_stats": lambda value: _raw(encode_required(value, "heartbeat_stats")),
    "registration": lambda value: _raw(encode_required(value, "registration")),
    "metadata": lambda value: _raw(encode_object(value, "metadata") or b"null"),
    "message": lambda value: check_text(value, "message"),
    "reason_code": _reason_code,
    "reason_message": lambda value: check_text(value, "reason_message"),
    "resources": encode_resources,
    "rollout_attempt_ids": check_pairs,
    "rollouts": _rollouts,
    "spans": lambda value: value,  # encoded by the caller, who may have to put them on the disk instead
}

_ROLLOUT_FIELDS = ("mode", "resources_id", "config", "metadata", "priority")


def _new_rollout(request: Any, ids: IdSource) -> dict[str, Any]:
    """One item of an enqueue. Its id is made up here, so that a repeat of the request enqueues nothing twice."""
    if not isinstance(request, EnqueueRolloutRequest):
        raise InvalidValue(f"{shown(request)} is a {type(request).__name__}; give an EnqueueRolloutRequest")
    rollout_id = request.rollout_id
    item: dict[str, Any] = {
        "input": _raw(encode_json(request.input, "input")),
        "rollout_id": ids.mint("ro-") if rollout_id is None else check_id(rollout_id, "rollout_id"),
    }
    fields = plan_of("start_rollout").fields  # has the same arguments
    for name in _ROLLOUT_FIELDS:
        value = getattr(request, name)
        if value is not None and value != 0:
            item[name] = fields[name].encode(value)
    return item
