"""A missing reward is None. Nothing that people copy from turns it into a number, which would be learned from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MADE_UP = re.compile(r"\w*reward\w*(\([^()]*\))?(\.\w+)?\s+or\s+-?[\d.]")
PLACES = sorted(
    path for pattern in ("src/**/*.py", "examples/**/*.py", "docs/**/*.md", "README.md") for path in ROOT.glob(pattern)
)


def test_no_number_stands_in_for_a_missing_reward() -> None:
    assert len(PLACES) > 200
    found = [
        f"{path.relative_to(ROOT)}: {each[0]}" for path in PLACES for each in MADE_UP.finditer(path.read_text("utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize("line", ["reward or 0.0", "find_final_reward(spans) or 0", "final_reward or -1.0"])
def test_the_search_would_find_one(line: str) -> None:
    assert MADE_UP.search(line)
