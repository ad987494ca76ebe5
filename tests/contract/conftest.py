"""Which stores the contract is tried on: one fixture for each kind, and its name in ``KINDS``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import store_service
from fresh_process import FreshProcess
from stores import HttpStores, MemoryStores, ProcessStores, SqliteStores, Stores

KINDS = (
    "memory",
    "sqlite",
    "http",
    pytest.param("http_0_3", marks=pytest.mark.slow),
    pytest.param("process", marks=pytest.mark.slow),
    pytest.param("process_0_3", marks=pytest.mark.slow),
)
REMOTE = ("http", "http_0_3", "process", "process_0_3")

_ON_ITS_WAY = "a reply that is on its way to a caller who has left is a lost reply: see test_claims, and tests/fault"
_NOT_SENT = "what was not sent yet when its caller, or the caller's loop, ended is not done"
ONLY_IN_PROCESS = {
    "test_a_waiter_that_is_cancelled_passes_its_call_on": _ON_ITS_WAY,
    "test_one_that_was_called_and_may_not_take_it_passes_the_call_on": _ON_ITS_WAY,
    "test_the_operation_of_a_cancelled_caller_still_commits": _NOT_SENT,
    "test_a_loop_that_is_closed_leaves_the_store_in_order": _NOT_SENT,
    "test_waiting_on_a_loop_that_is_closed_harms_nobody": _NOT_SENT,
    "test_a_thousand_are_known_within_20_ms_of_the_last_end": "a time that holds without a network in between",
}
"""Tests about callers and store in one process, and why they say nothing of a store behind a network."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that are only about stores in the process, where the store is not."""
    left_out = [item for item in items if _is_left_out(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not _is_left_out(item)]


def _is_left_out(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function) or item.originalname not in ONLY_IN_PROCESS:
        return False
    parameters = getattr(item, "callspec", None)
    return parameters is not None and parameters.params.get("stores") in REMOTE


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


@pytest.fixture(scope="session")
def store_process() -> Iterator[FreshProcess]:
    """A process that serves stores, for all tests that want one."""
    with FreshProcess(store_service.main) as service:
        yield service


@pytest.fixture
def process_stores(tmp_path: Path, store_process: FreshProcess) -> Stores:
    return ProcessStores(tmp_path, store_process, "/agl/v1")


@pytest.fixture
def process_0_3_stores(tmp_path: Path, store_process: FreshProcess) -> Stores:
    return ProcessStores(tmp_path, store_process, "/v1/agl")
