"""Wrong API keys are told of in few lines, answered slowly where they are many, and lock nobody out."""

from __future__ import annotations

import asyncio
import logging

import pytest

from agentlightning.errors import NotAuthenticated
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.security import wrong_keys
from agentlightning.security.wrong_keys import WrongKeys
from agentlightning.store.sqlite.store import InMemoryLightningStore

KEY = "the-right-key"


def test_many_within_a_minute_are_guesses_and_each_address_has_its_own_count() -> None:
    keys = WrongKeys()
    assert [keys.note("a", 0.0) for _ in range(12)] == [False] * 10 + [True] * 2
    assert not keys.note("b", 0.0)
    assert keys.note("a", 59.0)
    assert not keys.note("a", 60.0)


def test_the_log_has_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    keys = WrongKeys()
    with caplog.at_level(logging.WARNING):
        for _ in range(1500):
            keys.note("10.0.0.7", 5.0)
    assert [record.getMessage().split(" ")[0] for record in caplog.records] == ["1", "10", "100", "1000"]
    assert "10.0.0.7" in caplog.text


def test_its_memory_is_bounded() -> None:
    keys = WrongKeys()
    for number in range(5000):
        keys.note(f"address-{number}", 0.0)
        keys.note("busy", 0.0)
    assert len(keys._counts) == wrong_keys._ADDRESSES
    assert keys.note("busy", 0.0)


async def _status(port: int, key: str, *headers: str) -> tuple[int, bool]:
    """Status of the reply, and whether the server closes the connection after it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = ["GET /agl/v1/statistics HTTP/1.1", "host: 127.0.0.1", f"authorization: Bearer {key}", *headers, "", ""]
    writer.write("\r\n".join(lines).encode())
    head = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    return int(head.split(b" ")[1]), b"connection: close" in head.lower()


async def test_a_server_slows_down_guesses_and_not_the_right_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ``X-Forwarded-For`` says."""
    monkeypatch.setattr("agentlightning.http.server.app._GUESS_SECONDS", 0.05)
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0, api_key=KEY) as server:
        said = [await _status(server.port, f"guess-{n:04}", f"x-forwarded-for: 10.0.0.{n}") for n in range(14)]
        assert said == [(401, False)] * 10 + [(401, True)] * 4
        assert await _status(server.port, KEY) == (200, False)
        async with LightningStoreClient(server.endpoint, api_key=KEY, spool_dir=None) as client:
            await client.enqueue_rollout("work")
        async with LightningStoreClient(server.endpoint, api_key="another-key", spool_dir=None) as client:
            with pytest.raises(NotAuthenticated):
                await client.enqueue_rollout("work")
