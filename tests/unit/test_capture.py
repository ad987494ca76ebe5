"""docs/capture.md says what the tests have seen."""

from __future__ import annotations

import pytest

import capture_table
from capture_table import PAGE, with_tables


def test_the_tables_are_what_was_seen() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run: python tests/support/capture_table.py"


def test_another_table_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    page = PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(capture_table, "TABLES", {"instrumentations": lambda: "| other |"})
    assert page != with_tables(page)
