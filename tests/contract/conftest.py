"""Which stores the contract is tried on: one fixture for each kind, and its name in ``KINDS``."""

from __future__ import annotations

from pathlib import Path

import pytest

from stores import MemoryStores, SqliteStores, Stores

KINDS = ("memory", "sqlite")


@pytest.fixture(params=KINDS)
def stores(request: pytest.FixtureRequest) -> Stores:
    """Makes empty stores of the kind that this run of the test is about."""
    return request.getfixturevalue(f"{request.param}_stores")


@pytest.fixture
def memory_stores() -> Stores:
    return MemoryStores()


@pytest.fixture
def sqlite_stores(tmp_path: Path) -> Stores:
    return SqliteStores(tmp_path)
