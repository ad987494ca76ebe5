"""Spans that waited on the disk: which of them are given up, and whose are still awaited."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from agentlightning.errors import AgentLightningError, NotFound, StoreUnreachable
from agentlightning.http.client.calls import Caller
from agentlightning.http.client.span_delivery import SpanDelivery
from agentlightning.http.client.spool import SpoolFolder
from agentlightning.http.client.transport import WireReply, WireRequest
from agentlightning.http.codec import encode_problem
from agentlightning.store.arguments import encode_spans
from agentlightning.store.sources import TimeOrderedIds
from agentlightning.types import Span
from spooling_process import numbered

Fault = Callable[[list[int]], str]
"""What happens to a request with the spans of these numbers: ``ok``, ``away``, ``gone`` or ``fails``."""


class _Server:
    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self.requests: list[list[int]] = []
        self.stored: list[int] = []

    async def send(self, request: WireRequest) -> WireReply:
        assert request.body is not None
        numbers = [span["attributes"]["n"] for span in json.loads(request.body)["spans"]]
        self.requests.append(numbers)
        happens = self._fault(numbers)
        if happens == "away":
            raise StoreUnreachable("away")
        if happens == "fails":
            return WireReply(500, {}, encode_problem(AgentLightningError("it failed"), "r-1"))
        if happens == "gone":
            return WireReply(404, {}, encode_problem(NotFound("there is no such attempt"), "r-1"))
        self.stored += numbers
        return WireReply(201, {}, json.dumps({"sequence_ids": numbers}).encode())


class _Scene:
    def __init__(self, folder: Path, fault: Fault) -> None:
        self.server = _Server(fault)
        self.folder = SpoolFolder(folder, max_bytes=10_000_000)
        self.caller = Caller(self.server, "", TimeOrderedIds(), timeout_seconds=1.0, patience_seconds=60.0)
        self.delivery = SpanDelivery(self.caller, self.folder, spool_after_seconds=0.0)

    async def add(self, *spans: Span) -> None:
        assert await self.delivery.add(encode_spans(spans), spans) == [None] * len(spans), "they wait"

    async def counts(self) -> tuple[int, int]:
        """How many spans were delivered and refused in the end."""
        await self.delivery.close(grace_seconds=60.0)
        report = self.delivery.report()
        assert report is not None
        return report.delivered, report.refused


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentlightning.http.client.span_delivery._PAUSES", (0.001,))


@pytest.mark.parametrize(
    ("happens", "delivered"),
    [
        (["away"] * 6 + ["fails"], True),
        (["away", "fails", "away", "away", "fails", "away"], True),
        (["away", "fails", "away", "fails", "fails"], False),
    ],
    ids=["an outage", "failures between", "it fails each time"],
)
async def test_rounds_in_which_the_server_is_away_say_nothing_of_a_span(
    happens: list[str], delivered: bool, tmp_path: Path
) -> None:
    script = iter(happens)
    scene = _Scene(tmp_path, lambda numbers: next(script, "ok"))
    await scene.add(numbered("ro-1", "at-1", 0))
    assert await scene.counts() == (int(delivered), int(not delivered))
    assert scene.folder.quarantine_file.exists() is not delivered


async def test_spans_that_make_the_server_fail_each_time_do_not_hold_up_the_others(tmp_path: Path) -> None:
    away = iter(["away"])
    poison = {1, 3, 4, 6, 7}
    scene = _Scene(tmp_path, lambda numbers: next(away, "fails" if poison & set(numbers) else "ok"))
    await scene.add(*(numbered("ro-1", "at-1", number) for number in range(10)))
    assert await scene.counts() == (5, 5)
    assert list(dict.fromkeys(scene.server.stored)) == [0, 2, 5, 8, 9]
    assert scene.server.requests.count(list(range(10))) == 2, "when they were added, and in the one round it took"


async def test_spans_of_an_unknown_attempt_are_refused_together(tmp_path: Path) -> None:
    away = iter(["away"])
    gone = set(range(300))
    scene = _Scene(tmp_path, lambda numbers: next(away, "gone" if gone & set(numbers) else "ok"))
    await scene.add(*(numbered("ro-1", "at-gone", number) for number in range(300)))
    await scene.add(*(numbered("ro-1", "at-1", number) for number in range(300, 400)))
    assert await scene.counts() == (100, 300)
    assert scene.server.stored == list(range(300, 400))
    assert len(scene.server.requests) < 20
    assert len(scene.folder.quarantine_file.read_text().splitlines()) == 300


async def test_a_quarantine_file_that_cannot_be_written_holds_up_nothing(tmp_path: Path) -> None:
    away = iter(["away"])
    scene = _Scene(tmp_path, lambda numbers: next(away, "gone" if 0 in numbers else "ok"))
    scene.folder.quarantine_file.mkdir()
    await scene.add(numbered("ro-1", "at-gone", 0), numbered("ro-1", "at-1", 1))
    assert await scene.counts() == (1, 1)
    report = scene.delivery.report()
    assert report is not None
    assert report.discarded == 1


@pytest.mark.parametrize("again", [[], ["fails"], ["away", "fails"]])
async def test_a_failure_that_passes_keeps_the_order(again: list[str], tmp_path: Path) -> None:
    script = iter(["away", "fails", "fails", *again])  # all three, then the first alone
    scene = _Scene(tmp_path, lambda numbers: next(script, "ok"))
    await scene.add(*(numbered("ro-1", "at-1", number) for number in range(3)))
    assert await scene.counts() == (3, 0)
    assert scene.server.stored == [0, 1, 2]


async def test_only_attempts_with_waiting_spans_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentlightning.http.client.span_delivery._SPOOLED_SPANS", 1)
    taken = [0]
    away = iter(["away"])
    scene = _Scene(tmp_path, lambda numbers: next(away, "ok" if numbers == taken else "away"))
    await scene.add(*(numbered("ro-1", f"at-{number}", number) for number in range(2)), numbered("ro-2", "at-2", 2))
    delivery = scene.delivery
    await delivery.settle("ro-1", "at-0")
    assert delivery._by_attempt == {("ro-1", "at-1"): 1, ("ro-1", None): 1, ("ro-2", "at-2"): 1, ("ro-2", None): 1}
    scene.caller.patience_seconds = 0.0
    for rollout_id, attempt_id in (("ro-1", None), ("ro-1", "at-1"), ("ro-2", "at-2")):
        with pytest.raises(StoreUnreachable, match=f"1 spans of rollout {rollout_id}"):
            await delivery.settle(rollout_id, attempt_id)
    await delivery.settle("ro-2", "at-1")
    taken[0] = 1
    scene.caller.patience_seconds = 60.0
    await delivery.settle("ro-1", None)
    taken[0] = 2
    assert await scene.counts() == (3, 0)
