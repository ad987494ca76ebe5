"""How fast the SQLite store is, and how much memory it takes, in this process.

    scripts/bench store [--runs 5] [--only NAME ...] [--million 1000000] [--json FILE]

Every figure is the median of several runs on a fresh database file with full durability: an
acknowledged write has been synced. The floor is the bare driver doing the same inserts into
the same tables, with 64 rows under one commit, in the same run. Nothing here can fail by
being slow: it reports.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import apsw

from agentlightning import EnqueueRolloutRequest, SqliteLightningStore
from agentlightning.store.sqlite.connections import open_writer
from agentlightning.types import OtelResource, Span, TraceStatus

TASKS = 64
SPAN_BYTES = 1_500
SPANS_PER_ROLLOUT = 6


def make_span(rollout_id: str, attempt_id: str, number: int) -> Span:
    """A span that is about ``SPAN_BYTES`` long as JSON, shaped like a model call."""
    attributes: dict[str, object] = {
        "gen_ai.request.model": "demo",
        "gen_ai.usage.input_tokens": number,
        "gen_ai.usage.output_tokens": 64,
    }
    for index in range(12):
        attributes[f"gen_ai.prompt.{index}.content"] = "the quick brown fox jumps over the lazy dog; 0123456789 ab"
    return Span(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_id=0,
        trace_id=uuid.uuid4().hex,
        span_id=f"{number:016x}",
        parent_id=None,
        name="openai.chat.completion",
        status=TraceStatus(status_code="OK"),
        attributes=attributes,  # pyright: ignore[reportArgumentType]
        events=[],
        links=[],
        start_time=1_700_000_000.0,
        end_time=1_700_000_001.0,
        context=None,
        parent=None,
        resource=OtelResource(attributes={"service.name": "agent"}, schema_url=""),
    )


async def attempts(store: SqliteLightningStore, number: int) -> list[tuple[str, str]]:
    """Attempts in progress, as (rollout_id, attempt_id)."""
    started = [await store.start_rollout({"n": n}) for n in range(number)]
    return [(each.rollout_id, each.attempt.attempt_id) for each in started]


async def share(work: Sequence[Callable[[], Awaitable[object]]], tasks: int = TASKS) -> float:
    """Seconds that ``tasks`` concurrent tasks take for all the work."""
    queue = iter(work)

    async def worker() -> None:
        for each in queue:
            await each()

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(tasks)))
    return time.perf_counter() - began


async def single_spans(path: Path) -> float:
    """Acknowledged single-span writes per second from 64 tasks."""
    number = 20_000
    async with SqliteLightningStore(path) as store:
        owners = await attempts(store, TASKS)
        spans = [make_span(*owners[n % TASKS], n) for n in range(number)]
        return number / await share([lambda span=span: store.add_span(span) for span in spans])


async def batched_spans(path: Path) -> float:
    """Spans per second in batches of 20 from 64 tasks."""
    number, size = 40_000, 20
    async with SqliteLightningStore(path) as store:
        owners = await attempts(store, TASKS)
        batches = [[make_span(*owners[b % TASKS], b * size + n) for n in range(size)] for b in range(number // size)]
        return number / await share([lambda batch=batch: store.add_many_spans(batch) for batch in batches])


async def rollouts(path: Path) -> float:
    """Rollouts per second: enqueue, claim, six spans in one call, finish, each awaited, from 64 tasks."""
    number = 6_000
    async with SqliteLightningStore(path) as store:
        prebuilt = [[make_span("ro", "at", n) for n in range(SPANS_PER_ROLLOUT)] for _ in range(TASKS)]

        async def one(n: int) -> None:
            await store.enqueue_rollout({"question": f"what is {n}"})
            claimed = await store.dequeue_rollout(worker_id=f"worker-{n % TASKS}", request_id=f"claim-{n}")
            assert claimed is not None
            spans = prebuilt.pop()
            for span in spans:
                span.rollout_id = claimed.rollout_id
                span.attempt_id = claimed.attempt.attempt_id
            await store.add_many_spans(spans)
            prebuilt.append(spans)
            await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, "succeeded")

        return number / await share([lambda n=n: one(n) for n in range(number)])


def floor(path: Path) -> float:
    """Rows per second of the bare driver: the same span rows, 64 under one synced commit."""
    number = 20_000
    connection = open_writer(str(path), "full", vfs=None)
    body = make_span("ro", "at", 1).model_dump_json(exclude={"rollout_id", "attempt_id", "sequence_id"}).encode()
    execute = connection.cursor().execute
    sql = "INSERT INTO spans (attempt_seq, sequence_id, issued, span_id, body) VALUES (?, ?, 1, ?, ?)"
    began = time.perf_counter()
    for start in range(0, number, TASKS):
        execute("BEGIN IMMEDIATE")
        for n in range(start, min(start + TASKS, number)):
            execute(sql, (n % TASKS, n // TASKS + 1, f"{n:016x}", body))
        execute("COMMIT")
        if start // TASKS % 200 == 199:
            connection.wal_checkpoint()
    seconds = time.perf_counter() - began
    connection.close()
    return number / seconds


async def claims(path: Path, depth: int) -> float:
    """Claims per second, one by one from 64 tasks, from a queue that is ``depth`` deep."""
    number = min(depth // 2, 10_000)
    async with SqliteLightningStore(path) as store:
        for start in range(0, depth, 1_000):
            await store.enqueue_many_rollouts(
                [EnqueueRolloutRequest(input={"n": n}) for n in range(start, min(start + 1_000, depth))]
            )
        return number / await share([lambda: store.dequeue_rollout(worker_id="w")] * number)


def resident_megabytes() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def size_megabytes(path: Path) -> float:
    """Size of a file."""
    return path.stat().st_size / 2**20


async def million(path: Path, total: int) -> dict[str, float]:
    """Store ``total`` spans; then the growth of memory, and how long reading the 20 of one rollout takes."""
    size = 20
    async with SqliteLightningStore(path) as store:
        warm = await attempts(store, 50)
        for n, owner in enumerate(warm):
            await store.add_many_spans([make_span(*owner, n * size + k) for k in range(size)])
        gc.collect()
        before = resident_megabytes()
        peak = before
        owners: list[tuple[str, str]] = []
        began = time.perf_counter()
        for block in range(total // size // TASKS + 1):
            fresh = await asyncio.gather(*(store.start_rollout({"n": block}) for _ in range(TASKS)))
            ids = [(each.rollout_id, each.attempt.attempt_id) for each in fresh]
            await asyncio.gather(*(store.add_many_spans([make_span(*each, n) for n in range(size)]) for each in ids))
            owners.append(ids[0])
            if block % 50 == 0:
                peak = max(peak, resident_megabytes())
        seconds = time.perf_counter() - began
        gc.collect()
        after = resident_megabytes()
        reads: list[float] = []
        for rollout_id, _ in owners[:: max(1, len(owners) // 500)]:
            start = time.perf_counter()
            page = await store.query_spans(rollout_id)
            reads.append((time.perf_counter() - start) * 1000)
            assert len(page) == size
        stored = (await store.statistics()).get("total_spans", 0)
    return {
        "spans": stored,
        "store_seconds": seconds,
        "memory_growth_mb": after - before,
        "memory_peak_growth_mb": peak - before,
        "database_mb": size_megabytes(path),
        "read_20_spans_ms": statistics.median(reads),
        "read_20_spans_p99_ms": statistics.quantiles(reads, n=100)[98] if len(reads) > 1 else reads[0],
    }


async def wake_up(path: Path) -> dict[str, float]:
    """Wait for 1,000 rollouts: from the acknowledgement of the last finish to the return, and CPU while waiting."""
    async with SqliteLightningStore(path) as store:
        ids = [
            each.rollout_id
            for each in await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=n) for n in range(1_000)])
        ]
        waiting = asyncio.create_task(store.wait_for_rollouts(rollout_ids=ids))
        await asyncio.sleep(0.1)
        cpu = time.process_time()
        await asyncio.sleep(1.0)
        cpu = time.process_time() - cpu
        for rollout_id in ids:
            await store.update_rollout(rollout_id, status="succeeded")
        finished = time.perf_counter()
        await waiting
        return {"wake_ms": (time.perf_counter() - finished) * 1000, "cpu_seconds_per_second": cpu}


async def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """All scenarios, each ``runs`` times on fresh files, interleaved with the floor."""
    results: dict[str, object] = {}
    fresh = (folder / f"{n}.db" for n in range(10**6))

    def wanted(name: str) -> bool:
        return not arguments.only or name in arguments.only

    scenarios: dict[str, Callable[[Path], Awaitable[float]]] = {
        "single_spans_per_s": single_spans,
        "batched_spans_per_s": batched_spans,
        "rollouts_per_s": rollouts,
    }
    rounds: dict[str, list[float]] = {}
    for _ in range(arguments.runs):
        if wanted("floor_rows_per_s"):
            rounds.setdefault("floor_rows_per_s", []).append(floor(next(fresh)))
        for name, scenario in scenarios.items():
            if wanted(name):
                rounds.setdefault(name, []).append(await scenario(next(fresh)))
                clear(folder)
        if wanted("wake_up"):
            for name, value in (await wake_up(next(fresh))).items():
                rounds.setdefault(name, []).append(value)
    if wanted("claims"):
        for _ in range(arguments.runs):
            rounds.setdefault("claims_per_s_at_1000", []).append(await claims(next(fresh), 1_000))
        for _ in range(min(arguments.runs, 3)):
            rounds.setdefault("claims_per_s_deep", []).append(await claims(next(fresh), arguments.million))
            clear(folder)
    for name, values in rounds.items():
        results[name] = {"median": statistics.median(values), "runs": values}
        print(f"{name:28} {statistics.median(values):12,.1f}   ({', '.join(f'{v:,.1f}' for v in values)})", flush=True)
    if wanted("million"):
        results["million"] = found = await million(next(fresh), arguments.million)
        for name, value in found.items():
            print(f"{name:28} {value:12,.2f}", flush=True)
    return results


def clear(folder: Path) -> None:
    """Remove what earlier scenarios left."""
    for file in folder.iterdir():
        file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each scenario; the median counts (default 5)")
    parser.add_argument("--only", nargs="+", default=[], help="only these scenarios")
    parser.add_argument("--million", type=int, default=1_000_000, help="spans stored, and depth of the deep queue")
    parser.add_argument("--folder", type=Path, help="where the databases go (default: a new folder here)")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=arguments.folder or Path.cwd()))
    try:
        size = len(make_span("ro-" + "0" * 32, "at-" + "0" * 32, 1).model_dump_json())
        print(
            f"python {platform.python_version()}, sqlite {apsw.sqlite_lib_version()}, {os.cpu_count()} cores, "
            f"span {size} bytes"
        )
        results = asyncio.run(measure(folder, arguments))
    finally:
        shutil.rmtree(folder)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.exit(main())
