"""From what a user types to the store that is meant."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest

from agentlightning.cli.target import Database, Purpose, Server, locate
from agentlightning.errors import InvalidValue, StoreOwned, StoreUnavailable
from agentlightning.store.sqlite.store import ReadOnlySqliteStore, SqliteLightningStore

NAMES = ("AGL_SERVER_HOST", "AGL_SERVER_PORT", "AGL_API_KEY")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        (None, Server("http://127.0.0.1:4747", None)),
        ("http://host:4747", Server("http://host:4747", None)),
        ("https://host/", Server("https://host", None)),
        ("HTTP://host:1/behind/a/proxy/", Server("http://host:1/behind/a/proxy", None)),
        ("http://host:4747/v1/agl", Server("http://host:4747", None)),
        ("http://[::1]:4747", Server("http://[::1]:4747", None)),
        ("http://agl:k%2Fey@host:4747", Server("http://host:4747", "k/ey")),
        ("store.db", Database(Path("store.db"))),
        ("/data/store.db", Database(Path("/data/store.db"))),
        ("./a:b", Database(Path("./a:b"))),
    ],
)
def test_a_url_is_a_server_and_anything_else_a_file(url: str | None, found: object) -> None:
    assert locate(url) == found


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({"AGL_SERVER_HOST": "gpu-1"}, "http://gpu-1:4747"),
        ({"AGL_SERVER_PORT": "5000"}, "http://127.0.0.1:5000"),
        ({"AGL_SERVER_HOST": "0.0.0.0", "AGL_SERVER_PORT": "5000"}, "http://127.0.0.1:5000"),
    ],
)
def test_without_a_url_the_environment_says_where(
    environment: Mapping[str, str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert locate(None) == Server(url, None)


def test_the_key_given_goes_before_the_url_and_that_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_API_KEY", "from-environment")
    assert locate("http://agl:from-url@host", "given") == Server("http://host", "given")
    assert locate("http://agl:from-url@host") == Server("http://host", "from-url")
    of_environment = locate("http://host")
    assert isinstance(of_environment, Server)
    assert of_environment.credentials.api_key == "from-environment"


def test_a_key_in_the_url_is_never_shown() -> None:
    assert "secret" not in str(locate("http://agl:secret@host:4747"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:4747", "write http://localhost:4747"),
        ("gpu-1.lan:4747/", "write http://gpu-1.lan:4747/"),
        ("postgres://host/db", "neither a server"),
        ("http://", "give one like http://host:4747"),
        ("http://host:many", "give one like http://host:4747"),
        ("http://host:99999", "give one like http://host:4747"),
    ],
)
def test_what_is_neither_is_refused_with_what_to_write(url: str, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        locate(url)


def test_a_file_that_looks_like_host_and_port_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "localhost:4747").touch()
    assert locate("localhost:4747") == Database(Path("localhost:4747"))


# --- Files -------------------------------------------------------------------------------------------


async def test_no_file_is_made_by_looking(tmp_path: Path) -> None:
    (tmp_path / "other.db").touch()
    for purpose in get_args(Purpose):
        with pytest.raises(InvalidValue, match=r"no database .*; there are other\.db"):
            async with locate(str(tmp_path / "store.db")).open(purpose):
                pass
    with pytest.raises(InvalidValue, match="is a folder"):
        async with locate(str(tmp_path)).open("look"):
            pass
    assert [each.name for each in tmp_path.iterdir()] == ["other.db"]


async def test_looking_takes_nothing_from_anybody(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with SqliteLightningStore(path) as owner:
        rollout = await owner.enqueue_rollout("task")
        async with locate(str(path)).open("look") as store:
            assert isinstance(store, ReadOnlySqliteStore)
            assert await store.get_rollout_by_id(rollout.rollout_id) == rollout
            with pytest.raises(StoreUnavailable, match="reading only"):
                await store.cancel_rollout(rollout.rollout_id)
        with pytest.raises(StoreOwned):
            async with locate(str(path)).open():
                pass
        await owner.cancel_rollout(rollout.rollout_id)
    async with locate(str(path)).open() as store:
        await store.enqueue_rollout("another")
        assert (await store.statistics())["total_rollouts"] == 2


async def test_a_store_is_closed_whatever_happens(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with SqliteLightningStore(path) as owner:
        await owner.enqueue_rollout("task")
    with pytest.raises(asyncio.CancelledError):
        async with locate(str(path)).open():
            raise asyncio.CancelledError
    async with locate(str(path)).open() as store:
        assert await store.verify()
