from __future__ import annotations

from agentlightning.types.contract import VerificationReport, Violation


def test_a_report_is_ok_when_no_rule_is_broken() -> None:
    broken = Violation(rule="attempts_numbered", record="rollout ro-1", detail="found 2, expected 1")
    assert VerificationReport(checked={"rollout": 1}, violations=[]).ok
    assert not VerificationReport(checked={"rollout": 1}, violations=[broken]).ok
