"""The reading methods of the store: pages, single records, waits, statistics and the consistency check."""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import cache, wraps
from importlib.metadata import version
from typing import Any, TypeVar, cast, get_args

from agentlightning.lifecycle.records import AttemptRow, RolloutRow, WorkerRow
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.backend import Filter, Page, PageQuery, ReadTransaction, ResourcesBy, Table
from agentlightning.store.base import LightningStore, LightningStoreCapabilities, LightningStoreStatistics, StoreHost
from agentlightning.store.core import Core
from agentlightning.store.queries import as_of, matches, page_query, within, without_latest
from agentlightning.store.records import RECORDS, Shown
from agentlightning.store.validation import check_finite, check_id, check_version
from agentlightning.store.verify import verify
from agentlightning.types import (
    Attempt,
    PaginatedResult,
    ResourcesUpdate,
    Rollout,
    RolloutStatus,
    VerificationReport,
    Worker,
    WorkerStatus,
)

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])

_version = cache(version)
_ROLLOUT_STATES = get_args(RolloutStatus)
_SHORT_PAGE = 256
"""Up to this many rows are read in the caller's thread, because a short read is cheaper than a switch of threads."""
_WHOLE_STORE = 2**31
_TOUCHED = frozenset({"last_heartbeat_time", "last_dequeue_time", "last_busy_time", "last_idle_time"})
"""Fields of attempts and workers whose newest values may not be in the database, which sorts by what it has."""


def _paged(contract: Method, table: Table, *scope: str, states: Sequence[str] | None = None, **fixed: Any) -> Method:
    """A querying method with the signature of the contract's. See ``page_query``; ``fixed``: fields of the query."""
    signature = inspect.signature(contract)
    parameters = list(signature.parameters.values())[1:]
    positional = [each.name for each in parameters if each.kind is not each.KEYWORD_ONLY]
    required = {each.name for each in parameters if each.default is each.empty}
    defaults = {each.name: each.default for each in parameters}

    @wraps(contract)
    async def query(self: Any, *args: Any, **kwargs: Any) -> PaginatedResult[Any]:
        given = {**dict(zip(positional, args, strict=False)), **kwargs}  # `Signature.bind` takes as long as the query
        if len(given) < len(args) + len(kwargs) or not required <= given.keys() <= defaults.keys():
            signature.bind(self, *args, **kwargs)  # raises as a call does
        asked = page_query(table, defaults | given, scope, states)
        return await self._page(asked._replace(**fixed) if fixed else asked)

    query.__dict__.pop("__isabstractmethod__", None)
    return cast("Method", query)


class ReadingStore(LightningStore):
    """A store's reading methods.

    Args:
        core: runs the operations.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._shown = RECORDS
        self._since = time.monotonic()

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        return {"thread_safe": True, "async_safe": True, "zero_copy": False, "otlp_traces": False, "plain_spans": True}

    async def statistics(self) -> LightningStoreStatistics:
        async def counters(tx: ReadTransaction) -> tuple[dict[str, int], float]:
            return await tx.counters(), tx.now().wall

        count, now = await self._core.read(counters)
        by_status = {state: count.get(f"rollouts.{state}", 0) for state in _ROLLOUT_STATES}
        return {
            "name": self._core.backend.name,
            "total_rollouts": sum(by_status.values()),
            "total_attempts": count.get("attempts", 0),
            "total_spans": count.get("spans", 0),
            "total_resources": count.get("resources", 0),
            "total_workers": count.get("workers", 0),
            "uptime": time.monotonic() - self._since,
            "rollouts_by_status": by_status,
            "total_span_bytes": count.get("span_bytes", 0),
            "host": _host(now, self._core.backend.disk()),
        }

    async def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        found = await self._page(PageQuery("rollouts", (matches("rollout_id", rollout_id),)))
        return found.items[0] if found.items else None

    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        check_id(rollout_id, "rollout_id")

        async def latest(tx: ReadTransaction) -> AttemptRow | None:
            rollout = await tx.get(RolloutRow, rollout_id)
            if rollout is None or rollout.latest_attempt_id is None:
                return None
            attempt = await tx.get(AttemptRow, rollout.latest_attempt_id)
            return None if attempt is None else as_of(rollout, attempt, tx.now()).attempt

        return await self._one(latest, self._shown.attempt_view)

    async def wait_for_rollouts(self, *, rollout_ids: Sequence[str], timeout: float | None = None) -> list[Rollout]:
        ids: list[str] = list(dict.fromkeys(within("rollout_id", rollout_ids).value))
        seconds = None if timeout is None else max(check_finite(timeout, "timeout"), 0.0)
        self._core.open()
        self._core.claims.release()
        rows = await self._core.finishes.wait(ids, self._rollouts, seconds)
        return [self._shown.rollout_view(*rows[each]) for each in ids if each in rows and rows[each].rollout.final]

    async def _rollouts(self, rollout_ids: Collection[str]) -> dict[str, Change]:
        """Rollouts and their latest attempts, by id."""
        query = PageQuery("rollouts", (Filter("rollout_id", "within", tuple(rollout_ids)),), with_total=False)
        page = await self._core.read(lambda tx: tx.page(query), rows=len(rollout_ids))
        return {rollout.rollout_id: Change(rollout, attempt) for rollout, attempt in page.rows}

    async def get_resources_by_id(self, resources_id: str, *, version: int | None = None) -> ResourcesUpdate | None:
        wanted = ResourcesBy(
            check_id(resources_id, "resources_id"), None if version is None else check_version(version)
        )
        return await self._one(lambda tx: tx.get_resources(wanted), self._shown.resources_view)

    async def get_latest_resources(self) -> ResourcesUpdate | None:
        return await self._one(lambda tx: tx.get_resources(ResourcesBy()), self._shown.resources_view)

    async def get_worker_by_id(self, worker_id: str) -> Worker | None:
        check_id(worker_id, "worker_id")
        return await self._one(lambda tx: tx.get(WorkerRow, worker_id), self._shown.worker_view)

    async def _one(self, get: Callable[[ReadTransaction], Awaitable[T | None]], view: Callable[[T], Any]) -> Any:
        """One row as a public record, if there is one. It is converted where a damaged value is recognized."""

        async def one(tx: ReadTransaction) -> Any:
            row = await get(tx)
            return None if row is None else view(row)

        return await self._core.read(one)

    async def verify(self) -> VerificationReport:
        async def check(tx: ReadTransaction) -> tuple[VerificationReport, float]:
            return await verify(tx), tx.now().wall

        report, now = await self._core.read(check, rows=_WHOLE_STORE)
        self._core.tally.verified(now, report)
        return report

    # --- Pages: the arguments of these methods, and what they mean, are those of the contract ---

    query_rollouts = _paged(LightningStore.query_rollouts, "rollouts", states=_ROLLOUT_STATES)
    query_attempts = _paged(LightningStore.query_attempts, "attempts", "rollout_id")
    query_spans = _paged(LightningStore.query_spans, "spans", "rollout_id", "attempt_id")
    query_resources = _paged(LightningStore.query_resources, "resources", newest_only=True)
    query_resource_versions = _paged(
        LightningStore.query_resource_versions, "resources", "resources_id", sort_by="version"
    )
    query_workers = _paged(LightningStore.query_workers, "workers", states=get_args(WorkerStatus))

    async def _page(self, query: PageQuery) -> PaginatedResult[Any]:
        """One page as public records.

        A long page is read and converted in another thread, so that it does not block the event loop; so is one whose
        filters may scan many rows to find few.
        """

        def answer(asked: PageQuery) -> Callable[[ReadTransaction], Awaitable[Page]]:
            return lambda tx: _answer(tx, asked, self._shown)

        short = query if 0 < query.limit <= _SHORT_PAGE else query._replace(limit=_SHORT_PAGE + 1)
        scans = not query.scope and bool(query.filters or query.sort_by)
        rows = _WHOLE_STORE if scans else _SHORT_PAGE
        touched = query.sort_by in _TOUCHED and query.table in ("workers", "attempts")
        page: Page = await self._core.read(answer(short), rows=rows, save_touched=touched)
        if short is not query and len(page.rows) > _SHORT_PAGE:
            page = await self._core.read(answer(query), rows=page.total)
        return PaginatedResult[Any].model_construct(
            items=page.rows, limit=query.limit, offset=query.offset, total=page.total
        )


async def _answer(tx: ReadTransaction, query: PageQuery, shown: Shown) -> Page:
    rows, total = await tx.page(await without_latest(tx, query))
    match query.table:
        case "rollouts":
            records = [_rollout_now(tx, shown, *row) for row in rows]
        case "attempts":
            records = [shown.attempt_view(await _attempt_now(tx, row)) for row in rows]
        case "spans":
            records = [shown.span_view(row) for row in rows]
        case "resources":
            records = [shown.resources_view(row) for row in rows]
        case "workers":
            records = [shown.worker_view(row) for row in rows]
    return Page(records, total)


def _rollout_now(tx: ReadTransaction, shown: Shown, rollout: RolloutRow, latest: AttemptRow | None) -> Any:
    return shown.rollout_view(*((rollout, None) if latest is None else as_of(rollout, latest, tx.now())))


async def _attempt_now(tx: ReadTransaction, attempt: AttemptRow) -> AttemptRow:
    if attempt.deadline is None or attempt.deadline > tx.now().lease:
        return attempt
    rollout = await tx.get(RolloutRow, attempt.rollout_id)
    return attempt if rollout is None else as_of(rollout, attempt, tx.now()).attempt


def _host(now: float, disk: tuple[int, int] | None) -> StoreHost:
    host: StoreHost = {"time": now, "version": _version("agentlightning")}
    if disk is not None:
        host["disk_free_bytes"], host["disk_total_bytes"] = disk
    return host
