"""The metrics of a client say what its health report says."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from agentlightning.http.client.health import BreakerState, HealthReport, SpoolReport
from agentlightning.http.client.metrics import ClientMetrics


class _Client:
    def __init__(self, health: HealthReport) -> None:
        self.health = health


def _text(spool: SpoolReport | None) -> dict[str, float]:
    report = HealthReport(
        state="degraded",
        breaker=BreakerState.RETURNING,
        breaker_share=0.25,
        score=0.75,
        response_seconds=0.625,
        seconds_since_answer=1.5,
        failures_in_a_row=1,
        last_failure="status 503",
        calls=10,
        failures=3,
        retries=2,
        given_up=1,
        cached_resources_age_seconds=42.0,
        spool=spool,
    )
    registry = CollectorRegistry()
    registry.register(ClientMetrics(_Client(report)))
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_everything_has_its_name() -> None:
    spool = SpoolReport(
        waiting_spans=4, waiting_bytes=4000, spooled=9, delivered=5, refused=1, pushed_back=2, adopted=1
    )
    found = _text(spool)
    assert found['agl_client_state{state="degraded"}'] == 1
    assert sum(value for name, value in found.items() if name.startswith("agl_client_state")) == 1
    assert found['agl_client_breaker{state="returning"}'] == 1
    assert found["agl_client_breaker_share"] == 0.25
    assert found["agl_client_score"] == 0.75
    assert found["agl_client_response_seconds"] == 0.625
    assert found["agl_client_seconds_since_answer"] == 1.5
    assert [found[f"agl_client_{each}_total"] for each in ("calls", "failures", "retries", "given_up")] == [10, 3, 2, 1]
    assert found["agl_client_cached_resources_age_seconds"] == 42
    assert found["agl_client_spool_adopted_total"] == 1
    assert [found[f"agl_client_spool_{each}"] for each in ("spans", "bytes")] == [4, 4000]
    assert [found[f"agl_client_spool_{each}_total"] for each in ("spooled", "delivered", "refused", "pushed_back")] == [
        9,
        5,
        1,
        2,
    ]


def test_a_client_that_never_needed_its_spool_has_the_same_names() -> None:
    assert _text(None).keys() == _text(SpoolReport(0, 0, 0, 0, 0, 0, 0)).keys()
