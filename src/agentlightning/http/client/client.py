"""``LightningStoreClient``: the contract of a store, kept by a server somewhere else.

The methods check their arguments as the store itself does and leave paths, verbs and the reading of replies to the
table of routes. Whatever may go wrong on the way is dealt with below (``resilience``), and is safe to repeat,
because every write carries ids that were made up before it was first sent.
"""

from __future__ import annotations

import os
import ssl
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from agentlightning.errors import InvalidValue
from agentlightning.http.client.cache import ResourceCache, state_folder
from agentlightning.http.client.calls import (
    Caller,
    given,
    new_rollout,
    new_rollouts,
    optional_id,
    report,
    rollout_changes,
)
from agentlightning.http.client.claiming import Claims
from agentlightning.http.client.health import HealthReport
from agentlightning.http.client.reads import RegistryClient
from agentlightning.http.client.resilience import Resilience, make_resilient
from agentlightning.http.client.span_delivery import SpanDelivery
from agentlightning.http.client.spool import SpoolFolder
from agentlightning.http.client.transport import HttpTransport, WireRequest
from agentlightning.http.routes import COMPATIBLE, OTLP_TRACES_PATH, parse_address
from agentlightning.settings import LightningEnvVar, resolve_str_env_var
from agentlightning.store.arguments import check_claim_limit, check_pairs, check_spans_of, encode_spans
from agentlightning.store.base import JsonObject, LightningStoreCapabilities, enqueue_request
from agentlightning.store.records import stored_span
from agentlightning.store.sources import TimeOrderedIds
from agentlightning.store.validation import check_finite, check_id, check_text
from agentlightning.types import (
    UNSET,
    Attempt,
    AttemptedRollout,
    AttemptEnd,
    AttemptStatus,
    EnqueueRolloutRequest,
    FinishedAttempt,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    Span,
    TaskInput,
    Unset,
)
from agentlightning.types.plain_spans import AnySpan, PlainSpan

_TERMINAL_ATTEMPT = frozenset({"failed", "succeeded"})
_TERMINAL_ROLLOUT = frozenset({"failed", "succeeded", "cancelled"})
_LONG_WORK_SECONDS = 600.0
_DEFAULT_SPOOL_BYTES = 1024 * 1024 * 1024


class LightningStoreClient(RegistryClient):
    """A store that is served over HTTP. May be called from any thread and any event loop, and pickled.

    A call goes on trying while the server is out of reach, for ``resilience.patience_seconds``, and then raises
    ``StoreUnreachable``. Spans do not wait for that: those that cannot be delivered within a few seconds are
    written to this machine's disk, and ``add_many_spans`` returns them with the ``sequence_id`` that they were given
    (0: the server will issue one). A background thread delivers them; an attempt or a rollout is reported as ended
    only after its spans. Very many spans in one call are sent as several requests, each of which is all or none.

    ``close`` gives everything back, sessions of other event loops included; a call after it opens what it needs
    again. An event loop that ends closes its session by itself.

    Args:
        server_address: ``http://host:port``, with a key as ``http://agl:KEY@host:port``, with a prefix if it is to be
            another than ours.
        api_key: sent as a bearer token. Default: the key in the address, else ``AGL_API_KEY``.
        retry_delays: seconds before each further try, instead of exponential back-off; their number bounds the tries.
        health_retry_delays: if given, a retry is made only when the server answers its health route, which is asked
            again after these delays in seconds.
        request_timeout: how long one try may take, in seconds.
        connection_timeout: how long opening a connection may take, in seconds.
        resilience: how hard to try.
        spool_dir: where spans and resources are kept while the server is out of reach; None: nowhere. Default:
            ``AGL_SPOOL_DIR``, else a folder for state in the user's home.
        spool_max_bytes: the most that spans of all processes for this server may take there.
        max_connections: the most connections in one event loop.
        tls_ca_file: the certificates that the server's is checked with; None: those of the system.

    Raises:
        InvalidValue: the address is none.
    """

    def __init__(
        self,
        server_address: str,
        *,
        api_key: str | None = None,
        retry_delays: Sequence[float] | None = None,
        health_retry_delays: Sequence[float] | None = None,
        request_timeout: float = 30.0,
        connection_timeout: float = 5.0,
        resilience: Resilience = Resilience(),  # noqa: B008 - a value that cannot change
        spool_dir: str | Path | None | Unset = UNSET,
        spool_max_bytes: int = _DEFAULT_SPOOL_BYTES,
        max_connections: int = 256,
        tls_ca_file: str | Path | None = None,
    ) -> None:
        self._arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self._inherited: list[object] = []
        self._assemble(**self._arguments)
        client = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _begin_anew(client()))

    def _assemble(
        self,
        server_address: str,
        *,
        api_key: str | None,
        request_timeout: float,
        connection_timeout: float,
        retry_delays: Sequence[float] | None,
        health_retry_delays: Sequence[float] | None,
        resilience: Resilience,
        spool_dir: str | Path | None | Unset,
        spool_max_bytes: int,
        max_connections: int,
        tls_ca_file: str | Path | None,
    ) -> None:
        """Wire the parts together; none of them does anything yet."""
        address = parse_address(server_address)
        key = api_key or address.api_key or resolve_str_env_var(LightningEnvVar.AGL_API_KEY)
        self.server_address_root = address.root
        """Where the server is, without a prefix."""
        self.server_address = address.root + COMPATIBLE.prefix
        """Where clients of 0.3 find the routes."""
        self._http = HttpTransport(
            address.root,
            {"User-Agent": "agentlightning", **({"Authorization": f"Bearer {key}"} if key else {})},
            connect_seconds=connection_timeout,
            max_connections=max_connections,
            ssl_context=None if tls_ca_file is None else ssl.create_default_context(cafile=str(tls_ca_file)),
        )
        self._calls, self._health, self._breaker = make_resilient(
            self._http,
            server=address.root,
            probe=_health_probe(address.dialect.prefix, min(connection_timeout, request_timeout)),
            numbers=resilience,
            retry_delays=retry_delays,
            health_retry_delays=health_retry_delays,
        )
        self._ids = TimeOrderedIds()
        caller = Caller(
            self._calls,
            address.dialect.prefix,
            self._ids,
            timeout_seconds=request_timeout,
            patience_seconds=resilience.patience_seconds,
        )
        folder = state_folder(spool_dir, address)
        spools = None if folder is None else SpoolFolder(folder, spool_max_bytes)
        self._spans = SpanDelivery(caller, spools, resilience.spool_after_seconds)
        self._claims = Claims(caller)
        cache = None if folder is None else ResourceCache(folder / "resources")
        super().__init__(caller, cache, resilience.cache_after_seconds, self._health.cached_resources)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self._arguments)

    def leave_to_parent(self) -> None:
        """Begin anew, in a forked child; called by itself there."""
        self._spans.abandon()
        self._inherited += [self._http, self._spans]
        self._assemble(**self._arguments)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.server_address_root!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, *, grace_seconds: float = 2.0) -> None:
        """Let go of connections, threads and files; calls that are under way raise ``StoreClosed``. Idempotent.

        Args:
            grace_seconds: how long spans that wait on the disk may still be sent. What is left is delivered by the
                next client on this machine.
        """
        await self._spans.close(grace_seconds)
        self._calls.interrupt()
        await self._http.close()

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        return {"thread_safe": True, "async_safe": True, "zero_copy": True, "otlp_traces": True, "plain_spans": True}

    @property
    def health(self) -> HealthReport:
        """How this client and the server get on."""
        return self._health.report(self._breaker.share, self._spans.report())

    def otlp_traces_endpoint(self) -> str:
        """URL that takes spans by OTLP/HTTP."""
        return self.server_address_root + OTLP_TRACES_PATH

    # --- Rollouts and attempts -------------------------------------------------------------------

    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        return await self._caller.call("enqueue_many_rollouts", {"rollouts": new_rollouts(rollouts, self._ids)})

    async def start_rollout(
        self,
        input: TaskInput,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: JsonObject | None = None,
        worker_id: str | None = None,
        *,
        priority: int = 0,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
    ) -> AttemptedRollout:
        request = enqueue_request(input, mode, resources_id, config, metadata, priority, rollout_id)
        arguments = new_rollout(request, self._ids)
        if attempt_id is not None and rollout_id is None:
            arguments["rollout_id"] = None  # the attempt's id makes the call repeatable, also for who calls it again
        who = given(worker_id=optional_id(worker_id, "worker_id"), attempt_id=optional_id(attempt_id, "attempt_id"))
        return await self._caller.call("start_rollout", {**arguments, **who})

    async def dequeue_many_rollouts(
        self,
        *,
        limit: int = 1,
        worker_id: str | None = None,
        request_id: str | None = None,
        wait_seconds: float = 0.0,
    ) -> Sequence[AttemptedRollout]:
        """Claim up to ``limit`` rollouts. As the contract says, and further:

        Without a ``request_id`` the client makes one up, and confirms what it gets at once, so that the caller need
        not. If the reply to such a claim is never seen, because the server is out of reach for too long or the call is
        cancelled, the next claim of the same worker with the same limit repeats it.
        """
        check_claim_limit(limit)
        optional_id(worker_id, "worker_id")
        optional_id(request_id, "request_id")
        wait_seconds = max(check_finite(wait_seconds, "wait_seconds"), 0.0)
        self._spans.look_for_orphans()
        if request_id is not None:
            return await self._claims.claim(limit, worker_id, request_id, wait_seconds)
        return await self._claims.claim_and_confirm(limit, worker_id, wait_seconds)

    async def start_attempt(
        self, rollout_id: str, worker_id: str | None = None, *, attempt_id: str | None = None
    ) -> AttemptedRollout:
        arguments = given(
            rollout_id=check_id(rollout_id, "rollout_id"),
            worker_id=optional_id(worker_id, "worker_id"),
            attempt_id=optional_id(attempt_id, "attempt_id"),
        )
        return await self._caller.call("start_attempt", arguments)

    async def update_rollout(
        self,
        rollout_id: str,
        input: TaskInput | Unset = UNSET,
        mode: RolloutMode | None | Unset = UNSET,
        resources_id: str | None | Unset = UNSET,
        status: RolloutStatus | Unset = UNSET,
        config: RolloutConfig | Unset = UNSET,
        metadata: JsonObject | None | Unset = UNSET,
        *,
        reason_code: str | None = None,
        reason_message: str | None = None,
    ) -> Rollout:
        check_id(rollout_id, "rollout_id")
        fields = {
            "input": input,
            "mode": mode,
            "resources_id": resources_id,
            "config": config,
            "metadata": metadata,
        }
        changes = rollout_changes(fields, status, reason_code, reason_message)
        if changes.get("status") in _TERMINAL_ROLLOUT:
            await self._spans.settle(rollout_id, None)
        return await self._caller.call("update_rollout", {"rollout_id": rollout_id, **changes})

    async def cancel_rollout(self, rollout_id: str, *, message: str | None = None) -> Rollout:
        check_id(rollout_id, "rollout_id")
        why = given(message=None if message is None else check_text(message, "message"))
        return await self._caller.call("cancel_rollout", {"rollout_id": rollout_id, **why})

    async def update_attempt(
        self,
        rollout_id: str,
        attempt_id: str | Literal["latest"],
        status: AttemptStatus | Unset = UNSET,
        worker_id: str | Unset = UNSET,
        last_heartbeat_time: float | Unset = UNSET,
        metadata: JsonObject | None | Unset = UNSET,
        *,
        reason_code: str | None = None,
        reason_message: str | None = None,
    ) -> Attempt:
        check_id(rollout_id, "rollout_id")
        if attempt_id != "latest":
            check_id(attempt_id, "attempt_id")
        said = report(status, worker_id, last_heartbeat_time, metadata, reason_code, reason_message)
        if said.get("status") in _TERMINAL_ATTEMPT:
            await self._spans.settle(rollout_id, None if attempt_id == "latest" else attempt_id)
        return await self._caller.call("update_attempt", {"rollout_id": rollout_id, "attempt_id": attempt_id, **said})

    async def finish_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        status: AttemptEnd,
        spans: Sequence[Span | PlainSpan] = (),
        *,
        metadata: JsonObject | None | Unset = UNSET,
        reason_code: str | None = None,
        reason_message: str | None = None,
        claim_limit: int = 0,
        worker_id: str | None = None,
        request_id: str | None = None,
    ) -> FinishedAttempt:
        """Store the last spans of an attempt, end it, and claim the next rollouts. As the contract says, and further:

        Spans that wait on this machine's disk are delivered first; the new ones go there too while the server is out
        of reach, and the end of the attempt is reported after them. Without a ``request_id`` the client makes one up,
        and confirms what it claimed at once, as ``dequeue_many_rollouts`` does.
        """
        said = report(status, UNSET, UNSET, metadata, reason_code, reason_message)
        encoded = encode_spans(spans)
        check_spans_of(spans, check_id(rollout_id, "rollout_id"), check_id(attempt_id, "attempt_id"))
        check_claim_limit(claim_limit, least=0, what="claim_limit")
        optional_id(worker_id, "worker_id")
        optional_id(request_id, "request_id")
        arguments = {"rollout_id": rollout_id, "attempt_id": attempt_id, **said}
        if claim_limit:
            arguments |= given(
                claim_limit=claim_limit, worker_id=worker_id, request_id=request_id or self._ids.mint("rq-")
            )
        finished: FinishedAttempt | None = None
        if encoded:
            finished = await self._spans.send_with("finish_attempt", arguments, encoded)
        if finished is None:
            issued = await self._spans.add(encoded, [(rollout_id, attempt_id)] * len(encoded)) if encoded else []
            await self._spans.settle(rollout_id, attempt_id)
            ended: FinishedAttempt = await self._caller.call("finish_attempt", arguments)
            finished = ended.model_copy(update={"sequence_ids": [number or 0 for number in issued]})
        if claim_limit and request_id is None:
            finished.claimed = await self._claims.confirm_all(finished.claimed)
        return finished

    async def release_attempt(self, rollout_id: str, attempt_id: str) -> Attempt:
        ids = {"rollout_id": check_id(rollout_id, "rollout_id"), "attempt_id": check_id(attempt_id, "attempt_id")}
        return await self._caller.call("release_attempt", ids)

    async def delete_finished_rollouts(self, *, older_than_seconds: float) -> int:
        age = check_finite(older_than_seconds, "older_than_seconds")
        if age < 0:
            raise InvalidValue(f"older_than_seconds {age:g} is not valid; give 0 or more")
        return await self._caller.call(
            "delete_finished_rollouts",
            {"older_than_seconds": age},
            timeout_seconds=_LONG_WORK_SECONDS,
            patience_seconds=_LONG_WORK_SECONDS,
        )

    # --- Spans -----------------------------------------------------------------------------------

    async def add_many_spans(self, spans: Sequence[AnySpan]) -> Sequence[AnySpan]:
        encoded = encode_spans(spans)
        if not encoded:
            return []
        issued = await self._spans.add(encoded, [(span.rollout_id, span.attempt_id) for span in spans])
        return [
            span if number is None else stored_span(span, number)
            for span, number in zip(spans, issued, strict=True)
            if number != 0
        ]

    async def get_many_span_sequence_ids(self, rollout_attempt_ids: Sequence[tuple[str, str]]) -> Sequence[int]:
        wanted = check_pairs(rollout_attempt_ids)
        return await self._caller.call("get_many_span_sequence_ids", {"rollout_attempt_ids": wanted})


def _rebuild(kind: type[LightningStoreClient], arguments: dict[str, Any]) -> LightningStoreClient:
    return kind(**arguments)


def _begin_anew(client: LightningStoreClient | None) -> None:
    """In a forked child. Sockets are the parent's: they are kept, unused, so that nothing closes them. Locks may be
    held by threads that are not here, so all parts are made again."""
    if client is not None:
        client.leave_to_parent()


def _health_probe(prefix: str, seconds: float) -> WireRequest:
    return WireRequest("GET", f"{prefix}/health", priority="read", timeout_seconds=seconds, patience_seconds=seconds)
