"""``LightningStoreClient``: the contract of a store, kept by a server somewhere else.

The methods check their arguments as the store itself does and leave paths, verbs and the reading of replies to the
table of routes. Whatever may go wrong on the way is dealt with below (``retry``), and is safe to repeat,
because every write carries ids that were made up before it was first sent.
"""

from __future__ import annotations

import os
import random
import secrets
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from agentlightning.errors import StoreUnavailable
from agentlightning.http.client.cache import ResourceCache, state_folder
from agentlightning.http.client.calls import Caller, Claims, Plan, plan_of, wait_in_slices
from agentlightning.http.client.health import HealthReport
from agentlightning.http.client.retry import Resilience, Retrying
from agentlightning.http.client.span_delivery import SpanDelivery
from agentlightning.http.client.spool import SpoolFolder
from agentlightning.http.client.transport import Connections, HttpTransport, WireRequest
from agentlightning.http.routes import CLIENT_ROUTES, COMPATIBLE, OTLP_TRACES_PATH, parse_address
from agentlightning.http.signatures import DerivedStore, derive_methods
from agentlightning.security.credentials import credentials_for
from agentlightning.store.arguments import check_spans_of, encode_spans
from agentlightning.store.base import LightningStore, LightningStoreCapabilities
from agentlightning.store.records import stored_span
from agentlightning.store.sources import IdSource, TimeOrderedIds
from agentlightning.types import (
    UNSET,
    AttemptedRollout,
    FinishedAttempt,
    ResourcesUpdate,
    Rollout,
    Unset,
)
from agentlightning.types.plain_spans import AnySpan

_TERMINAL = frozenset({"failed", "succeeded", "cancelled"})
_USUAL_LEASE_SECONDS = 30.0
_DEFAULT_SPOOL_BYTES = 1024 * 1024 * 1024


class Surroundings(NamedTuple):
    """What a client takes from its process and from the network. A simulation of many processes brings its own."""

    connections: Connections | None = None
    """Carry the requests; None: HTTP."""
    ids: IdSource | None = None
    """Makes the ids of requests and records; None: ``TimeOrderedIds``."""
    monotonic: Callable[[], float] = time.monotonic
    """Seconds since some moment, the same as those of the callers' event loops."""
    chance: Callable[[], float] = random.SystemRandom().random
    """A number from 0 up to 1, for jitter."""
    delivery: Callable[[Caller, SpoolFolder | None, float], SpanDelivery] = SpanDelivery
    """Takes spans from the disk to the server."""
    token: Callable[[], str] = partial(secrets.token_hex, 4)
    """Makes names of spools."""


def _call(name: str) -> Callable[..., Any]:
    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan = plan_of(name)
        arguments = plan.bind(args, kwargs)
        request = self._caller.request(plan, arguments)
        if plan.route.priority == "heartbeat":  # of a runner, whose agents may be at work for long without a call
            lease = arguments.get("lease_seconds")
            self._transport.keep_probing(lease if isinstance(lease, int | float) else _USUAL_LEASE_SECONDS)
        if plan.route.priority == "completion" and arguments.get("status") in _TERMINAL:
            # Spans that wait on the disk go first: otherwise an algorithm that waits for the end would read an attempt
            # without its last rewards.
            attempt_id = arguments.get("attempt_id", "latest")
            await self._spans.settle(arguments["rollout_id"], None if attempt_id == "latest" else attempt_id)
        return plan.result(await self._caller.send(request))

    async def finish(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await self._finish(plan_of(name), plan_of(name).bind(args, kwargs))

    async def resources(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await self._resources(plan_of(name), plan_of(name).bind(args, kwargs))

    ways = {"finish_attempt": finish, "get_resources_by_id": resources, "get_latest_resources": resources}
    return ways.get(name, call)


@derive_methods(_call, CLIENT_ROUTES)
class LightningStoreClient(DerivedStore):
    """A store that is served over HTTP. May be called from any thread and any event loop, and pickled.

    A call goes on trying while the server is out of reach, for ``resilience.patience_seconds``, and then raises
    ``StoreUnreachable``. Spans do not wait for that: those that cannot be delivered within a few seconds are
    written to this machine's disk, and ``add_many_spans`` returns them with the ``sequence_id`` that they were given
    (0: the server will issue one). A background thread delivers them; an attempt or a rollout is reported as ended
    only after its spans. Very many spans in one call are sent as several requests, each of which is all or none.
    Resources are read from the disk while the server is out of reach.

    ``close`` gives everything back, sessions of other event loops included; a call after it opens what it needs
    again. An event loop that ends closes its session by itself.

    Args:
        server_address: ``http://host:port``, with a key as ``http://agl:KEY@host:port``, with a prefix if it is to be
            another than ours.
        api_key: sent as a bearer token. Default: the key in the address; else, if the server belongs to a run of this
            user on this machine, the one that it made for itself; else ``AGL_API_KEY``.
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
        tls_ca_file: the authorities that the server's certificate is checked with. Default: ``AGL_TLS_CA_FILE``, else
            those of the system.
        tls_certificate: the server's certificate itself; it is accepted under any name, and no other one is.
        surroundings: what a simulation replaces; None: those of this process.

    Raises:
        InvalidValue: the address is none, or a file has no certificates.
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
        tls_certificate: str | Path | None = None,
        surroundings: Surroundings | None = None,
    ) -> None:
        self._arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self._inherited: list[object] = []
        self._assemble(self._arguments)
        begin_anew = weakref.WeakMethod(self.leave_to_parent)

        def in_child() -> None:
            begin = begin_anew()
            if begin is not None:
                begin()

        os.register_at_fork(after_in_child=in_child)

    def _assemble(self, given: dict[str, Any]) -> None:
        """Wire the parts together, by the arguments of the constructor; none of them does anything yet."""
        address = parse_address(given["server_address"])
        find = partial(
            credentials_for,
            address.root,
            given["api_key"] or address.api_key,
            tls_ca_file=given["tls_ca_file"],
            tls_certificate=given["tls_certificate"],
        )
        resilience: Resilience = given["resilience"]
        around: Surroundings = given["surroundings"] or Surroundings()
        timeout, connect = given["request_timeout"], given["connection_timeout"]
        self.server_address_root = address.root
        """Where the server is, without a prefix."""
        self.server_address = address.root + COMPATIBLE.prefix
        """Where clients of 0.3 find the routes."""
        self._http = around.connections or HttpTransport(
            address.root,
            find,
            connect_seconds=connect,
            max_connections=given["max_connections"],
        )
        probe_seconds = min(connect, timeout)
        probe = WireRequest("GET", f"{address.dialect.prefix}/health", None, "read", probe_seconds, probe_seconds)
        self._transport = Retrying(
            self._http,
            server=address.root,
            probe=probe,
            numbers=resilience,
            retry_delays=given["retry_delays"],
            health_retry_delays=given["health_retry_delays"],
            monotonic=around.monotonic,
            chance=around.chance,
        )
        self._ids = around.ids or TimeOrderedIds()
        self._caller = Caller(
            self._transport,
            address.dialect.prefix,
            self._ids,
            timeout_seconds=timeout,
            patience_seconds=resilience.patience_seconds,
        )
        folder = state_folder(given["spool_dir"], address)
        spools = None
        if folder is not None:
            spools = SpoolFolder(folder, given["spool_max_bytes"], around.monotonic, around.token)
        self._spans = around.delivery(self._caller, spools, resilience.spool_after_seconds)
        self._claims = Claims(self._caller)
        self._cache = None if folder is None else ResourceCache(folder / "resources")
        self._cache_after_seconds = resilience.cache_after_seconds

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._arguments), ()

    def leave_to_parent(self) -> None:
        """Begin anew, in a forked child; called by itself there.

        Sockets are the parent's: they are kept, unused, so that nothing closes them. Locks may be held by threads that
        are not here, so all parts are made again.
        """
        self._spans.abandon()
        self._inherited += [self._http, self._spans]
        self._assemble(self._arguments)

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
        self._transport.interrupt()
        await self._http.close()

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        return {"thread_safe": True, "async_safe": True, "zero_copy": True, "otlp_traces": True, "plain_spans": True}

    @property
    def health(self) -> HealthReport:
        """How this client and the server get on."""
        return self._transport.health.report(self._spans.report())

    def otlp_traces_endpoint(self) -> str:
        """URL that takes spans by OTLP/HTTP."""
        return self.server_address_root + OTLP_TRACES_PATH

    # --- Methods that do more than send their arguments ----------------------------------------------

    # One span goes the way of many: it may have to wait on the disk, too.
    add_span = LightningStore.add_span

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
        if self._spans.orphans_unknown:
            self._spans.look_for_orphans()
        if request_id is not None:
            return await self._claims.claim(limit, worker_id, request_id, wait_seconds)
        return await self._claims.claim_and_confirm(limit, worker_id, wait_seconds)

    async def _finish(self, plan: Plan, arguments: dict[str, Any]) -> FinishedAttempt:
        """``finish_attempt``. Without a ``request_id`` it confirms what it claimed, as ``dequeue_many_rollouts`` does.

        Spans that wait on this machine's disk are delivered first; the new ones go there too while the server is out
        of reach, and the end of the attempt is reported after them.
        """
        spans, ids = arguments.pop("spans", ()), (arguments["rollout_id"], arguments["attempt_id"])
        encoded = encode_spans(spans)
        check_spans_of(spans, *ids)
        confirms = bool(arguments.get("claim_limit")) and arguments.get("request_id") is None
        if confirms:
            arguments["request_id"] = self._ids.mint("rq-")
        request = self._caller.request(plan, arguments)  # no span is sent for a bad argument
        finished: FinishedAttempt | None = None
        if encoded:
            finished = await self._spans.send_with(plan.route.method, arguments, encoded)
        if finished is None:
            issued = await self._spans.add(encoded, spans) if encoded else []
            await self._spans.settle(*ids)
            ended: FinishedAttempt = plan.result(await self._caller.send(request))
            finished = ended.model_copy(update={"sequence_ids": [number or 0 for number in issued]})
        if confirms:
            finished.claimed = await self._claims.confirm_all(finished.claimed)
        return finished

    async def wait_for_rollouts(self, *, rollout_ids: Sequence[str], timeout: float | None = None) -> list[Rollout]:
        """Wait until all of these rollouts have ended, as the contract says, in requests of at most 20 seconds."""
        return await wait_in_slices(self._caller, rollout_ids, timeout)

    async def add_many_spans(self, spans: Sequence[AnySpan]) -> Sequence[AnySpan]:
        """Store spans. As the contract says, but for those that are written to the disk meanwhile."""
        encoded = encode_spans(spans)
        if not encoded:
            return []
        issued = await self._spans.add(encoded, spans)
        return [
            span if number is None else stored_span(span, number)
            for span, number in zip(spans, issued, strict=True)
            if number != 0
        ]

    async def _resources(self, plan: Plan, arguments: dict[str, Any]) -> ResourcesUpdate | None:
        """What the server says of resources; what it said last, when it cannot be asked."""
        request = self._caller.request(plan, arguments)
        asked = (arguments.get("resources_id"), arguments.get("version"))
        cache = self._cache
        kept = cache is not None and cache.has(*asked)
        if kept:
            request = request._replace(patience_seconds=self._cache_after_seconds)
        try:
            found: ResourcesUpdate | None = plan.result(await self._caller.send(request))
        except StoreUnavailable:
            cached = cache.read(*asked) if cache is not None and kept else None
            if cached is None:
                raise
            self._transport.health.cached_resources(cached.age_seconds)
            return cached
        if cache is not None:
            self._transport.health.cached_resources(None)
            if found is not None:
                cache.keep(found, *asked)
            elif kept:
                cache.forget(*asked)
        return found
