"""Sending objects to a process that is not a fork of this one.

They are pickled with cloudpickle, which also takes closures, lambdas, and whatever a script or a notebook
defines. What cannot be pickled is named by the way that leads to it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any, cast

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]

from agentlightning.errors import InvalidValue

_DEEPEST = 12


def pack(what: str, value: object) -> bytes:
    """``value`` as bytes; ``what`` names it.

    Raises:
        InvalidValue: something in it cannot be sent; the message says what, and the ways out.
    """
    error = _refusal(value)
    if error is None:
        return _pickled(value)
    path, culprit, error = _culprit(what, value, error)
    raise InvalidValue(
        f"{path}, a {type(culprit).__module__}.{type(culprit).__qualname__}, cannot be sent to another process: "
        f"{error}. Make it where it is used (in the agent's rollout, or when it is first asked for); or use "
        "start_method='fork', which needs no pickling; or strategy 'shm', which has no other processes"
    ) from error


def unpack(what: str, data: bytes) -> Any:
    """What was packed. Whatever its modules raise when they are imported here is raised, with ``what`` named."""
    try:
        return pickle.loads(data)
    except ModuleNotFoundError as error:
        error.add_note(f"{what} was defined in a module that cannot be imported in this process")
        raise


def _pickled(value: object) -> bytes:
    return cloudpickle.dumps(value)  # pyright: ignore[reportUnknownMemberType]


def _refusal(value: object) -> Exception | None:
    try:
        _pickled(value)
    except Exception as error:  # noqa: BLE001 - the objects' own code runs here, and may raise anything
        return error
    return None


def _culprit(path: str, value: object, error: Exception, depth: int = 0) -> tuple[str, object, Exception]:
    """The innermost part that cannot be pickled either, and the way to it."""
    if depth < _DEEPEST:
        for step, part in _parts(value):
            refused = _refusal(part)
            if refused is not None:
                return _culprit(f"{path}{step}", part, refused, depth + 1)
    return path, value, error


def _parts(value: object) -> Iterator[tuple[str, object]]:
    match value:
        case MethodType():
            yield ".__self__", value.__self__
        case FunctionType():
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                yield f" → {name}", cell.cell_contents
            for name in value.__code__.co_names:
                if name in value.__globals__ and value.__module__ == "__main__":
                    yield f" → {name}", value.__globals__[name]
        case Mapping():
            for key, item in cast("Mapping[object, object]", value).items():
                yield f"[{key!r}]", item
        case list() | tuple() | set() | frozenset():
            for number, item in enumerate(cast("list[object]", value)):
                yield f"[{number}]", item
        case _:
            for name, item in getattr(value, "__dict__", {}).items():
                yield f".{name}", item
