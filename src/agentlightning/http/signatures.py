"""What the method signatures of ``LightningStore`` say, for everything that is derived from them.

The contract's signatures are the only place where the arguments of a method are written down. This module reads
them with ``inspect`` and turns their annotations into pydantic models, because JSON has fewer types than Python: a
``Sequence`` arrives as a list, ``UNSET`` as an absent field, a ``Rollout`` with or without its attempt.
"""

from __future__ import annotations

import abc
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints as type_hints,
)

from pydantic import BaseModel, FailFast, Field, StrictFloat, StrictInt, create_model

from agentlightning.store.base import LightningStore, LightningStoreStatistics, Measure
from agentlightning.types import UNSET, AttemptedRollout, PaginatedResult, Rollout, Unset
from agentlightning.types.plain_spans import PlainSpan

Store = TypeVar("Store", bound=LightningStore)
Method = Callable[..., Any]

_LOCAL_METHODS = frozenset({"otlp_traces_endpoint", "add_otel_span", "answering_in_json"})
"""Methods that no other store is asked for: they only convert their arguments, or answer about this object."""


class Argument(NamedTuple):
    """One argument of a method of the contract."""

    name: str
    annotation: Any
    default: Any
    """``inspect.Parameter.empty`` if the argument is required."""
    keyword_only: bool
    help: str | None
    """What the method's docstring says of it."""

    @property
    def required(self) -> bool:
        """Whether callers must give it."""
        return self.default is inspect.Parameter.empty


def contract_methods() -> Sequence[str]:
    """The names of all methods of the contract that can be passed on to another store."""
    return [
        name
        for name in dir(LightningStore)
        if inspect.iscoroutinefunction(getattr(LightningStore, name)) and name not in _LOCAL_METHODS
    ]


@cache
def arguments_of(method: str) -> Mapping[str, Argument]:
    """The arguments of a method of the contract by name, without ``self``."""
    function = getattr(LightningStore, method)
    hints = type_hints(function, include_extras=True)
    described = _described_arguments(inspect.getdoc(function) or "")
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {
        each.name: Argument(
            each.name,
            hints[each.name],
            each.default,
            each.kind is inspect.Parameter.KEYWORD_ONLY,
            described.get(each.name),
        )
        for each in parameters
    }


def _described_arguments(docstring: str) -> Mapping[str, str]:
    """The entries of the ``Args:`` section of a docstring."""
    _, _, section = docstring.partition("\nArgs:\n")
    section = section.partition("\n\n")[0]
    entries = re.findall(r"^    ([a-z_]+(?:, [a-z_]+)*): (.+(?:\n {5,}.+)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


# --- Annotations as types of the wire --------------------------------------------------------------


def reply_type(method: str) -> Any:
    """The type of a method's result as it travels."""
    return wire_type(type_hints(getattr(LightningStore, method), include_extras=True)["return"])


def wire_type(annotation: Any, *, in_query: bool = False) -> Any:
    """The type that pydantic is to check what travels against.

    Numbers are strict, since otherwise pydantic takes the text ``"1"`` and ``true`` for numbers. A query string
    carries nothing but text, so there a number may come as text.

    Args:
        annotation: as the contract has it.
        in_query: whether the value comes in a query string.
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    page = getattr(annotation, "__pydantic_generic_metadata__", {"origin": None})
    if isinstance(annotation, TypeVar):  # a method that takes both forms of a span returns the form that it got
        return wire_type(annotation.__bound__, in_query=in_query)
    if annotation is float:
        return float if in_query else StrictFloat
    if annotation is int:
        return StrictInt
    if annotation is Rollout:  # the store attaches the latest attempt, where there is one
        return AttemptedRollout | Rollout
    if annotation is LightningStoreStatistics:  # newer servers may count more
        return dict[str, Any]
    if page["origin"] is PaginatedResult:
        return cast(Any, PaginatedResult)[wire_type(page["args"][0])]
    if origin is Sequence or origin is list:
        return list[wire_type(parts[0], in_query=in_query)]
    if origin is Mapping:
        return dict[parts[0], parts[1]]
    if origin in (Union, UnionType):
        kept = [part for part in parts if part not in (Unset, PlainSpan)]  # a plain span has the same JSON as a span
        if str in kept:
            kept = [part for part in kept if get_origin(part) is not Literal]
        return Union[tuple(wire_type(part, in_query=in_query) for part in kept)]  # noqa: UP007 - made at run time
    return annotation


def model_of(
    title: str, summary: str, arguments: Sequence[Argument], base: type[BaseModel] | None = None, *, in_query: bool
) -> type[BaseModel]:
    """A model whose fields are arguments of a method.

    A field that is absent was not given; the contract's own default applies. That is not what null means.
    Unknown fields are ignored, because clients of other versions may send more.

    Args:
        title: its name in the OpenAPI document.
        summary: what it is, for people.
        arguments: its fields.
        base: a record that has some of the arguments as its fields, with more to say of them than an annotation.
        in_query: whether the fields come in a query string.
    """
    fields: dict[str, Any] = {}
    for each in arguments:
        if base is not None and each.name in base.model_fields:
            continue
        kind = wire_type(each.annotation, in_query=in_query)
        if list in {get_origin(part) for part in (kind, *get_args(kind))}:
            kind = Annotated[kind, FailFast()]  # of ten thousand wrong items pydantic would list all, for seconds
        if each.required:
            field = Field(description=each.help)
        elif each.default is UNSET:  # a factory, because a default would be shown in the schema
            field = Field(default_factory=NoneType, description=each.help)
        else:
            field = Field(default=each.default, description=each.help)
        fields[each.name] = (kind, field)
    return create_model(title, __base__=base or BaseModel, __doc__=summary, **fields)


# --- Stores whose methods are derived --------------------------------------------------------------


class DerivedStore(LightningStore):
    """A store that gets its methods from the contract, by ``derive_methods``, instead of spelling them out."""

    if TYPE_CHECKING:
        # A type checker does not see methods that are made at run time, and takes the class for abstract. For it, they
        # are those of the contract. A method that has a default in the contract needs no line here.
        statistics = LightningStore.statistics
        enqueue_many_rollouts = LightningStore.enqueue_many_rollouts
        start_rollout = LightningStore.start_rollout
        dequeue_many_rollouts = LightningStore.dequeue_many_rollouts
        start_attempt = LightningStore.start_attempt
        update_rollout = LightningStore.update_rollout
        update_attempt = LightningStore.update_attempt
        get_rollout_by_id = LightningStore.get_rollout_by_id
        get_latest_attempt = LightningStore.get_latest_attempt
        query_rollouts = LightningStore.query_rollouts
        query_attempts = LightningStore.query_attempts
        wait_for_rollouts = LightningStore.wait_for_rollouts
        add_many_spans = LightningStore.add_many_spans
        get_many_span_sequence_ids = LightningStore.get_many_span_sequence_ids
        query_spans = LightningStore.query_spans
        add_resources = LightningStore.add_resources
        update_resources = LightningStore.update_resources
        get_resources_by_id = LightningStore.get_resources_by_id
        get_latest_resources = LightningStore.get_latest_resources
        query_resources = LightningStore.query_resources
        update_worker = LightningStore.update_worker
        get_worker_by_id = LightningStore.get_worker_by_id
        query_workers = LightningStore.query_workers


def derive_methods(
    make: Callable[[str], Method], names: Callable[[], Sequence[str]] = contract_methods
) -> Callable[[type[Store]], type[Store]]:
    """Decorate a class that gets each of these methods that it does not define itself.

    Args:
        make: makes the method with this name; it gets the signature and the docstring of the contract's.
        names: which methods.
    """

    def decorate(store: type[Store]) -> type[Store]:
        for name in names():
            if name not in vars(store):
                contract = getattr(LightningStore, name)
                derived = functools.wraps(contract)(make(name))
                derived.__dict__.pop("__isabstractmethod__", None)
                derived.__qualname__ = f"{store.__qualname__}.{name}"
                setattr(store, name, derived)
        return abc.update_abstractmethods(store)

    return decorate


def _forward(name: str) -> Method:
    async def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await getattr(self._target(), name)(*args, **kwargs)

    return forward


@derive_methods(_forward)
class ForwardingStore(DerivedStore):
    """A store that passes every call on to another store, which may be a different one each time."""

    def answering_in_json(self) -> Any:
        """The JSON form of the store that is called."""
        return self._target().answering_in_json()

    @abc.abstractmethod
    def _target(self) -> LightningStore:
        """The store that is called."""

    @property
    def stopped(self) -> bool:
        """Whether a fault has ended all writing of the other store for good."""
        return self._target().stopped

    def measures(self) -> Sequence[Measure]:
        """Numbers that say how the other store is doing."""
        return self._target().measures()

    def hold_claims(self) -> None:
        """Let the other store hand out no rollout until somebody enqueues one or waits for one to end."""
        self._target().hold_claims()
