"""How the sides of a run get into their processes: by a fork, or packed and sent to a new interpreter.

Objects are packed with cloudpickle, because pickle itself refuses closures, lambdas and what a script or a notebook
defines. An error names the innermost object that cannot be packed and the path to it.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any, Literal, cast

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]

from agentlightning.errors import InvalidValue

_log = logging.getLogger(__name__)

StartMethod = Literal["fork", "spawn", "forkserver"]

_MAX_DEPTH = 12
"""How deep ``pack`` looks for the object that cannot be packed; objects may refer to each other in circles."""


def choose_start_method(requested: StartMethod | None, jobs: Mapping[str, object]) -> StartMethod:
    """How processes are started: as requested; else ``fork`` from a process with one thread, else ``forkserver``.

    If there are more threads and a job cannot be pickled, the method is ``fork`` nevertheless, with a warning.
    """
    if requested is not None:
        return requested
    try:  # threads that Python does not know count too
        threads = max(threading.active_count(), len(os.listdir("/proc/self/task")))
    except OSError:
        threads = threading.active_count()
    if threads == 1:
        return "fork"
    try:
        for name, job in jobs.items():
            pack(f"the {name}'s side", job)
    except InvalidValue as error:
        _log.warning("forking a process that has threads, which may block the new one for ever, because %s", error)
        return "fork"
    return "forkserver"


def pack(what: str, value: object) -> bytes:
    """``value`` as bytes; ``what`` names it in an error message.

    Raises:
        InvalidValue: something in it cannot be packed; the message names it and the alternatives.
    """
    packed = _try_pack(value)
    if isinstance(packed, bytes):
        return packed
    path, culprit, error = _find_culprit(what, value, packed)
    raise InvalidValue(
        f"{path}, a {type(culprit).__module__}.{type(culprit).__qualname__}, cannot be sent to another process: "
        f"{error}. Make it where it is used (in the agent's rollout, or when it is first asked for); or use "
        "start_method='fork', which needs no pickling; or strategy 'shm', which has no other processes"
    ) from error


def unpack(what: str, data: bytes) -> Any:
    """The object that was packed. Raises what its modules raise when they are imported here; ``what`` names it."""
    try:
        return pickle.loads(data)
    except ModuleNotFoundError as error:
        error.add_note(f"{what} was defined in a module that cannot be imported in this process")
        raise


def _try_pack(value: object) -> bytes | Exception:
    try:
        return cloudpickle.dumps(value)  # pyright: ignore[reportUnknownMemberType]
    except Exception as error:  # noqa: BLE001 - the objects' own code runs here, and may raise anything
        return error


def _find_culprit(path: str, value: object, error: Exception, depth: int = 0) -> tuple[str, object, Exception]:
    """The innermost part that cannot be packed either, and the path to it."""
    if depth < _MAX_DEPTH:
        for step, part in _parts(value):
            packed = _try_pack(part)
            if isinstance(packed, Exception):
                return _find_culprit(f"{path}{step}", part, packed, depth + 1)
    return path, value, error


def _parts(value: object) -> Iterator[tuple[str, object]]:
    """What an object refers to, each with the step of the path that leads there."""
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
