"""How many function calls of this package the common paths take, counted by ``sys.setprofile``.

    scripts/bench calls [--json FILE] [--functions]

Each path runs a few times first, so that what is done once (imports, connections, caches) is not counted, and is
then counted once. A call is a ``call`` event of a function whose file is in the package: calls of the standard
library and of dependencies are not counted, and each resumption of a suspended coroutine is one more event. The
server, on SQLite with full durability, runs in a thread of the same process, so that both sides are counted:
``enqueue`` and ``dequeue`` are one call of the client, ``span`` goes from the ``end()`` of an OpenTelemetry span to
the store's acknowledgement, and ``fit`` from ``Trainer.fit`` to the first line of the agent: all threads of the main
process, the launcher and the runner, or, with threads, the one process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import agentlightning as agl

PACKAGE = str(Path(agl.__file__).parent)
WARM_UP = 5
ROUNDS = 5


class Calls:
    """Counts calls while it is on. Threads that were started after ``install`` are counted too."""

    def __init__(self) -> None:
        self.on = False
        self.count = Counter[tuple[str, str]]()

    def install(self) -> None:
        threading.setprofile(self._event)
        sys.setprofile(self._event)

    def take(self) -> Counter[tuple[str, str]]:
        counted, self.count = self.count, Counter()
        return counted

    def _event(self, frame: FrameType, event: str, _argument: object) -> None:
        if self.on and event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.count[frame.f_code.co_filename, frame.f_code.co_qualname] += 1


class Cost(NamedTuple):
    """What one path takes."""

    calls: int
    functions: int
    files: int


def summary(counted: Counter[tuple[str, str]]) -> Cost:
    return Cost(counted.total(), len(counted), len({file for file, _ in counted}))


async def counted(calls: Calls, work: Callable[[], Awaitable[Any]]) -> Counter[tuple[str, str]]:
    """The calls of one execution: the smallest of a few, since what runs beside it by a timer is not part of it."""
    for _ in range(WARM_UP):
        await work()
    best: Counter[tuple[str, str]] | None = None
    for _ in range(ROUNDS):
        await asyncio.sleep(0.05)  # what the last one left behind ends
        calls.take()
        calls.on = True
        await work()
        calls.on = False
        taken = calls.take()
        if best is None or taken.total() < best.total():
            best = taken
    assert best is not None
    return best


async def over_http(calls: Calls, folder: Path) -> dict[str, Counter[tuple[str, str]]]:
    store = agl.SqliteLightningStore(folder / "calls.db")
    server = agl.LightningStoreServer(store, "127.0.0.1", 0)
    await server.start()
    client = agl.LightningStoreClient(server.endpoint)
    try:
        found = {}
        found["enqueue"] = await counted(calls, lambda: client.enqueue_rollout({"question": 1}))
        for _ in range(2 * (WARM_UP + ROUNDS)):
            await client.enqueue_rollout({"question": 1})
        claims: list[agl.AttemptedRollout] = []

        async def claim() -> None:
            claimed = await client.dequeue_rollout(worker_id="bench", request_id=f"rq-{len(claims)}")
            assert claimed is not None
            claims.append(claimed)

        found["dequeue"] = await counted(calls, claim)
        found["span"] = await span(calls, client, claims[-1])
        return found
    finally:
        await client.close()
        await server.stop()
        await store.close()


async def span(calls: Calls, client: agl.LightningStoreClient, claim: agl.AttemptedRollout) -> Counter[tuple[str, str]]:
    """From ``end()`` to the acknowledgement: the end of the trace waits for it."""
    from opentelemetry import trace

    tracer = agl.OtelTracer()
    tracer.init()
    tracer.init_worker(0, client)
    best: Counter[tuple[str, str]] | None = None
    for number in range(WARM_UP + ROUNDS):
        async with tracer.trace_context(
            "trace", store=client, rollout_id=claim.rollout_id, attempt_id=claim.attempt.attempt_id
        ):
            open_span = trace.get_tracer("bench").start_span(f"span-{number}")
            open_span.set_attribute("number", number)
            await asyncio.sleep(0.05)
            calls.take()
            calls.on = True
            open_span.end()
        calls.on = False
        taken = calls.take()
        if number >= WARM_UP and (best is None or taken.total() < best.total()):
            best = taken
    tracer.teardown_worker(0)
    tracer.teardown()
    assert best is not None
    return best


# --- From fit to the agent -------------------------------------------------------------------------------

PROCESSES = 14
AT_WORK = 15
shared: Any = multiprocessing.RawArray("q", 16)
"""The calls of each process, in the order in which they were forked, and at ``AT_WORK`` whether the agent runs."""


@agl.rollout
def agent(task: int, llm: agl.LLM) -> float:
    shared[AT_WORK] = 1
    return 1.0


@agl.algo
async def algorithm(*, store: agl.LightningStore, train_dataset: agl.Dataset[int]) -> None:
    await store.add_resources({"llm": agl.LLM(endpoint="http://127.0.0.1:1", model="none")})
    rollout = await store.enqueue_rollout(train_dataset[0])
    await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=30)


def fit(calls: Calls, strategy: str) -> tuple[int, Counter[tuple[str, str]]]:
    """From ``Trainer.fit`` to the agent: in one process (``shm``), or in three (``cs``: main, launcher and runner).

    Returns the calls of all processes, and the functions that the main process called.
    """
    slot = [0]

    def event(frame: FrameType, what: str, _argument: object) -> None:
        if calls.on and what == "call" and not shared[AT_WORK] and frame.f_code.co_filename.startswith(PACKAGE):
            shared[slot[0]] += 1
            calls.count[frame.f_code.co_filename, frame.f_code.co_qualname] += 1

    def next_slot() -> None:
        shared[PROCESSES] += 1
        slot[0] = shared[PROCESSES]

    os.register_at_fork(after_in_child=next_slot)
    threading.setprofile(event)
    sys.setprofile(event)
    for counting in (False, True):
        trainer = agl.Trainer(algorithm=algorithm, n_runners=1, strategy=strategy)
        calls.take()
        for each in range(16):
            shared[each] = 0
        calls.on = counting
        trainer.fit(agent, [1])
        calls.on = False
    return sum(shared[:PROCESSES]), calls.take()


def main() -> None:
    parser = argparse.ArgumentParser(description="How many function calls the common paths take.")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--functions", action="store_true", help="list the functions of each path")
    options = parser.parse_args()
    calls = Calls()
    calls.install()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        found = asyncio.run(over_http(calls, Path(folder)))
    figures = {name: summary(each) for name, each in found.items()}
    for name, strategy in (("fit, threads", "shm"), ("fit", "cs")):
        total, found[name] = fit(calls, strategy)
        figures[name] = summary(found[name])._replace(calls=total)
    sys.setprofile(None)
    for name, counted_calls in found.items():
        path = figures[name]
        print(f"{name:12} {path.calls:5} calls of {path.functions} functions in {path.files} files")
        if options.functions:
            for (file, function), number in counted_calls.most_common():
                print(f"    {number:3} {file.removeprefix(PACKAGE)[1:]}: {function}")
    if options.json:
        options.json.write_text(json.dumps({name: each._asdict() for name, each in figures.items()}) + "\n")


if __name__ == "__main__":
    main()
