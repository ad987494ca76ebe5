"""Calls of the contract's methods as requests, and replies as their results.

What is sent follows from the table of routes and the signatures of the contract: where an argument goes, how it is
checked, and what is made up to make the call repeatable. Arguments are checked here as the store checks them, as far
as JSON could not carry a wrong one to the server unchanged: a NaN would arrive as null, an id with a slash as another
path. Everything else is left to the server, which refuses it with the same error.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import repeat
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin
from urllib.parse import urlencode

import msgspec

from agentlightning.errors import InvalidValue, NotFound, StaleAttempt, StoreUnavailable
from agentlightning.http.client.transport import Transport, WireReply, WireRequest
from agentlightning.http.codec import decode_error, decode_reply
from agentlightning.http.routes import CLIENT_ROUTES
from agentlightning.http.signatures import Argument, arguments_of
from agentlightning.store.arguments import check_batch, check_claim_limit, check_pairs, encode_config
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
    encode_required,
    encode_resources,
    reason_of,
    shown,
)
from agentlightning.types import AttemptedRollout, EnqueueRolloutRequest, Rollout

_encode = msgspec.json.Encoder().encode
_raw = msgspec.Raw

_logger = logging.getLogger(__name__)

_DIRECTIVE_HEADER = "Agl-Directive"
_MOST_UNANSWERED = 1000
LONGEST_SLICE_SECONDS = 20.0
"""How long one request may wait for something to happen; longer waits are made of several, which a proxy between does
not give up."""

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
        self.send = transport.send
        """Brings the server's reply to a request, whatever its status."""
        self.mint = ids.mint
        """Makes a new id with this prefix."""
        self._ids = ids
        self._prefix = prefix
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
        return plan.result(await self.send(request._replace(**limits) if limits else request))

    def with_body(self, plan: Plan, body: bytes) -> WireRequest:
        """The request for a call whose body is encoded already, and that has no other arguments."""
        target, priority = self._prefix + plan.route.path, plan.route.priority
        return WireRequest("POST", target, body, priority, self.timeout_seconds, self.patience_seconds)

    def request(self, plan: Plan, arguments: Mapping[str, Any]) -> WireRequest:
        """The request for a call. Raises ``InvalidValue`` if an argument is not valid."""
        target, body = plan.encode(arguments, self._ids)
        timeout, patience, silence = self.timeout_seconds, self.patience_seconds, None
        if plan.route.work_seconds is not None:
            timeout = plan.route.work_seconds
            patience = max(patience, 2 * timeout)  # a lost reply must leave time for another try
        elif plan.route.is_query:  # a long page may take as long as the caller is ready to wait, while it comes
            timeout, silence = patience, timeout
        target, priority = self._prefix + target, plan.route.priority
        return WireRequest(plan.route.verb, target, body, priority, timeout, patience, silence_seconds=silence)


class _Field(NamedTuple):
    """How one argument travels."""

    default: Any
    encode: Encoder
    place: Literal["path", "query", "body", "content"]
    """``content``: it is the whole body."""
    nullable: bool


class Plan:
    """How the calls of one method are sent.

    Args:
        method: its name.
    """

    def __init__(self, method: str) -> None:
        self.route = CLIENT_ROUTES[method]
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
                places[field.place][name] = None if value is None and field.nullable else field.encode(value)
        route = self.route
        if route.is_query:  # the server's own default is less than all
            limit = self.fields["limit"]
            places[limit.place].setdefault("limit", limit.default)
        for old, new in (route.renamed or {}).items():  # what was given under an old name goes under the new one
            if arguments.get(old) is not None:
                either(new, arguments.get(new), old, arguments[old])
                places["body"][new] = places["body"].pop(old)
        for name, prefix in (route.mints or {}).items():
            place = places[self.fields[name].place]
            if name not in place and arguments.get(route.minted_unless or "") is None:
                place[name] = ids.mint(prefix)
        target = route.path.format_map(places["path"]) if places["path"] else route.path
        if places["query"]:
            target = f"{target}?{urlencode(places['query'])}"
        for content in places["content"].values():
            return target, content
        if "rollouts" in places["body"]:
            places["body"]["rollouts"] = list(map(_new_rollout, places["body"]["rollouts"], repeat(ids)))
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
        nullable = NoneType in get_args(argument.annotation)
        return _Field(argument.default, _encoder_of(route.method, argument), place, nullable)


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
        encode = _checked(check_claim_limit)
    elif encode is None:
        is_filter = method.startswith("query_") and argument.keyword_only
        encode = _encoder_by_type(name, parts, is_id=name.endswith("_id") and not is_filter)
    return encode


def _encoder_by_type(name: str, parts: set[Any], *, is_id: bool) -> Encoder:
    literals = [each for part in parts if get_origin(part) is Literal for each in get_args(part)]
    literals += [part for part in parts if isinstance(part, str)]  # of an annotation that is one Literal
    lists = [part for part in parts if get_origin(part) is Sequence]
    if is_id and not literals:
        return partial(check_id, what=name)
    if is_id:
        return lambda value: value if value in literals else check_id(value, name)
    if literals and str not in parts:
        return _checked(check_one_of, literals, name)
    if lists:
        [item] = get_args(lists[0])
        return lambda value: _strings(value, name.removesuffix("_in"), get_args(item) or None)
    if float in parts:
        return partial(check_finite, what=name)
    if int in parts:
        return partial(_integer, what=name)
    if str in parts:
        return partial(text_filter, name)
    if bool in parts:
        return partial(_flag, what=name)
    return lambda value: _raw(encode_json(value, name))


def _checked(check: Callable[..., object], *more: Any) -> Encoder:
    def encode(value: Any) -> Any:
        check(value, *more)
        return value

    return encode


def _strings(value: Any, what: str, allowed: Sequence[str] | None) -> Any:
    return list(dict.fromkeys(within(what, value, allowed).value))


def _flag(value: Any, what: str) -> bool:
    if type(value) is not bool:
        raise InvalidValue(f"{what} is {shown(value)}; give True or False")
    return value


def _integer(value: Any, what: str) -> int:
    if type(value) is not int or not -INT64_END <= value < INT64_END:
        raise InvalidValue(f"{what} {shown(value)} is not valid; give a whole number")
    return value


def _check_ids(value: Any, what: str) -> None:
    check_batch(value, f"{what}s")
    for each in value:
        check_id(each, what)


_BY_NAME: Mapping[str, Encoder] = {
    "attempt_ids": _checked(_check_ids, "attempt_id"),
    "worker_ids": _checked(_check_ids, "worker_id"),
    "config": encode_config,
    "heartbeat_stats": lambda value: _raw(encode_required(value, "heartbeat_stats")),
    "registration": lambda value: _raw(encode_required(value, "registration")),
    "metadata": lambda value: _raw(encode_object(value, "metadata") or b"null"),
    "message": partial(check_text, what="message"),
    "reason_code": _checked(reason_of, None, ""),
    "reason_message": partial(check_text, what="reason_message"),
    "resources": encode_resources,
    "rollout_attempt_ids": check_pairs,
    "rollouts": _checked(check_batch, "rollouts"),
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


# --- Calls that wait on the server ----------------------------------------------------------------


def ended_early(slice_seconds: float, took_seconds: float) -> bool:
    """Whether the server answered before the time that it may wait was over: then it had a reason."""
    return took_seconds < 0.9 * slice_seconds


async def wait_in_slices(caller: Caller, rollout_ids: Sequence[str], timeout: float | None) -> list[Rollout]:
    """``wait_for_rollouts`` over HTTP. Each request asks only for the rollouts that have not ended yet."""
    ids: list[str] = _strings(rollout_ids, "rollout_id", None)
    clock = asyncio.get_running_loop().time
    ends_at = math.inf if timeout is None else clock() + check_finite(timeout, "timeout")
    ended: dict[str, Rollout] = {}
    while True:
        asked_at = clock()
        slice_seconds = min(max(ends_at - asked_at, 0.0), LONGEST_SLICE_SECONDS)
        found: list[Rollout] = await caller.call(
            "wait_for_rollouts",
            {"rollout_ids": [each for each in ids if each not in ended], "timeout": slice_seconds},
            timeout_seconds=caller.timeout_seconds + slice_seconds,
            long_poll=slice_seconds > 0,
        )
        ended.update((rollout.rollout_id, rollout) for rollout in found)
        now = clock()
        # The server waits no longer than it must: if it did not wait, the missing ones are unknown to it.
        if len(ended) == len(ids) or now >= ends_at or ended_early(slice_seconds, now - asked_at):
            return [ended[each] for each in ids if each in ended]


class Claims:
    """Claims rollouts. Safe from any thread.

    A claim whose reply is lost is repeated under its ``request_id`` by the next claim of the same worker, because the
    server holds rollouts for it. A claim that the client gave an id itself is confirmed at once, because its caller
    does not know that claims with an id have to be.

    Args:
        caller: makes the calls.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._lock = threading.Lock()
        self._unanswered: dict[tuple[str | None, int], deque[str]] = {}

    async def claim(
        self, limit: int, worker_id: str | None, request_id: str, wait_seconds: float
    ) -> Sequence[AttemptedRollout]:
        """Claim under this id, waiting in slices; ends early if the server says that there is a reason."""
        plan = plan_of("dequeue_many_rollouts")
        arguments = {"limit": limit, "worker_id": worker_id, "request_id": request_id}
        clock = asyncio.get_running_loop().time
        ends_at = clock() + max(check_finite(wait_seconds, "wait_seconds"), 0.0)
        while True:
            asked_at = clock()
            left = max(ends_at - asked_at, 0.0)
            slice_seconds = min(left, LONGEST_SLICE_SECONDS)
            request = self._caller.request(plan, {**arguments, "wait_seconds": slice_seconds})
            if slice_seconds > 0:
                request = request._replace(timeout_seconds=request.timeout_seconds + slice_seconds, long_poll=True)
            reply = await self._caller.send(request)
            claimed: list[AttemptedRollout] = plan.result(reply)
            # A claim that is replaced, or whose worker is asked to drain or stop, is answered before its time.
            if claimed or slice_seconds >= left or _DIRECTIVE_HEADER in reply.headers:
                return claimed
            if ended_early(slice_seconds, clock() - asked_at):
                return claimed

    async def claim_and_confirm(
        self, limit: int, worker_id: str | None, wait_seconds: float
    ) -> Sequence[AttemptedRollout]:
        """Claim for a caller who gives no id: under one that was made up, or that had no answer before."""
        if worker_id is not None:
            check_id(worker_id, "worker_id")
        check_claim_limit(limit)
        left_over = self.take(worker_id, limit)
        if left_over is not None:
            claimed = await self._claim_under(left_over, limit, worker_id, 0.0)
            if claimed:
                return claimed
        return await self._claim_under(self._caller.mint("rq-"), limit, worker_id, wait_seconds)

    async def _claim_under(
        self, request_id: str, limit: int, worker_id: str | None, wait_seconds: float
    ) -> Sequence[AttemptedRollout]:
        answered = False
        try:
            claimed = await self.claim(limit, worker_id, request_id, wait_seconds)
            confirmed = await self.confirm_all(claimed)
            answered = True
        except InvalidValue:
            answered = True  # and will be refused again
            raise
        finally:
            if not answered:
                self.keep(worker_id, limit, request_id)
        return confirmed

    def take(self, worker_id: str | None, limit: int) -> str | None:
        """The id of a claim like this one that had no answer; it is the caller's now."""
        with self._lock:
            waiting = self._unanswered.get((worker_id, limit))
            request_id = waiting.popleft() if waiting else None
            if not waiting:
                self._unanswered.pop((worker_id, limit), None)
            return request_id

    def keep(self, worker_id: str | None, limit: int, request_id: str) -> None:
        """A claim had no answer. Of very many, the oldest are let go: the server hands their rollouts out again."""
        with self._lock:
            self._unanswered.setdefault((worker_id, limit), deque(maxlen=_MOST_UNANSWERED)).append(request_id)

    async def confirm_all(self, claimed: Sequence[AttemptedRollout]) -> list[AttemptedRollout]:
        """Tell the server that the reply to a claim has arrived; without those that were handed out again meanwhile."""
        confirmed = await asyncio.gather(*map(self._confirm, claimed))
        return [each for each in confirmed if each is not None]

    async def _confirm(self, claim: AttemptedRollout) -> AttemptedRollout | None:
        ids = {"rollout_id": claim.rollout_id, "attempt_id": claim.attempt.attempt_id}
        try:
            claim.attempt = await self._caller.call("update_attempt", ids)
        except (NotFound, StaleAttempt):
            return None  # the reply came so late that the rollout was handed out again
        except StoreUnavailable as error:
            # It is the caller's, and its next sign of life confirms it; without one it is handed out again.
            _logger.debug("claim %s could not be confirmed: %s", claim.attempt.attempt_id, error.message)
        return claim
