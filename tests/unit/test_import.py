"""The front door: importing the package is quick, and every name it promises is there."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import agentlightning as agl
from agentlightning import errors, types

HEAVY = ("apsw", "asyncio", "jinja2", "msgspec", "opentelemetry", "pydantic", "pydantic_core")
MAX_IMPORT_CPU_SECONDS = 0.3
"""What importing the package may cost on any machine that we know of."""

_MEASURE = """
import json, sys, time
before = time.process_time()
import agentlightning
seconds = time.process_time() - before
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def fresh_import() -> dict[str, Any]:
    """What importing the package does in a process that has done nothing else."""
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def test_importing_loads_nothing_heavy(fresh_import: dict[str, Any]) -> None:
    loaded = set(fresh_import["modules"])
    assert "agentlightning" in loaded
    assert not loaded.intersection(HEAVY)
    assert not [name for name in loaded if name.startswith("agentlightning.")]


def test_importing_is_quick(fresh_import: dict[str, Any]) -> None:
    assert fresh_import["seconds"] < MAX_IMPORT_CPU_SECONDS


@pytest.mark.parametrize("name", agl.__all__)
def test_every_name_resolves_to_what_its_module_defines(name: str) -> None:
    module = importlib.import_module(agl._module_names()[name])  # pyright: ignore[reportAttributeAccessIssue] - private
    assert getattr(agl, name) is getattr(module, name)


def test_the_stub_re_exports_every_name() -> None:
    stub = ast.parse(Path(agl.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imported = [alias for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert all(alias.asname == alias.name for alias in imported), "write `X as X`, which re-exports X"
    assert len(imported) == len({alias.name for alias in imported}), "each name once"


def test_all_types_errors_and_the_contract_are_exported() -> None:
    error_names = {error.__name__ for error in errors.error_classes().values()}
    contract = {
        "LightningStore",
        "LightningStoreCapabilities",
        "LightningStoreStatistics",
        "StoreHost",
        "is_finished",
        "is_queuing",
        "is_running",
    }
    assert {*types.__all__, *contract, *error_names} <= set(agl.__all__)


def test_names_are_listed() -> None:
    assert set(agl.__all__) | {"__version__"} <= set(dir(agl))


def test_version_is_the_installed_one() -> None:
    assert agl.__version__ == version("agentlightning")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'agentlightning' has no attribute 'Trainr'") as caught:
        _ = agl.Trainr  # pyright: ignore[reportAttributeAccessIssue] - on purpose
    assert (caught.value.name, caught.value.obj) == ("Trainr", agl), "so that Python can say: did you mean 'Trainer'?"


def test_star_import_brings_every_name() -> None:
    names: dict[str, object] = {}
    exec("from agentlightning import *", names)  # noqa: S102 - a star import is a statement of a module
    assert set(agl.__all__) <= set(names)
