"""Which stores the contract is tried on: one fixture for each kind, and its name in ``KINDS``."""

from __future__ import annotations

from pathlib import Path

import pytest

from stores import HttpStores, MemoryStores, SqliteStores, Stores

KINDS = ("memory", "sqlite", "http", "http_0_3")


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


@pytest.fixture
def http_stores() -> Stores:
    return HttpStores(MemoryStores(), "/agl/v1")


@pytest.fixture
def http_0_3_stores(tmp_path: Path) -> Stores:
    """Under the prefix that clients of agentlightning 0.3 use."""
    return HttpStores(SqliteStores(tmp_path), "/v1/agl")
