"""Calls of the contract's methods as requests, and replies as their results, by the table of routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import urlencode

import msgspec

from agentlightning.errors import NotFound
from agentlightning.http.client.transport import Transport, WireReply, WireRequest
from agentlightning.http.codec import decode_error, decode_reply
from agentlightning.http.routes import CLIENT_ROUTES, Route
from agentlightning.lifecycle.records import RolloutRow
from agentlightning.store.arguments import check_batch, draft_of, edit_of, report_of
from agentlightning.store.sources import IdSource
from agentlightning.store.validation import check_finite, check_id, encode_required
from agentlightning.types import UNSET, EnqueueRolloutRequest

_encode = msgspec.json.Encoder().encode


class Caller:
    """Makes calls: an argument left out was not given, and what is missing to make a call repeatable is made up.

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
        self._prefix = prefix
        self._ids = ids
        self.timeout_seconds = timeout_seconds
        self.patience_seconds = patience_seconds

    async def call(self, method: str, arguments: Mapping[str, Any], **limits: Any) -> Any:
        """The result of a method of the contract.

        Args:
            method: its name.
            arguments: those given, by name, checked already: ids are safe in a path, and values that are JSON
                already are ``msgspec.Raw``.
            limits: fields of ``WireRequest`` that are not as usual.

        Raises:
            AgentLightningError: what the method raised on the server.
            StoreUnreachable: no answer.
        """
        return result_of(CLIENT_ROUTES[method], await self.send(method, arguments, **limits))

    async def send(self, method: str, arguments: Mapping[str, Any], **limits: Any) -> WireReply:
        """The server's reply to a call, whatever its status. Arguments and errors as for ``call``."""
        route = CLIENT_ROUTES[method]
        target, body = self._encoded(route, arguments)
        request = WireRequest(route.verb, target, body, route.priority, self.timeout_seconds, self.patience_seconds)
        return await self._transport.send(request._replace(**limits) if limits else request)

    async def post(self, method: str, body: bytes, **limits: Any) -> Any:
        """As ``call``, with a body that is encoded already."""
        route = CLIENT_ROUTES[method]
        request = WireRequest(
            route.verb,
            self._prefix + route.path,
            body,
            route.priority,
            self.timeout_seconds,
            self.patience_seconds,
        )
        return result_of(route, await self._transport.send(request._replace(**limits) if limits else request))

    def mint(self, prefix: str) -> str:
        """A new id."""
        return self._ids.mint(prefix)

    def _encoded(self, route: Route, arguments: Mapping[str, Any]) -> tuple[str, bytes | None]:
        """Path and query, and the body."""
        shape = _shape_of(route)
        if shape.mints and any(name not in arguments for name in shape.mints):
            arguments = {**{name: self._ids.mint(prefix) for name, prefix in shape.mints.items()}, **arguments}
        target = self._prefix + (route.path.format_map(arguments) if shape.in_path else route.path)
        asked = {name: arguments[name] for name in shape.query if name in arguments}
        if asked:
            target = f"{target}?{urlencode(asked)}"
        if route.body_argument is not None:
            return target, bytes(arguments[route.body_argument])
        if route.body is None:
            return target, None
        return target, _encode({name: value for name, value in arguments.items() if name in shape.body})


def result_of(route: Route, reply: WireReply) -> Any:
    """What a method returns for this reply, or raises."""
    if 200 <= reply.status < 300:
        return None if route.unknown_is_none and reply.body == b"null" else decode_reply(route, reply.body)
    error = decode_error(reply.status, reply.body)
    if route.unknown_is_none and type(error) is NotFound:
        return None
    raise error


class _Shape(NamedTuple):
    """Where the arguments of a route go."""

    in_path: bool
    query: frozenset[str]
    body: frozenset[str]
    mints: Mapping[str, str]
    """Ids of the call itself; those of its items are made up where the items are encoded."""


@cache
def _shape_of(route: Route) -> _Shape:
    return _Shape(
        in_path="{" in route.path,
        query=frozenset() if route.query is None else frozenset(route.query.model_fields),
        body=frozenset()
        if route.body is None or route.body_argument is not None
        else frozenset(route.body.model_fields),
        mints={name: prefix for name, prefix in (route.mints or {}).items() if "." not in name},
    )


# --- Arguments of the contract's methods as the wire carries them, checked as the store itself  ---

_ROLLOUT_FIELDS = ("mode", "resources_id")


def given(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None, where None means that nothing was given."""
    return {name: value for name, value in arguments.items() if value is not None}


def optional_id(value: str | None, what: str) -> str | None:
    """An id, or None. Raises ``InvalidId``."""
    return None if value is None else check_id(value, what)


def new_rollouts(rollouts: Sequence[EnqueueRolloutRequest], ids: IdSource) -> list[dict[str, Any]]:
    """The items of an enqueue, each with a ``rollout_id``. Raises as ``enqueue_many_rollouts``."""
    check_batch(rollouts, "rollouts")
    return [new_rollout(request, ids) for request in rollouts]


def new_rollout(request: EnqueueRolloutRequest, ids: IdSource) -> dict[str, Any]:
    """One new rollout, with a ``rollout_id``. Raises as ``enqueue_many_rollouts``."""
    row: RolloutRow = draft_of(request, ids).row
    item: dict[str, Any] = {"input": msgspec.Raw(row.input), "rollout_id": row.rollout_id}
    for name in _ROLLOUT_FIELDS:
        value = getattr(row, name)
        if value is not None:
            item[name] = value
    if request.config is not None:
        item["config"] = row.policy
    if row.metadata is not None:
        item["metadata"] = msgspec.Raw(row.metadata)
    if row.priority:
        item["priority"] = row.priority
    return item


def rollout_changes(
    fields: Mapping[str, Any], status: Any, reason_code: str | None, reason_message: str | None
) -> dict[str, Any]:
    """The arguments of ``update_rollout`` that are given. Raises as it does."""
    edit = edit_of(fields, status, reason_code, reason_message)
    changes: dict[str, Any] = {}
    for name, value in edit.fields.items():
        changes[name] = msgspec.Raw(value) if name in ("input", "metadata") and value is not None else value
    if edit.status is not None:
        changes["status"] = edit.status
    return {**changes, **given(reason_code=reason_code, reason_message=reason_message)}


def report(
    status: Any,
    worker_id: Any,
    last_heartbeat_time: Any,
    metadata: Any,
    reason_code: str | None,
    reason_message: str | None,
) -> dict[str, Any]:
    """The arguments of ``update_attempt`` that are given. Raises as it does."""
    said = report_of(status, worker_id, last_heartbeat_time, metadata, reason_code, reason_message)
    arguments = given(
        status=said.status,
        worker_id=said.worker_id,
        last_heartbeat_time=said.last_heartbeat_time,
        reason_code=reason_code,
        reason_message=reason_message,
    )
    if said.metadata is not None:
        [encoded] = said.metadata
        arguments["metadata"] = None if encoded is None else msgspec.Raw(encoded)
    return arguments


def worker_beat(stats: Any, attempt_ids: Any, lease_seconds: Any, registration: Any) -> dict[str, Any]:
    """The arguments of ``update_worker`` that are given. Raises as it does."""
    beat: dict[str, Any] = {}
    if stats is not UNSET:
        beat["heartbeat_stats"] = msgspec.Raw(encode_required(stats, "heartbeat_stats"))
    if registration is not UNSET:
        beat["registration"] = msgspec.Raw(encode_required(registration, "registration"))
    if attempt_ids is not UNSET:
        check_batch(attempt_ids, "attempt_ids")
        beat["attempt_ids"] = [check_id(each, "attempt_id") for each in attempt_ids]
    if lease_seconds is not UNSET:
        beat["lease_seconds"] = check_finite(lease_seconds, "lease_seconds", above=0)
    return beat
