"""The reading methods of the store: pages, single records, waits, statistics and the consistency check."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, Literal, get_args

from agentlightning.errors import InvalidValue, NotFound
from agentlightning.lifecycle.records import AttemptRow, RolloutRow, WorkerRow
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.backend import Filter, Page, PageQuery, ReadTransaction, ResourcesBy
from agentlightning.store.base import (
    LightningStore,
    LightningStoreCapabilities,
    LightningStoreStatistics,
    StoreHost,
)
from agentlightning.store.core import Core
from agentlightning.store.operations.rows import load_change
from agentlightning.store.queries import Paging, as_of, contains, either, equals, paged, within
from agentlightning.store.records import RECORDS, Shown
from agentlightning.store.validation import check_finite, check_id, check_version
from agentlightning.store.verify import verify
from agentlightning.types import (
    Attempt,
    PaginatedResult,
    ResourcesUpdate,
    Rollout,
    RolloutStatus,
    Span,
    VerificationReport,
    Worker,
    WorkerStatus,
)

_ROLLOUT_STATES = get_args(RolloutStatus)
_WORKER_STATES = get_args(WorkerStatus)
_SHORT_PAGE = 256
"""Up to this many rows are read in the caller's thread, because a short read is cheaper than a switch of threads."""
_WHOLE_STORE = 2**31
_TOUCHED = frozenset({"last_heartbeat_time", "last_dequeue_time", "last_busy_time", "last_idle_time"})
"""Fields of attempts and workers whose newest values may not be in the database, which sorts by what it has."""


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
        found: PaginatedResult[Rollout] = await self._page(PageQuery("rollouts", (_is("rollout_id", rollout_id),)))
        return found.items[0] if found.items else None

    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        check_id(rollout_id, "rollout_id")

        async def latest(tx: ReadTransaction) -> Attempt | None:
            rollout, attempt = await load_change(tx, rollout_id)
            return None if attempt is None else self._shown.attempt_view(as_of(rollout, attempt, tx.now()).attempt)

        try:
            return await self._core.read(latest)
        except NotFound:
            return None

    async def query_rollouts(
        self,
        *,
        status_in: Sequence[RolloutStatus] | None = None,
        rollout_id_in: Sequence[str] | None = None,
        rollout_id_contains: str | None = None,
        filter_logic: Literal["and", "or"] = "and",
        sort_by: str | None = None,
        sort_order: Literal["asc", "desc"] = "asc",
        limit: int = -1,
        offset: int = 0,
        status: Sequence[RolloutStatus] | None = None,
        rollout_ids: Sequence[str] | None = None,
    ) -> PaginatedResult[Rollout]:
        status_in = either("status_in", status_in, "status", status)
        rollout_id_in = either("rollout_id_in", rollout_id_in, "rollout_ids", rollout_ids)
        query = paged(
            "rollouts",
            Paging(sort_by, sort_order, limit, offset),
            filters=(
                within("status", status_in, _ROLLOUT_STATES),
                within("rollout_id", rollout_id_in),
                contains("rollout_id", rollout_id_contains),
            ),
            logic=filter_logic,
        )
        return await self._page(query)

    async def query_attempts(
        self,
        rollout_id: str,
        *,
        sort_by: str | None = "sequence_id",
        sort_order: Literal["asc", "desc"] = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Attempt]:
        scope = (_is("rollout_id", rollout_id),)
        return await self._page(paged("attempts", Paging(sort_by, sort_order, limit, offset), scope=scope))

    async def wait_for_rollouts(self, *, rollout_ids: Sequence[str], timeout: float | None = None) -> list[Rollout]:
        wanted = within("rollout_id", rollout_ids)
        if wanted is None:
            raise InvalidValue("rollout_ids is None; give the ids of the rollouts to wait for")
        ids: tuple[str, ...] = tuple(dict.fromkeys(wanted.value))
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

    async def query_spans(
        self,
        rollout_id: str,
        attempt_id: str | Literal["latest"] | None = None,
        *,
        trace_id: str | None = None,
        trace_id_contains: str | None = None,
        span_id: str | None = None,
        span_id_contains: str | None = None,
        parent_id: str | None = None,
        parent_id_contains: str | None = None,
        name: str | None = None,
        name_contains: str | None = None,
        filter_logic: Literal["and", "or"] = "and",
        limit: int = -1,
        offset: int = 0,
        sort_by: str | None = "sequence_id",
        sort_order: Literal["asc", "desc"] = "asc",
    ) -> PaginatedResult[Span]:
        scope = [_is("rollout_id", rollout_id)]
        if attempt_id is not None and attempt_id != "latest":
            scope.append(_is("attempt_id", attempt_id))
        query = paged(
            "spans",
            Paging(sort_by, sort_order, limit, offset),
            scope=scope,
            filters=(
                equals("trace_id", trace_id),
                contains("trace_id", trace_id_contains),
                equals("span_id", span_id),
                contains("span_id", span_id_contains),
                equals("parent_id", parent_id),
                contains("parent_id", parent_id_contains),
                equals("name", name),
                contains("name", name_contains),
            ),
            logic=filter_logic,
        )
        return await self._page(query, latest_only=attempt_id == "latest")

    async def get_resources_by_id(self, resources_id: str, *, version: int | None = None) -> ResourcesUpdate | None:
        if version is not None:
            check_version(version)
        return await self._resources(ResourcesBy(check_id(resources_id, "resources_id"), version))

    async def get_latest_resources(self) -> ResourcesUpdate | None:
        return await self._resources(ResourcesBy())

    async def query_resources(
        self,
        *,
        resources_id: str | None = None,
        resources_id_contains: str | None = None,
        sort_by: str | None = None,
        sort_order: Literal["asc", "desc"] = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[ResourcesUpdate]:
        filters = (equals("resources_id", resources_id), contains("resources_id", resources_id_contains))
        paging = Paging(sort_by, sort_order, limit, offset)
        return await self._page(paged("resources", paging, filters=filters, newest_only=True))

    async def query_resource_versions(
        self, resources_id: str, *, sort_order: Literal["asc", "desc"] = "asc", limit: int = -1, offset: int = 0
    ) -> PaginatedResult[ResourcesUpdate]:
        scope = (_is("resources_id", resources_id),)
        return await self._page(paged("resources", Paging("version", sort_order, limit, offset), scope=scope))

    async def get_worker_by_id(self, worker_id: str) -> Worker | None:
        check_id(worker_id, "worker_id")

        async def worker(tx: ReadTransaction) -> Worker | None:
            row = await tx.get(WorkerRow, worker_id)
            return None if row is None else self._shown.worker_view(row)

        return await self._core.read(worker)

    async def query_workers(
        self,
        *,
        status_in: Sequence[WorkerStatus] | None = None,
        worker_id_contains: str | None = None,
        filter_logic: Literal["and", "or"] = "and",
        sort_by: str | None = None,
        sort_order: Literal["asc", "desc"] = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Worker]:
        filters = (within("status", status_in, _WORKER_STATES), contains("worker_id", worker_id_contains))
        paging = Paging(sort_by, sort_order, limit, offset)
        return await self._page(paged("workers", paging, filters=filters, logic=filter_logic))

    async def verify(self) -> VerificationReport:
        return await self._core.read(verify, rows=_WHOLE_STORE)

    # --- Pages -----------------------------------------------------------------------------------

    async def _page(self, query: PageQuery, *, latest_only: bool = False) -> PaginatedResult[Any]:
        """One page as public records.

        A long page is read and converted in another thread, so that it does not block the event loop; so is one whose
        filters may scan many rows to find few.
        """

        def answer(asked: PageQuery) -> Callable[[ReadTransaction], Awaitable[Page]]:
            return lambda tx: _answer(tx, asked, latest_only, self._shown)

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

    async def _resources(self, selection: ResourcesBy) -> ResourcesUpdate | None:
        async def resources(tx: ReadTransaction) -> ResourcesUpdate | None:
            row = await tx.get_resources(selection)
            return None if row is None else self._shown.resources_view(row)

        return await self._core.read(resources)


async def _answer(tx: ReadTransaction, query: PageQuery, latest_only: bool, shown: Shown) -> Page:
    if latest_only:
        rollout = await tx.get(RolloutRow, query.scope[0].value)
        latest = None if rollout is None else rollout.latest_attempt_id
        query = query._replace(scope=(*query.scope, Filter("attempt_id", "equals", latest)))
    page = await tx.page(query)
    match query.table:
        case "rollouts":
            records = [_rollout_now(tx, shown, *row) for row in page.rows]
        case "attempts":
            records = [shown.attempt_view(await _attempt_now(tx, row)) for row in page.rows]
        case "spans":
            records = [shown.span_view(row) for row in page.rows]
        case "resources":
            records = [shown.resources_view(row) for row in page.rows]
        case "workers":
            records = [shown.worker_view(row) for row in page.rows]
    return Page(records, page.total)


def _rollout_now(tx: ReadTransaction, shown: Shown, rollout: RolloutRow, latest: AttemptRow | None) -> Any:
    if latest is None:
        return shown.rollout_view(rollout, None)
    return shown.attempted_view(*as_of(rollout, latest, tx.now()))


async def _attempt_now(tx: ReadTransaction, attempt: AttemptRow) -> AttemptRow:
    if attempt.deadline is None or attempt.deadline > tx.now().lease:
        return attempt
    rollout = await tx.get(RolloutRow, attempt.rollout_id)
    return attempt if rollout is None else as_of(rollout, attempt, tx.now()).attempt


def _is(field: str, value: str) -> Filter:
    return Filter(field, "equals", check_id(value, field))


def _host(now: float, disk: tuple[int, int] | None) -> StoreHost:
    host: StoreHost = {"time": now, "version": _version()}
    if disk is not None:
        host["disk_free_bytes"], host["disk_total_bytes"] = disk
    return host


@cache
def _version() -> str:
    return version("agentlightning")
