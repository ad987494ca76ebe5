"""Emit annotations, rewards, and operations: an agent's own spans around a block or a function."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, TypedDict, TypeVar, cast, overload

from agentlightning.emitter.emit import as_attributes, emit, tracer_for
from agentlightning.errors import InvalidValue
from agentlightning.semconv import AGL_ANNOTATION, AGL_OPERATION, LightningSpanAttributes
from agentlightning.types import SpanCoreFields, SpanRecordingContext
from agentlightning.types.rewards import PRIMARY_NAME, number_of

_F = TypeVar("_F", bound=Callable[..., Any])
_NAME = LightningSpanAttributes.OPERATION_NAME.value
_INPUT = LightningSpanAttributes.OPERATION_INPUT.value
_OUTPUT = LightningSpanAttributes.OPERATION_OUTPUT.value


def emit_annotation(annotation: dict[str, Any], propagate: bool = True) -> SpanCoreFields:
    """Record facts about the attempt in the trace: tags, links, scores, any named values.

    Args:
        annotation: names and values; nested ones are flattened.
        propagate: whether the trace gets the span; otherwise it is only returned.

    Raises:
        TypeError: ``annotation`` is not a dict with string keys.
        RuntimeError: no tracer is active.
    """
    return emit(AGL_ANNOTATION, as_attributes(annotation), propagate)


def _around_calls(
    fn: _F, enter: Callable[[tuple[Any, ...], dict[str, Any]], AbstractContextManager[Callable[[Any], object]]]
) -> _F:
    """The function, or coroutine function, inside a context for each call, which gets the result."""
    if inspect.iscoroutinefunction(fn):

        @functools.wraps(fn)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            with enter(args, kwargs) as finish:
                result = await fn(*args, **kwargs)
                finish(result)
                return result

        return cast(_F, awaited)

    @functools.wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Any:
        with enter(args, kwargs) as finish:
            result = fn(*args, **kwargs)
            finish(result)
            return result

    return cast(_F, called)


# --- Rewards, which `agentlightning.types.rewards` reads ---------------------------------------------


class RewardDimension(TypedDict):
    """One dimension of a reward."""

    name: str
    value: float


def emit_reward(
    reward: float | Mapping[str, Any],
    *,
    primary_key: str | None = None,
    attributes: dict[str, Any] | None = None,
    propagate: bool = True,
) -> SpanCoreFields:
    """Record how well the agent did. The last reward of an attempt is its final one.

    Args:
        reward: a finite number (also one of numpy, or in an array of no dimensions), or a mapping from dimensions to
            finite numbers.
        primary_key: the dimension that counts where one number is needed; required if there are several.
        attributes: further attributes; nested values are flattened.
        propagate: whether the trace gets the span; otherwise it is only returned.

    Raises:
        TypeError: ``reward`` is neither a number nor a mapping to numbers.
        InvalidValue: a number is not finite, the mapping is empty, or ``primary_key`` is missing or not in it.
        RuntimeError: no tracer is active.
    """
    recorded = as_attributes(attributes)
    for position, dimension in enumerate(_dimensions(reward, primary_key)):
        prefix = f"{LightningSpanAttributes.REWARD.value}.{position}"
        recorded[f"{prefix}.name"] = dimension["name"]
        recorded[f"{prefix}.value"] = dimension["value"]
    return emit(AGL_ANNOTATION, recorded, propagate)


def reward(fn: _F) -> _F:
    """Decorate a function or coroutine function whose result is the reward: each call emits it.

    A call that returns None emits nothing. Raises as ``emit_reward``.
    """

    @contextmanager
    def emitting(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generator[Callable[[Any], object]]:
        yield lambda result: None if result is None else emit_reward(result)

    return _around_calls(fn, emitting)


def _dimensions(reward: float | Mapping[str, Any], primary_key: str | None) -> list[RewardDimension]:
    """All dimensions, the primary one first."""
    if not isinstance(reward, Mapping):
        return [RewardDimension(name=primary_key or PRIMARY_NAME, value=_number(reward, "the reward"))]
    if not reward:
        raise InvalidValue("the reward has no dimension; give at least one name with a number")
    if primary_key is None and len(reward) == 1:
        primary_key = next(iter(reward))
    if primary_key is None or primary_key not in reward:
        names = ", ".join(map(repr, reward))
        raise InvalidValue(f"primary_key is {primary_key!r}; name the dimension that counts: {names}")
    names = [primary_key, *(name for name in reward if name != primary_key)]
    return [RewardDimension(name=name, value=_number(reward[name], f"the reward {name!r}")) for name in names]


def _number(value: Any, what: str) -> float:
    found = number_of(value)
    if found is None:
        raise TypeError(f"{what} is {value!r}, a {type(value).__name__}; give a number")
    try:
        number = float(found)
    except OverflowError as error:
        raise InvalidValue(f"{what} is a whole number too large for a float; give one up to 1e308") from error
    if not math.isfinite(number):
        raise InvalidValue(f"{what} is {value!r}; it must be finite (emit none at all if there is no reward)")
    return number


# --- Operations --------------------------------------------------------------------------------------


class OperationContext:
    """One span around a block, or around each call of a function that it decorates.

    Inputs and outputs are flattened below ``agentlightning.operation.input`` and ``.output``. An exception that
    leaves the block is recorded and raised again.

    Args:
        name: name of the operation; None: that of the function that it decorates, else ``operation``.
        attributes: further attributes; nested values are flattened.
        propagate: whether the trace gets the span.
    """

    def __init__(self, name: str | None, attributes: dict[str, Any], propagate: bool = True) -> None:
        self.name = name or "operation"
        self._is_named = bool(name)
        self._attributes = attributes
        self._propagate = propagate
        self._scope: AbstractContextManager[SpanRecordingContext] | None = None
        self._span: SpanRecordingContext | None = None

    def __enter__(self) -> OperationContext:
        """Open the span.

        Raises:
            RuntimeError: no tracer is active, or the block is entered already.
        """
        if self._scope is not None:
            raise RuntimeError(f"operation {self.name!r} is entered already; make a new one for each block")
        attributes = as_attributes(self._attributes) | {_NAME: self.name}
        self._scope = tracer_for(self._propagate).operation_context(AGL_OPERATION, attributes)
        self._span = self._scope.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        """Close the span."""
        scope, self._scope = self._scope, None
        if scope is not None:
            scope.__exit__(exc_type, exc_val, exc_tb)

    def span(self) -> SpanCoreFields:
        """The span as it is so far.

        Raises:
            RuntimeError: the block was never entered.
        """
        return self._entered().get_recorded_span()

    def set_input(self, *args: Any, **kwargs: Any) -> None:
        """Record the inputs, as ``.input.args.<i>`` and ``.input.<name>``.

        Raises:
            RuntimeError: the block was never entered.
        """
        inputs = ({"args": list(args)} if args else {}) | kwargs
        self._entered().record_attributes(as_attributes({_INPUT: inputs}))

    def set_output(self, output: Any) -> None:
        """Record the output.

        Raises:
            RuntimeError: the block was never entered.
        """
        self._entered().record_attributes(as_attributes({_OUTPUT: output}))

    def __call__(self, fn: _F) -> _F:
        """Decorate a function or coroutine function: each call becomes a span with arguments and result.

        Raises:
            TypeError: it is a generator function, which has done nothing when its call returns.
        """
        if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            raise TypeError(f"{fn.__name__} is a generator function; use `with operation(name=...):` inside it")
        name = self.name if self._is_named else fn.__name__

        @contextmanager
        def recording(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generator[Callable[[Any], object]]:
            with OperationContext(name, self._attributes, self._propagate) as span:
                span.set_input(**_named(fn, args, kwargs))
                yield span.set_output

        return _around_calls(fn, recording)

    def _entered(self) -> SpanRecordingContext:
        if self._span is None:
            raise RuntimeError(f"operation {self.name!r} was not entered; use it as `with operation(...) as op:`")
        return self._span


@overload
def operation(fn: _F, *, propagate: bool = True, name: str | None = None, **additional_attributes: Any) -> _F: ...
@overload
def operation(
    fn: None = None, *, propagate: bool = True, name: str | None = None, **additional_attributes: Any
) -> OperationContext: ...
def operation(
    fn: _F | None = None, *, propagate: bool = True, name: str | None = None, **additional_attributes: Any
) -> _F | OperationContext:
    """An agent's own span: ``with operation(name="search") as op:``, ``@operation`` or ``@operation(name=…)``.

    Args:
        fn: the function, when used as ``@operation`` without arguments.
        propagate: whether the trace gets the spans.
        name: name of the operation; default: the name of the function, or ``operation``.
        additional_attributes: further attributes; nested values are flattened.

    Raises:
        TypeError: ``fn`` is not callable.
    """
    if fn is None:
        return OperationContext(name, additional_attributes, propagate)
    if not callable(fn):
        raise TypeError(f"{fn!r} is a {type(fn).__name__}; decorate a function, or name the operation by name=")
    return OperationContext(name or fn.__name__, additional_attributes, propagate)(fn)


def _named(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the parameters."""
    try:
        return dict(inspect.signature(fn).bind(*args, **kwargs).arguments)
    except TypeError:  # the arguments do not fit the parameters; the call itself raises for that
        return {"args": list(args), **kwargs}
