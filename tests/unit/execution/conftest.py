"""What the tests of execution share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runners and algorithms in other processes leave their notes."""
    monkeypatch.setenv("AGL_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("AGL_SPOOL_DIR", str(tmp_path / "spool"))
    return tmp_path
