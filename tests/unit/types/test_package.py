from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

import agentlightning.types

MODULES = [
    "attributes",
    "contract",
    "endpoints",
    "jinja_templates",
    "resources",
    "rewards",
    "rollouts",
    "spans",
    "templates",
]
INTERNAL = {"attributes", "endpoints", "jinja_templates", "rewards", "templates"}
NOT_EXPORTED = {"ParallelWorkerBase"}


def public_things(module: ModuleType) -> dict[str, object]:
    """The classes and functions that a module defines for others."""
    return {
        name: thing
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__ and callable(thing)
    }


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_it_loads_neither_opentelemetry_nor_jinja() -> None:
    run(
        "import sys, agentlightning.types\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "heavy = sorted(loaded & {'opentelemetry', 'jinja2', 'numpy', 'fastapi'})\n"
        "assert not heavy, heavy"
    )


def test_what_needs_neither_loads_neither() -> None:
    run(
        "import sys\n"
        "from agentlightning.types import PromptTemplate, Span\n"
        "Span.from_attributes(attributes={'a': 1}).model_dump_json()\n"
        "assert PromptTemplate(template='{a}', engine='f-string').format(a=1) == '1'\n"
        "assert not {'opentelemetry', 'jinja2'} & set(sys.modules)\n"
        "PromptTemplate(template='{{ a }}', engine='jinja').format(a=1)\n"
        "assert 'jinja2' in sys.modules  # so the check above can see it\n"
    )


def test_exports_exist_and_are_listed_once() -> None:
    exported = agentlightning.types.__all__
    assert len(exported) == len(set(exported))
    for name in exported:
        assert getattr(agentlightning.types, name) is not None or name == "TaskInput"


@pytest.mark.parametrize("module", sorted(set(MODULES) - INTERNAL))
def test_every_public_name_of_a_module_is_exported(module: str) -> None:
    source = importlib.import_module(f"agentlightning.types.{module}")
    for name, thing in public_things(source).items():
        if name not in NOT_EXPORTED:
            assert getattr(agentlightning.types, name) is thing


@pytest.mark.parametrize("module", MODULES)
def test_every_public_thing_says_what_it_is(module: str) -> None:
    source = importlib.import_module(f"agentlightning.types.{module}")
    assert source.__doc__
    assert public_things(source)
    for name, thing in public_things(source).items():
        assert vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__, name
