"""What the method signatures of ``LightningStore`` say, and stores whose methods derive from them.

The contract's signatures are the only place where the arguments of a method are written down.
"""

from __future__ import annotations

import abc
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_type_hints

from agentlightning.store.base import LightningStore

Store = TypeVar("Store", bound=LightningStore)


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


@cache
def arguments_of(method: str) -> Mapping[str, Argument]:
    """The arguments of a method of the contract by name, without ``self``."""
    function = getattr(LightningStore, method)
    hints = get_type_hints(function, include_extras=True)
    described = _described_arguments(inspect.getdoc(function) or "")
    return {
        name: Argument(name, hints[name], each.default, each.kind is each.KEYWORD_ONLY, described.get(name))
        for name, each in inspect.signature(function).parameters.items()
        if name != "self"
    }


def _described_arguments(docstring: str) -> Mapping[str, str]:
    """The entries of the ``Args:`` section of a docstring."""
    _, _, section = docstring.partition("\nArgs:\n")
    section = section.partition("\n\n")[0]
    entries = re.findall(r"^    ([a-z_]+(?:, [a-z_]+)*): (.+(?:\n {5,}.+)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


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
    make: Callable[[str], Callable[..., Any]], names: Iterable[str]
) -> Callable[[type[Store]], type[Store]]:
    """Decorate a class that gets each of these methods that it does not define itself.

    Args:
        make: makes the method with this name; it gets the signature and the docstring of the contract's.
        names: which methods.
    """

    def decorate(store: type[Store]) -> type[Store]:
        for name in names:
            if name not in vars(store):
                derived = functools.wraps(getattr(LightningStore, name))(make(name))
                derived.__dict__.pop("__isabstractmethod__", None)
                derived.__qualname__ = f"{store.__qualname__}.{name}"
                setattr(store, name, derived)
        return abc.update_abstractmethods(store)

    return decorate


def _forward(name: str) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._target(), name)(*args, **kwargs)

    async def forward_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await getattr(self._target(), name)(*args, **kwargs)

    return forward_async if inspect.iscoroutinefunction(getattr(LightningStore, name)) else forward


@derive_methods(
    _forward, [name for name, _ in inspect.getmembers(LightningStore, callable) if not name.startswith("_")]
)
class ForwardingStore(DerivedStore):
    """A store that passes every call on to another store, which may be a different one each time."""

    @abc.abstractmethod
    def _target(self) -> LightningStore:
        """The store that is called."""

    @property
    def stopped(self) -> bool:
        return self._target().stopped
