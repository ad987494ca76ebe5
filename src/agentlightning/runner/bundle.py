"""A runner's side of a run that names its agent, as a value that can be sent to the process that runs it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentlightning.errors import InvalidValue
from agentlightning.litagent.litagent import LitAgent, rollout
from agentlightning.runner.agent import LitAgentRunner
from agentlightning.runner.base import StopEvent
from agentlightning.runner.program import ProgramAgent
from agentlightning.store.base import LightningStore
from agentlightning.tracer.otel import OtelTracer


@dataclass(frozen=True)
class RunAgent:
    """Makes an agent in the process that runs it, and runs it.

    Args:
        agent: ``module:name`` or ``file.py:name``, see ``load_agent``; None where there is a ``program``.
        program: a line for ``/bin/sh``, see ``ProgramAgent``.
        folder: where modules and files are looked up, and where programs run.
        runner: arguments of ``LitAgentRunner``.
    """

    agent: str | None
    program: str | None
    folder: str
    runner: dict[str, Any] = field(default_factory=dict[str, Any])

    async def __call__(self, store: LightningStore, worker_id: int, event: StopEvent) -> None:
        """Work on the rollouts of the store until told to end. Raises as ``LitAgentRunner.iter``."""
        runner = LitAgentRunner[Any](OtelTracer(), **self.runner)
        with runner.run_context(agent=self.make(), store=store, worker_id=worker_id):
            await runner.iter(event=event)

    def make(self) -> LitAgent[Any]:
        """The agent.

        Raises:
            InvalidValue: neither an agent nor a program is given, or there is no such agent.
        """
        if self.program is not None:
            return ProgramAgent(self.program, cwd=self.folder)
        if self.agent is None:
            raise InvalidValue("neither an agent nor a program is given; give one")
        return load_agent(self.agent, self.folder)


def load_agent(spec: str, folder: str) -> LitAgent[Any]:
    """The agent called ``module:name`` or ``file.py:name``.

    It may be an agent, a class of agents that needs no arguments, or a function, which is wrapped as by ``@rollout``.

    Args:
        spec: its place and name.
        folder: looked into first, before the installed modules.

    Raises:
        InvalidValue: there is no such object, or it is something else.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise InvalidValue(f"{spec!r} is no agent; write MODULE:NAME or FILE.py:NAME")
    found: Any = _module(place, folder)
    for part in name.split("."):
        if not hasattr(found, part):
            raise InvalidValue(f"{place!r} has nothing called {name!r}")
        found = getattr(found, part)
    kind = type(found).__name__
    if inspect.isroutine(found):
        return rollout(found)
    if isinstance(found, LitAgent):
        return found  # pyright: ignore[reportUnknownVariableType]
    if isinstance(found, type) and issubclass(found, LitAgent):
        return found()  # pyright: ignore[reportUnknownVariableType]
    raise InvalidValue(f"{spec!r} is a {kind}; it must be an agent, a class of agents, or a function")


def _module(place: str, folder: str) -> Any:
    if folder not in sys.path:
        sys.path.insert(0, folder)
    file = Path(folder, place)
    if place.endswith(".py") or os.sep in place:
        if not file.is_file():
            raise InvalidValue(f"there is no file {str(file)!r}")
        return _from_file(file)
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # the module exists, and needs another one that does not
        raise InvalidValue(f"there is no module {place!r}, neither in {folder!r} nor installed") from error


def _from_file(file: Path) -> Any:
    name = file.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(file):
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InvalidValue(f"{str(file)!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, so that its classes can be pickled by name
    spec.loader.exec_module(module)
    return module
