"""Module paths and names of agentlightning 0.3 that are elsewhere now, or gone.

A script of 0.3 imports ``agentlightning.store.client_server`` or ``agentlightning.runner.agent.Hook``. The front
door puts ``find_spec`` on ``sys.meta_path``, so that every module path of ``OLD_NAMES`` answers without a file of
its own, and so that modules that exist in both versions also offer the names that 0.3 had there. A name resolves
to the public name of the same spelling, or to its place in ``MOVED``. A name that has no successor raises an
``ImportError`` that says what to use instead (``REPLACED``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

OLD_NAMES = {
    module: names.strip()
    for line in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
    for module, _, names in [line.partition(":")]
}
"""The names that each module of 0.3 offered, separated by spaces."""

MOVED = {
    "DummySpanRecordingContext": "tracer.base",
    "OtelSpanRecordingContext": "tracer.otel",
    "build_component": "trainer.components",
    "check_attributes_sanity": "types.attributes",
    "convert_to_openai_messages": "adapter.adapters",
    "filter_and_unflatten_attributes": "types.attributes",
    "filter_attributes": "types.attributes",
    "flatten_attributes": "types.attributes",
    "format_exception_attributes": "types.attributes",
    "full_qualified_name": "types.attributes",
    "get_tracer_provider": "tracer.provider",
    "group_genai_dict": "adapter.adapters",
    "load_class": "trainer.components",
    "main": "cli.app",
    "sanitize_attribute_value": "types.attributes",
    "sanitize_attributes": "types.attributes",
    "sanitize_list_attribute_sanity": "types.attributes",
    "system_snapshot": "runner.heartbeat:system_statistics",
    "to_otel_status_code": "tracer.otel",
    "unflatten_attributes": "types.attributes",
}
"""Names that 0.3 offered in inner modules, and the module that defines each now (``module:name`` if renamed)."""

REPLACED = (
    (r"AgentOps|Weave|agentops|weave|AGENTOPS|WEAVE|instrument", "agl.OtelTracer takes any OpenTelemetry span"),
    (r"LiteLLM|litellm|LITELLM|vllm|VLLM", "agl.LLMProxy passes calls on to any OpenAI-compatible server"),
    (r"VERL", "agl.GRPO trains a policy; a trainer of your own takes what the adapters make of spans"),
    (r"Metrics|prometheus|LATENCY|metrics", "the server answers Prometheus at GET /metrics"),
    (r"Launcher|CachedStatic", "agl.LightningStoreServer starts its own server"),
    (r"Request$|Response$|PREFIX|PROTOBUF|OTLPExporter|otlp|proto$", "docs/rest.md has bodies and paths"),
    (r"[Cc]ollection|COLLECTION|Mongo|KeyValue|Queue|Duplicated|tracked", "agl.SqliteLightningStore keeps everything"),
    (r"Legacy|ServerDataStore", "agl.Trainer and agl.LitAgentRunner run the agents of v0.1 too"),
    (r"InterProcess", "agl.ClientServerExecutionStrategy runs processes"),
    (r"logg|setup", "agl.setup_logging sets logging up"),
    (r"^lightning_cli", "agl.Trainer takes its components as strings, dicts or objects"),
    (r"^(A?[A-Z]|T_\w+|SelfT|AlgorithmFunc\w+)$", "it names types of 0.3's own source; define your own"),
)
"""What to use instead of a name that is gone: the first pattern that is found in it."""


def find_spec(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """A module path of 0.3: the module of this package, which then also offers 0.3's names, or one made up."""
    if name.removeprefix("agentlightning.") not in OLD_NAMES:
        return None
    spec = PathFinder.find_spec(name, path)
    if spec is None:
        return ModuleSpec(name, _Loader(None), is_package=True)
    spec.loader = _Loader(spec.loader)
    return spec


def offered(module: str, name: str) -> bool:
    """Whether 0.3 had this name in this module."""
    return name in OLD_NAMES.get(module.removeprefix("agentlightning."), "").split()


def look_up(module: str, name: str, *, is_gone: bool = False) -> Any:
    """What ``name`` of 0.3's ``module`` is now.

    Args:
        module, name: as a script of 0.3 has them.
        is_gone: whether this package has no such module; then none of its other names has a successor, either.

    Raises:
        ImportError: it has no successor; the message says what to use instead.
        AttributeError: 0.3 had no such name there either.
    """
    if not offered(module, name) and (name.startswith("_") or not is_gone):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    if offered(module, name) and name in MOVED:
        path, _, renamed = MOVED[name].partition(":")
        return getattr(import_module(f"agentlightning.{path}"), renamed or name)
    front_door = import_module("agentlightning")
    if offered(module, name) and name in front_door.__all__:
        return getattr(front_door, name)
    raise ImportError(removed(name), name=module)


def removed(name: str) -> str:
    """The message about a name of 0.3 that is gone."""
    instead = next((text for pattern, text in REPLACED if re.search(pattern, name)), "see docs/migration-0.3.md")
    return f"{name} of agentlightning 0.3 is not offered any more: {instead}"


class _Package(ModuleType):
    """A package whose public name is not hidden by a submodule of the same name (``agentlightning.reward``).

    The import system sets every loaded submodule as an attribute of its package.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and offered(self.__name__, name)):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, (self.__name__,)  # cloudpickle knows plain modules only, and agents refer to this one


class _Loader(Loader):
    """Loads a module as usual, or makes an empty one, and lets it offer the names that 0.3 had there."""

    def __init__(self, usual: Loader | None) -> None:
        self._usual = usual

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None if self._usual is None else self._usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if self._usual is not None:
            self._usual.exec_module(module)
        find = partial(look_up, module.__name__, is_gone=self._usual is None)
        module.__dict__.setdefault("__getattr__", find)
        if module.__name__ == "agentlightning.emitter":
            module.__class__ = _Package

    def __getattr__(self, name: str) -> Any:
        return getattr(self._usual, name)  # get_source, get_data … for tracebacks and importlib.resources


import_module("agentlightning").__class__ = _Package
