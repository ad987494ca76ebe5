"""Curves in bounded memory, and as text."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from agentlightning.trainer.progress import Curve, sparkline

numbers = st.floats(min_value=-1e6, max_value=1e6)


@given(st.lists(numbers, min_size=1, max_size=600))
def test_a_curve_stays_small_and_keeps_the_mean(values: list[float]) -> None:
    curve = Curve(points=8, recent=50)
    for value in values:
        curve.add(value)
    assert curve.count == len(values)
    assert 1 <= len(curve.means) <= 9
    assert min(values) - 1e-3 <= min(curve.means)
    assert max(curve.means) <= max(values) + 1e-3
    recent = values[-50:]
    assert curve.recent_mean == pytest.approx(sum(recent) / len(recent), abs=1e-6)


def test_no_value_ends_a_run_for_its_curve() -> None:
    curve = Curve(points=2)
    for value in (1e308, 1e308, float("inf"), float("-inf"), 1.0):
        curve.add(value)
    assert curve.count == 5
    assert curve.recent_mean is not None
    assert curve.means
    assert sparkline([*curve.means, 1.0, float("nan"), 2.0], 8)


def test_points_are_means_over_equally_many_values() -> None:
    curve = Curve(points=4)
    for value in range(16):
        curve.add(value)
    assert curve.means == [1.5, 5.5, 9.5, 13.5]


def test_an_empty_curve_has_no_mean() -> None:
    assert Curve().recent_mean is None
    assert Curve().means == []


def test_bars_go_from_the_lowest_to_the_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0, 2.0], 8) == "▁▁"
    assert sparkline([], 8) == ""


@given(st.lists(numbers, min_size=1, max_size=200), st.integers(1, 40))
def test_bars_fit_into_the_width(values: list[float], width: int) -> None:
    assert len(sparkline(values, width)) == min(width, len(values))
