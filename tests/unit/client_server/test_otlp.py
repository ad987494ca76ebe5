"""Spans by OTLP: both encodings, whose they are, and the truth about those that are not stored."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from google.protobuf.json_format import MessageToJson
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from agentlightning.errors import InvalidValue, NotJson, TooLarge
from agentlightning.http.server.limits import ServerLimits
from agentlightning.http.server.otlp import encode_refusal
from agentlightning.http.server.otlp_body import PROTOBUF_MEDIA, check_fields
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.types import Span
from asgi_calls import Answer, AsgiCalls

PROTOBUF = {"content-type": "application/x-protobuf"}
OWNER = {"agentlightning.rollout_id": "ro-1", "agentlightning.attempt_id": "at-1"}


@asynccontextmanager
async def _serving() -> AsyncIterator[tuple[InMemoryLightningStore, AsgiCalls]]:
    async with InMemoryLightningStore() as store:
        await store.start_rollout(1, rollout_id="ro-1", attempt_id="at-1")
        yield store, AsgiCalls(store)


def _request(*spans: dict[str, Any], resource: dict[str, str] | None = None) -> ExportTraceServiceRequest:
    """One resource with these spans; ``attributes`` of text, numbers and so on."""
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add(schema_url="https://schema")
    for name, value in (resource or {}).items():
        group.resource.attributes.add(key=name).value.string_value = value
    scope = group.scope_spans.add()
    for number, fields in enumerate(spans, 1):
        span = scope.spans.add(trace_id=bytes(15) + b"\1", span_id=number.to_bytes(8, "big"), name=f"span {number}")
        span.start_time_unix_nano = 1_500_000_000
        for name, value in fields.items():
            target = span.attributes.add(key=name).value
            if isinstance(value, bool):
                target.bool_value = value
            elif isinstance(value, int):
                target.int_value = value
            elif isinstance(value, float):
                target.double_value = value
            elif isinstance(value, list):
                for each in value:
                    target.array_value.values.add().string_value = each
            elif isinstance(value, bytes):
                target.bytes_value = value
            else:
                target.string_value = value
    return request


async def _post(server: AsgiCalls, content: bytes, **headers: str) -> Answer:
    return await server.call(
        "POST", "/v1/traces", content, PROTOBUF | {k.replace("_", "-"): v for k, v in headers.items()}
    )


def _partial(answer: Answer) -> tuple[int, str]:
    assert answer.status == 200, answer
    assert answer.headers[b"content-type"] == b"application/x-protobuf"
    response = ExportTraceServiceResponse.FromString(answer.body)
    return response.partial_success.rejected_spans, response.partial_success.error_message


async def test_everything_of_a_span_arrives() -> None:
    request = _request(
        {"text": "é", "int": 5, "float": 0.5, "flag": True, "list": ["a", "b"], "raw": b"\0\1"}, resource=OWNER
    )
    span = request.resource_spans[0].scope_spans[0].spans[0]
    span.parent_span_id = bytes(7) + b"\7"
    span.trace_state = "vendor=value, other=x"
    span.status.code, span.status.message = Status.STATUS_CODE_ERROR, "broken"
    span.end_time_unix_nano = 2_500_000_000
    event = span.events.add(name="exception", time_unix_nano=2_000_000_000)
    event.attributes.add(key="k").value.string_value = "v"
    link = span.links.add(trace_id=bytes(15) + b"\2", span_id=bytes(7) + b"\3")
    link.attributes.add(key="l").value.int_value = 1
    async with _serving() as (store, server):
        assert _partial(await _post(server, request.SerializeToString())) == (0, "")
        [stored] = await store.query_spans("ro-1", "at-1")
    assert stored == Span.model_validate(
        {
            "rollout_id": "ro-1",
            "attempt_id": "at-1",
            "sequence_id": 1,
            "trace_id": "0" * 31 + "1",
            "span_id": "0" * 15 + "1",
            "parent_id": "0" * 15 + "7",
            "name": "span 1",
            "status": {"status_code": "ERROR", "description": "broken"},
            "attributes": {"text": "é", "int": 5, "float": 0.5, "flag": True, "list": ["a", "b"], "raw": "AAE="},
            "events": [{"name": "exception", "attributes": {"k": "v"}, "timestamp": 2.0}],
            "links": [
                {
                    "context": {
                        "trace_id": "0" * 31 + "2",
                        "span_id": "0" * 15 + "3",
                        "is_remote": False,
                        "trace_state": {},
                    },
                    "attributes": {"l": 1},
                }
            ],
            "start_time": 1.5,
            "end_time": 2.5,
            "context": {
                "trace_id": "0" * 31 + "1",
                "span_id": "0" * 15 + "1",
                "is_remote": False,
                "trace_state": {"vendor": "value", "other": "x"},
            },
            "parent": None,
            "resource": {"attributes": OWNER, "schema_url": "https://schema"},
        }
    )


async def test_json_and_gzip_are_read_as_well() -> None:
    body = {
        "resourceSpans": [
            {
                "resource": {"attributes": [{"key": k, "value": {"stringValue": v}} for k, v in OWNER.items()]},
                "scopeSpans": [
                    {
                        "spans": [
                            {
                                "traceId": "5B8EFFF798038103D269B633813FC60C",
                                "spanId": "eee19b7ec3c1b174",
                                "name": "from json",
                                "kind": 2,
                                "startTimeUnixNano": "1544712660000000000",
                                "unknown": [],
                            }
                        ]
                    }
                ],
            }
        ]
    }
    async with _serving() as (store, server):
        answer = await server.call("POST", "/v1/traces", json.dumps(body).encode())
        assert (answer.status, json.loads(answer.body)) == (200, {})
        packed = gzip.compress(_request({}, resource=OWNER).SerializeToString())
        assert _partial(await _post(server, packed, content_encoding="gzip")) == (0, "")
        assert _partial(await _post(server, b"")) == (0, "")
        spans = await store.query_spans("ro-1")
        assert [(span.name, span.trace_id) for span in spans] == [
            ("from json", "5b8efff798038103d269b633813fc60c"),
            ("span 1", "0" * 31 + "1"),
        ]


async def test_the_span_itself_says_whose_it_is_before_its_resource_does() -> None:
    async with _serving() as (store, server):
        await store.start_rollout(1, rollout_id="ro-2", attempt_id="at-2")
        own = {"agentlightning.rollout_id": "ro-2", "agentlightning.attempt_id": "at-2"}
        request = _request({**own, "agentlightning.span_sequence_id": 7}, {}, resource=OWNER)
        assert _partial(await _post(server, request.SerializeToString())) == (0, "")
        assert [span.sequence_id for span in await store.query_spans("ro-2")] == [7]
        assert [span.sequence_id for span in await store.query_spans("ro-1")] == [1]


async def test_those_that_cannot_be_stored_are_counted_and_named_and_the_others_are_stored() -> None:
    request = _request(
        OWNER,
        {},
        {"agentlightning.rollout_id": "ro-1"},
        {**OWNER, "agentlightning.rollout_id": "ro-unknown"},
        {**OWNER, "agentlightning.span_sequence_id": -1},
        {**OWNER, "agentlightning.reward.0.value": float("nan")},
        OWNER,
    )
    request.resource_spans[0].scope_spans[0].spans[6].span_id = b"short"
    async with _serving() as (store, server):
        rejected, message = _partial(await _post(server, request.SerializeToString()))
        assert rejected == 6
        assert "does not name its attempt" in message
        assert [span.span_id for span in await store.query_spans("ro-1")] == ["0" * 15 + "1"]


_BAD_TEXT = "a\N{REPLACEMENT CHARACTER}b"


async def test_text_that_no_database_stores_is_sanitized_and_marked() -> None:
    request = _request({**OWNER, "bad": "a\0b", "a\0b": ["x", "a\0b"]}, OWNER)
    span = request.resource_spans[0].scope_spans[0].spans[0]
    span.name = "a\0b"
    span.status.message = "a\0b"
    span.events.add(name="a\0b").attributes.add(key="k").value.string_value = "a\0b"
    async with _serving() as (store, server):
        assert _partial(await _post(server, request.SerializeToString())) == (0, "")
        bad, good = await store.query_spans("ro-1")
    assert (bad.name, bad.status.description, bad.attributes["bad"]) == (_BAD_TEXT,) * 3
    assert bad.attributes[_BAD_TEXT] == ["x", _BAD_TEXT]
    assert (bad.events[0].name, bad.events[0].attributes) == (_BAD_TEXT, {"k": _BAD_TEXT})
    assert bad.attributes["agentlightning.mended"] == [
        "attributes." + _BAD_TEXT, "attributes." + _BAD_TEXT, "attributes.bad",
        "description", "events.0.k", "events.0.name", "name",
    ]  # fmt: skip
    assert "agentlightning.mended" not in good.attributes


async def test_what_a_limit_of_its_program_dropped_is_told() -> None:
    request = _request(OWNER, OWNER)
    request.resource_spans[0].scope_spans[0].spans[0].dropped_attributes_count = 3
    async with _serving() as (store, server):
        assert _partial(await _post(server, request.SerializeToString())) == (0, "")
        dropped, whole = await store.query_spans("ro-1")
    assert dropped.attributes["agentlightning.cut"] == ["attributes"]
    assert "agentlightning.cut" not in whole.attributes


async def test_a_span_that_is_not_readable_costs_itself_alone() -> None:
    owner = [{"key": name, "value": {"stringValue": value}} for name, value in OWNER.items()]

    def span(number: int, **fields: Any) -> dict[str, Any]:
        return {"traceId": "1" * 32, "spanId": f"{number:016x}", "name": f"{number}", "attributes": owner, **fields}

    spans = [
        span(1, name="half \ud83d, pair \ud83d\ude00, written \\ud83d, nul \0"),
        span(2, traceId="xyz"),
        span(3, name=5),
        span(4, attributes={"not": "a list"}),
        span(5, startTimeUnixNano=str(2**70)),
        None,
        "no span",
        span(6),
    ]
    groups: list[dict[str, Any]] = [{"scopeSpans": [{"spans": spans}]}]
    groups.append({"resource": {"attributes": {"not": "a list"}}, "scopeSpans": [{"spans": [span(7), span(8)]}]})
    content = json.dumps({"resourceSpans": groups}).encode()
    async with _serving() as (store, server):
        answer = await _post(server, content, content_type="application/json")
        partial = json.loads(answer.body)["partialSuccess"]
        assert (answer.status, partial["rejectedSpans"]) == (200, "8")
        first, last = await store.query_spans("ro-1")
    assert first.name == "half \ufffd, pair \U0001f600, written \\ud83d, nul \ufffd"
    assert first.attributes["agentlightning.mended"] == ["name"]
    assert last.name == "6"


@pytest.mark.parametrize("encoding", ["protobuf", "json"])
async def test_bytes_that_are_no_text_cost_no_other_span(encoding: str) -> None:
    request = _request(OWNER, {**OWNER, "text": "HERE"}, OWNER)
    content, media = request.SerializeToString(), "application/x-protobuf"
    if encoding == "json":
        content, media = MessageToJson(request).encode(), "application/json"
        for span in request.resource_spans[0].scope_spans[0].spans:
            for raw in (span.trace_id, span.span_id):
                content = content.replace(base64.b64encode(raw), raw.hex().encode())
    content = content.replace(b"HERE", b"\xff\xfe!!")
    async with _serving() as (store, server):
        answer = await _post(server, content, content_type=media)
        stored = await store.query_spans("ro-1")
    names = [span.name for span in stored]
    if encoding == "protobuf":
        assert names == ["span 1", "span 3"]
        assert _partial(answer)[0] == 1
    else:
        assert names == ["span 1", "span 2", "span 3"]
        assert stored[1].attributes["text"] == "\N{REPLACEMENT CHARACTER}!!"


async def test_a_resource_that_is_no_text_costs_only_its_own_spans() -> None:
    request = _request(OWNER, resource={"service.name": "HERE"})
    request.MergeFrom(_request(OWNER, OWNER))
    request.resource_spans[1].scope_spans[0].spans[0].span_id = b"\x07" * 8
    async with _serving() as (store, server):
        answer = await _post(server, request.SerializeToString().replace(b"HERE", b"\xff\xfe!!"))
        assert _partial(answer)[0] == 1
        assert (await store.query_spans("ro-1")).total == 2


@pytest.mark.parametrize(
    ("value", "is_stored"),
    [
        ('{"doubleValue": NaN}', True),
        ('{"doubleValue": 1e999}', True),
        ('{"intValue": 9223372036854775808}', False),
        ('{"intValue": ' + "9" * 5000 + "}", False),
        ('{"intValue": 1, "intValue": 2}', False),
        ('{"arrayValue": {"values": [' * 60 + '{"intValue": 1}' + "]}}" * 60, False),
    ],
)
async def test_a_value_that_is_no_strict_json_costs_at_most_its_span(value: str, is_stored: bool) -> None:
    owner = [{"key": name, "value": {"stringValue": value}} for name, value in OWNER.items()]
    spans = [
        {"traceId": "1" * 32, "spanId": f"{number:016x}", "name": f"{number}", "attributes": owner} for number in (1, 2)
    ]
    content = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]})
    place = content.index('"attributes": [') + len('"attributes": [')
    content = f'{content[:place]}{{"key": "v", "value": {value}}}, {content[place:]}'
    async with _serving() as (store, server):
        answer = await _post(server, content.encode(), content_type="application/json")
        assert answer.status == 200, answer
        assert [span.name for span in await store.query_spans("ro-1")] == (["1", "2"] if is_stored else ["2"])


async def test_the_path_may_end_with_a_slash() -> None:
    async with _serving() as (store, server):
        answer = await server.call("POST", "/v1/traces/", _request(OWNER).SerializeToString(), PROTOBUF)
        assert answer.status == 200
        assert (await store.query_spans("ro-1")).total == 1


async def test_another_span_under_a_known_id_is_counted() -> None:
    other = _request(OWNER, OWNER)
    other.resource_spans[0].scope_spans[0].spans[0].name = "another"
    async with _serving() as (store, server):
        await _post(server, _request(OWNER).SerializeToString())
        rejected, message = _partial(await _post(server, other.SerializeToString()))
        assert rejected == 1
        assert "with other content" in message
        assert [span.name for span in await store.query_spans("ro-1")] == ["span 1", "span 2"]


async def test_repeated_spans_are_stored_once_and_not_rejected() -> None:
    content = _request({}, {}, resource=OWNER).SerializeToString()
    async with _serving() as (store, server):
        for _ in range(2):
            assert _partial(await _post(server, content)) == (0, "")
        assert (await store.query_spans("ro-1")).total == 2


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"\xff\xff", {}),
        (b"{}", {"content-type": "application/xml"}),
        (b"[]", {"content-type": "application/json"}),
        (b'{"resourceSpans": 5}', {"content-type": "application/json"}),
        (b'{"resourceSpans": [{"scopeSpans": [{"spans": 5}]}]}', {"content-type": "application/json"}),
        (b'{"resourceSpans": [5]}', {"content-type": "application/json"}),
        (b"x", {"content-encoding": "br"}),
        (b"x", {"content-encoding": "gzip"}),
    ],
)
async def test_what_is_no_request_is_refused_for_good(content: bytes, headers: dict[str, str]) -> None:
    async with _serving() as (_, server):
        answer = await server.call("POST", "/v1/traces", content, PROTOBUF | headers)
        assert answer.status in (400, 415)
        assert b"retry-after" not in answer.headers


async def test_a_store_that_cannot_take_it_now_asks_for_it_again() -> None:
    async with _serving() as (store, server):
        await store.close()
        answer = await _post(server, _request({}, resource=OWNER).SerializeToString())
        assert (answer.status, answer.headers[b"retry-after"]) == (503, b"1")
        assert answer.body.startswith(b"\x08\x0e\x12")  # google.rpc.Status with code 14, UNAVAILABLE


@pytest.mark.parametrize("path", ["/v1/metrics", "/v1/logs"])
async def test_other_signals_are_refused_so_that_exporters_drop_them(path: str) -> None:
    async with _serving() as (_, server):
        answer = await server.call("POST", path, b"", PROTOBUF)
        assert (answer.status, answer.headers[b"content-type"]) == (501, b"application/problem+json")
        assert "/v1/traces" in json.loads(answer.body)["detail"]


async def test_what_is_unpacked_counts_as_work_in_progress() -> None:
    packed = gzip.compress(_request({"a": "x" * 100_000}, resource=OWNER).SerializeToString())
    async with InMemoryLightningStore() as store:
        await store.start_rollout(1, rollout_id="ro-1", attempt_id="at-1")
        small = AsgiCalls(store, limits=ServerLimits(in_flight_bytes=50_000))
        answer = await _post(small, packed, content_encoding="gzip")
        assert (answer.status, answer.headers[b"retry-after"]) == (429, b"1")
        assert (small.load.requests, small.load.bytes) == (0, 0)
        enough = AsgiCalls(store, limits=ServerLimits(in_flight_bytes=500_000))
        assert _partial(await _post(enough, packed, content_encoding="gzip")) == (0, "")
        assert (enough.load.requests, enough.load.bytes) == (0, 0)


async def test_more_than_is_ever_taken_is_refused_for_good() -> None:
    async with _serving() as (_, server):
        answer = await _post(server, b"", content_length="99999999999")
        assert answer.status == 413
        assert b"retry-after" not in answer.headers


async def test_a_client_that_leaves_in_the_middle_is_no_failure_of_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/traces HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\nhalf")
        await writer.drain()
        assert server.app is not None
        while not server.app.load.requests:
            await asyncio.sleep(0.01)
        writer.close()
        while server.app.load.requests:
            await asyncio.sleep(0.01)
        await server.stop()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# --- Little that stands for much ---------------------------------------------------------------------


def _within(field: int, content: bytes) -> bytes:
    """A message as a field of another."""
    size, length = len(content), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([field << 3 | 2, *length, size]) + content


_EMPTY_GROUPS = b"\x0a\x00" * 2_000_000
_EMPTY_SPANS = _within(1, _within(2, b"\x12\x00" * 2_000_000))
_EMPTY_ATTRIBUTES = _within(1, _within(2, _within(2, b"\x4a\x00" * 2_000_000)))
_MANY_SPANS = _within(1, _within(2, b"\x12\x00" * 10_001))


@pytest.mark.parametrize("content", [_EMPTY_GROUPS, _EMPTY_SPANS, _EMPTY_ATTRIBUTES, _MANY_SPANS])
async def test_a_small_body_that_stands_for_very_many_objects_is_not_read(content: bytes) -> None:
    """Two bytes on the wire are hundreds in memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with _serving() as (_, server):
        answer = await _post(server, gzip.compress(content, 1), content_encoding="gzip")
        assert answer.status == 413, answer
        assert b"retry-after" not in answer.headers
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


@pytest.mark.parametrize("end", [b"\x0a", b"\x0a\x05", b"\x0f", b"\x08" + b"\xff" * 11, b"\x09"])
async def test_a_body_whose_fields_are_not_whole_is_found_out_before_it_is_read(end: bytes) -> None:
    whole = b"\x10" + b"\x80" * 9 + b"\x01"  # a field of eleven bytes
    check_fields(whole * 9, ExportTraceServiceRequest.DESCRIPTOR, 10)
    with pytest.raises(NotJson):
        check_fields(whole * 9 + end, ExportTraceServiceRequest.DESCRIPTOR, 10)


def test_fields_are_counted_at_every_depth() -> None:
    request = _request({"a": "x", "b": ["y", "z"], "c": 1, "d": 2.5}, {"e": True}, resource=OWNER)
    content = request.SerializeToString()
    most = _count_fields(request)
    check_fields(content, request.DESCRIPTOR, most)
    with pytest.raises(TooLarge):
        check_fields(content, request.DESCRIPTOR, most - 1)


def _count_fields(message: Any) -> int:
    count = 0
    for field, value in message.ListFields():
        for each in value if field.is_repeated else [value]:
            count += 1 + (_count_fields(each) if field.message_type else 0)
    return count


def test_a_long_refusal_is_cut_between_characters() -> None:
    refusal = encode_refusal(PROTOBUF_MEDIA, InvalidValue("x" + "é" * 2000))
    assert refusal.partition(b"x")[2].decode() == "é" * 999
