"""What is emitted is in the trace, says what was meant, and can be read again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
from pydantic import BaseModel

import agentlightning as agl
from agentlightning.types import Span


@pytest.fixture
def tracer() -> Iterator[agl.OtelTracer]:
    tracer = agl.OtelTracer()
    with tracer.lifespan():
        yield tracer


def traced(tracer: agl.OtelTracer, function: Any) -> list[Span]:
    tracer.trace_run(function)
    return tracer.get_last_trace()


# --- Rewards ---------------------------------------------------------------------------------------


class ArrayOfNoDimensions:
    """As numpy, torch and jax make them; also numpy's bool has these two."""

    shape = ()

    def __init__(self, value: Any) -> None:
        self._value = value

    def item(self) -> Any:
        return self._value


@pytest.mark.parametrize("value", [1, 1.0, True, Fraction(1), ArrayOfNoDimensions(1.0), ArrayOfNoDimensions(True)])
def test_a_reward_of_any_kind_of_number(tracer: agl.OtelTracer, value: Any) -> None:
    (span,) = traced(tracer, lambda: agl.emit_reward(value))
    assert span.name == agl.AGL_ANNOTATION
    assert span.attributes == {"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": 1.0}
    assert agl.get_reward_value(span) == 1.0


def test_a_reward_of_several_dimensions(tracer: agl.OtelTracer) -> None:
    reward = {"speed": 2, "accuracy": 0.5}
    (span,) = traced(tracer, lambda: agl.emit_reward(reward, primary_key="accuracy", attributes={"note": {"by": "me"}}))
    assert [(each.name, each.value) for each in agl.get_rewards_from_span(span)] == [("accuracy", 0.5), ("speed", 2.0)]
    assert span.attributes["note.by"] == "me"
    assert agl.find_final_reward([span]) == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, ArrayOfNoDimensions(math.nan)])
def test_a_reward_must_be_finite(tracer: agl.OtelTracer, value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        agl.emit_reward(value)


@pytest.mark.parametrize(
    ("reward", "primary_key", "error"),
    [
        ("1", None, TypeError),
        (None, None, TypeError),
        (ArrayOfNoDimensions("1"), None, TypeError),
        ({"a": "1"}, None, TypeError),
        ({}, None, ValueError),
        ({"a": 1, "b": 2}, None, ValueError),
        ({"a": 1}, "b", ValueError),
    ],
)
def test_what_is_no_reward_is_refused(tracer: agl.OtelTracer, reward: Any, primary_key: Any, error: Any) -> None:
    with pytest.raises(error):
        agl.emit_reward(reward, primary_key=primary_key)


async def test_functions_whose_result_is_the_reward() -> None:
    @agl.reward
    def plain(x: float | None) -> float | None:
        return x

    @agl.reward
    async def coroutine(x: float) -> float:
        return x

    tracer = agl.OtelTracer()
    with tracer.lifespan():
        async with tracer.trace_context():
            assert plain(0.5) == 0.5
            assert plain(None) is None
            assert await coroutine(0.25) == 0.25
        assert [agl.get_reward_value(span) for span in tracer.get_last_trace()] == [0.5, 0.25]


# --- Messages, objects, exceptions, annotations ----------------------------------------------------


def test_messages(tracer: agl.OtelTracer) -> None:
    (span,) = traced(tracer, lambda: agl.emit_message("hello", {"to": ["a", "b"]}))
    assert (span.name, agl.get_message_value(span), span.attributes["to"]) == (agl.AGL_MESSAGE, "hello", ["a", "b"])
    assert agl.get_message_value(Span.from_attributes(name="other", attributes={})) is None
    with pytest.raises(TypeError, match="emit_object"):
        agl.emit_message(3)  # pyright: ignore[reportArgumentType]


class _Point(BaseModel):
    x: int


@pytest.mark.parametrize(
    ("value", "kind"), [(3, "int"), ("s", "str"), ([1, {"a": None}], "list"), ({"a": 1}, "dict"), (None, "NoneType")]
)
def test_objects(tracer: agl.OtelTracer, value: Any, kind: str) -> None:
    (span,) = traced(tracer, lambda: agl.emit_object(value))
    assert agl.get_object_value(span) == value
    assert span.attributes["agentlightning.object.type"] == kind


def test_objects_of_pydantic_and_none_at_all(tracer: agl.OtelTracer) -> None:
    (span,) = traced(tracer, lambda: agl.emit_object(_Point(x=1)))
    assert agl.get_object_value(span) == {"x": 1}
    assert str(span.attributes["agentlightning.object.type"]).endswith("_Point")
    with pytest.raises(RuntimeError, match="not JSON"):
        agl.emit_object(object())


def test_exceptions(tracer: agl.OtelTracer) -> None:
    (span,) = traced(tracer, lambda: agl.emit_exception(KeyError("x"), {"where": "here"}))
    assert (span.name, span.status.status_code) == (agl.AGL_EXCEPTION, "ERROR")
    assert span.attributes["exception.type"] == "KeyError"
    assert span.attributes["where"] == "here"
    with pytest.raises(TypeError):
        agl.emit_exception("x")  # pyright: ignore[reportArgumentType]


def test_annotations_tags_and_links(tracer: agl.OtelTracer) -> None:
    told = agl.make_tag_attributes(["a", "b"]) | agl.make_link_attributes({"gen_ai.response.id": "r1"})
    (span,) = traced(tracer, lambda: agl.emit_annotation({"score": {"x": 1}} | told))
    assert span.attributes["score.x"] == 1
    assert agl.extract_tags_from_attributes(span.attributes) == ["a", "b"]
    links = agl.extract_links_from_attributes(span.attributes)
    called = Span.from_attributes(attributes={"gen_ai.response.id": "r1"})
    assert agl.query_linked_spans([span, called], links) == [called]
    by_id = agl.extract_links_from_attributes(agl.make_link_attributes({"span_id": called.span_id}))
    assert agl.query_linked_spans([span, called], by_id) == [called]


# --- Operations ------------------------------------------------------------------------------------


async def test_operations() -> None:
    @agl.operation
    def add(a: int, b: int = 2) -> int:
        agl.emit_message("inside")
        return a + b

    @agl.operation(name="search", kind="web")
    async def search(query: str) -> dict[str, Any]:
        return {"hits": [query]}

    @agl.operation()
    def failing() -> None:
        raise ValueError("no")

    tracer = agl.OtelTracer()
    with tracer.lifespan():
        async with tracer.trace_context():
            assert add(1) == 3
            assert await search("q") == {"hits": ["q"]}
            with pytest.raises(ValueError, match="no"):
                failing()
            with agl.operation(name="block") as op:
                op.set_input("x", y=1)
                op.set_output({"z": 2})
                assert op.span().attributes["agentlightning.operation.input.y"] == 1
        message, added, searched, failed, block = tracer.get_last_trace()
    assert message.parent_id == added.span_id
    assert added.attributes["agentlightning.operation.name"] == "add"
    assert added.attributes["agentlightning.operation.input.a"] == 1
    assert added.attributes["agentlightning.operation.output"] == 3
    assert (searched.attributes["agentlightning.operation.name"], searched.attributes["kind"]) == ("search", "web")
    assert searched.attributes["agentlightning.operation.output.hits"] == ["q"]
    assert (failed.status.status_code, failed.attributes["agentlightning.operation.name"]) == ("ERROR", "failing")
    assert block.attributes["agentlightning.operation.input.args"] == ["x"]
    assert block.attributes["agentlightning.operation.output.z"] == 2


def test_operations_used_wrongly(tracer: agl.OtelTracer) -> None:
    with pytest.raises(RuntimeError, match="not entered"):
        agl.operation(name="x").set_input(1)
    op = agl.operation(name="x")
    with op, pytest.raises(RuntimeError, match="already"):
        op.__enter__()
    with pytest.raises(TypeError, match="generator"):

        @agl.operation
        def numbers() -> Iterator[int]:
            yield 1


# --- Where it goes ---------------------------------------------------------------------------------


def test_without_propagation_only_the_span_comes_back(tracer: agl.OtelTracer) -> None:
    def emit() -> None:
        assert agl.emit_reward(1, propagate=False).attributes["agentlightning.reward.0.value"] == 1.0
        agl.emit_message("x", propagate=False)
        with agl.operation(name="x", propagate=False) as op:
            assert op.span().name == agl.AGL_OPERATION

    assert traced(tracer, emit) == []


@pytest.mark.parametrize(
    "emit", [lambda: agl.emit_reward(1), lambda: agl.emit_message("x"), lambda: agl.operation(name="x").__enter__()]
)
def test_without_a_tracer_it_is_an_error_that_says_what_to_do(emit: Any) -> None:
    with pytest.raises(RuntimeError, match="propagate=False"):
        emit()


def test_debugging_logs_what_is_emitted(
    tracer: agl.OtelTracer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    agl.emit_message("quiet")
    assert not caplog.records
    monkeypatch.setenv("AGL_EMITTER_DEBUG", "1")
    agl.emit_message("loud")
    assert "loud" in caplog.text
