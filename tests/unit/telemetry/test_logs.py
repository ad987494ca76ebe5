"""Log lines: for people or as JSON, on the console or in files, with the ids of the work they belong to."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentlightning.errors import InvalidValue
from agentlightning.http.server import app
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.telemetry.logs import CURRENT, WorkContext, setup_logging
from asgi_calls import AsgiCalls

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("agentlightning", "uvicorn")]
    before = [(logger, logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, propagate, handlers in before:
        for handler in logger.handlers:
            if handler not in handlers:
                handler.close()
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_files_have_one_object_in_each_line(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "log.json"
    setup_logging("info", console=False, files=file)
    log = logging.getLogger("agentlightning.somewhere")
    log.debug("not shown")
    log.info("said é %d", 5, extra={"port": 4747})
    try:
        raise ZeroDivisionError("why")
    except ZeroDivisionError:
        log.exception("failed")
    said, failed = _lines(file)
    assert said["event"] == "said é 5"
    assert (said["level"], said["logger"], said["port"]) == ("info", "agentlightning.somewhere", 4747)
    assert str(said["timestamp"]).endswith("Z")
    assert "ZeroDivisionError" in json.dumps(failed["exception"])


@pytest.mark.parametrize("format", ["json", "console"])
def test_tracebacks_do_not_show_local_variables(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(key: str) -> None:
        raise ZeroDivisionError("why")

    setup_logging("info", format=format)  # type: ignore[arg-type]
    try:
        fail("-".join(("sk", "secret")))
    except ZeroDivisionError:
        logging.getLogger("agentlightning.somewhere").exception("failed")
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said
    assert "test_logs.py" in said
    assert "sk-secret" not in said


def test_lines_for_people_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("WARNING", format="console")
    logging.getLogger("agentlightning").info("not shown")
    logging.getLogger("agentlightning").warning("mind this", extra={"worker_id": "w-1"})
    said = capsys.readouterr()
    assert "mind this" in said.err
    assert "worker_id=w-1" in said.err
    assert "not shown" not in said.err
    assert said.out == ""


def test_a_second_call_replaces_the_first(tmp_path: Path) -> None:
    own = logging.NullHandler()
    logging.getLogger("agentlightning").addHandler(own)
    for name in ("one", "two"):
        setup_logging(console=False, files=[tmp_path / name])
    logging.getLogger("agentlightning").info("x")
    assert (tmp_path / "one").read_text() == ""
    assert len(_lines(tmp_path / "two")) == 1
    assert own in logging.getLogger("agentlightning").handlers


@pytest.mark.parametrize(("level", "format"), [("LOUD", None), ("", None), ("INFO", "xml")])
def test_what_is_no_level_or_format(level: str, format: str | None) -> None:
    with pytest.raises(InvalidValue, match="not one of"):
        setup_logging(level, format=format)  # type: ignore[arg-type]


@pytest.mark.parametrize("limits", [{"max_file_bytes": 0}, {"max_file_age_seconds": 0.0}, {"kept_files": -1}])
def test_what_is_no_limit_of_files(limits: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="not possible"):
        setup_logging(console=False, files=tmp_path / "log", **limits)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="cannot write"):
        setup_logging(console=False, files=tmp_path)


def test_a_file_that_cannot_be_written_leaves_all_as_it_was(tmp_path: Path) -> None:
    setup_logging(console=False, files=tmp_path / "before")
    handlers = list(logging.getLogger("agentlightning").handlers)
    with pytest.raises(InvalidValue, match="cannot write") as caught:  # it holds the frames, and what is open in them
        setup_logging(console=False, files=[tmp_path / "first", tmp_path])
    assert str(tmp_path / "first") not in {file.path for file in psutil.Process().open_files()}, caught
    assert logging.getLogger("agentlightning").handlers == handlers
    logging.getLogger("agentlightning").info("x")
    assert len(_lines(tmp_path / "before")) == 1


def test_lines_carry_the_ids_of_their_work(tmp_path: Path) -> None:
    setup_logging(console=False, files=tmp_path / "log")
    token = CURRENT.set(WorkContext("rq-1", TRACEPARENT, {"rollout_id": "ro-1", "attempt_id": "at-1"}))
    logging.getLogger("agentlightning").info("inside")
    CURRENT.reset(token)
    logging.getLogger("agentlightning").info("outside")
    inside, outside = _lines(tmp_path / "log")
    assert (
        inside.items()
        >= {
            "request_id": "rq-1",
            "trace_id": "0af7651916cd43dd8448eb211c80319c",
            "parent_span_id": "b7ad6b7169203331",
            "rollout_id": "ro-1",
            "attempt_id": "at-1",
        }.items()
    )
    assert "request_id" not in outside


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "00-xyz-1-01",
        TRACEPARENT[:-1],
        "ff" + TRACEPARENT[2:],
        TRACEPARENT + "-more",
        f"00-{'0' * 32}-{'1' * 16}-01",
        f"00-{'1' * 32}-{'0' * 16}-01",
    ],
)
def test_what_is_no_traceparent_is_left_out(traceparent: str) -> None:
    assert WorkContext("rq-1", traceparent).fields() == {"request_id": "rq-1"}


def test_a_traceparent_of_a_later_version_is_understood() -> None:
    fields = WorkContext(None, "01" + TRACEPARENT[2:] + "-more").fields()
    assert fields == {"trace_id": "0af7651916cd43dd8448eb211c80319c", "parent_span_id": "b7ad6b7169203331"}


async def test_a_path_cannot_forge_lines(tmp_path: Path) -> None:
    setup_logging("debug", console=False, files=tmp_path / "log", format="console")
    async with InMemoryLightningStore() as store:
        await AsgiCalls(store).call("GET", "/agl/v1/%0aforged%1b[31m")
    assert not any(line.startswith("forged") for line in (tmp_path / "log").read_text().splitlines())
    assert "\x1b[31m" not in (tmp_path / "log").read_text()


async def test_slow_requests_are_logged_and_those_that_wait_are_not_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_SLOW_SECONDS", 0.0)
    setup_logging("info", console=False, files=tmp_path / "log")
    async with InMemoryLightningStore() as store:
        server = AsgiCalls(store)
        body = b'{"worker_id": "w", "wait_seconds": 0.001}'
        await server.call("POST", "/agl/v1/queues/rollouts/dequeue", body)
        await server.call("GET", "/agl/v1/statistics")
    assert [line["event"] for line in _lines(tmp_path / "log")] == ["GET /agl/v1/statistics → 200"]


async def test_the_same_for_those_that_go_past_asgi_and_a_stop_that_sends_them_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_SLOW_SECONDS", 0.0)
    setup_logging("info", console=False, files=tmp_path / "log")
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0) as server:
        claim = b'{"worker_id": "w", "wait_seconds": 60.0}'
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for path, body in ((b"enqueue", b'{"rollouts": []}'), (b"dequeue", claim)):
            head = b"POST /agl/v1/queues/rollouts/%b HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
            writer.write(head % (path, len(body)) + body)
        assert (await reader.readline()).startswith(b"HTTP/1.1 201")
        while await store.get_worker_by_id("w") is None:
            await asyncio.sleep(0.01)
        await server.stop()
        assert b"HTTP/1.1 503" in await reader.read()
        writer.close()
    requests = [line["event"] for line in _lines(tmp_path / "log") if "POST" in line["event"]]
    assert requests == ["POST /agl/v1/queues/rollouts/enqueue → 201"]


async def test_requests_are_logged_with_their_id_and_trace(tmp_path: Path) -> None:
    setup_logging("debug", console=False, files=tmp_path / "log")
    async with InMemoryLightningStore() as store:
        server = AsgiCalls(store)
        headers = {"traceparent": TRACEPARENT, "x-request-id": "mine-1"}
        answer = await server.call("GET", "/agl/v1/rollouts/ro-1/attempts", headers=headers)
        assert answer.headers[b"x-request-id"] == b"mine-1"
        other = await server.call("GET", "/agl/v1/statistics", headers={"x-request-id": "bad\r\nid"})
        assert other.headers[b"x-request-id"] != b"bad\r\nid"
    first = _lines(tmp_path / "log")[0]
    assert first["event"] == "GET /agl/v1/rollouts/ro-1/attempts → 200"
    assert (
        first.items()
        >= {
            "request_id": "mine-1",
            "rollout_id": "ro-1",
            "status": 200,
            "trace_id": "0af7651916cd43dd8448eb211c80319c",
        }.items()
    )
    assert "milliseconds" in first
