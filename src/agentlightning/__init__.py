"""Agent Lightning: train agents that run anywhere.

``import agentlightning as agl`` and use the names from here. Importing is quick because nothing is
loaded until it is used (PEP 562): the first use of a name loads the module that defines it. Which
module that is stands in ``__init__.pyi`` beside this file, and nowhere else.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec


@cache
def _module_names() -> dict[str, str]:
    """Every exported name, and the module that defines it."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def __getattr__(name: str) -> Any:
    value: Any
    if name == "__version__":
        from importlib.metadata import version

        value = version("agentlightning")
    elif name == "__all__":
        value = list(_module_names())
    elif not name.startswith("_") and name in _module_names():
        value = getattr(import_module(_module_names()[name]), name)
    elif not name.startswith("_") and (old := import_module("agentlightning.compat")).offered("agentlightning", name):
        value = old.look_up("agentlightning", name)
    else:
        # With these two arguments Python adds the name that may have been meant.
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    globals()[name] = value  # the next use does not come by here
    return value


class _PathsOf03:
    """Lets scripts of agentlightning 0.3 import from the module paths that they know (``compat.py``)."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, _target: object = None) -> ModuleSpec | None:
        if not name.startswith("agentlightning.") or name == "agentlightning.compat":
            return None
        return import_module("agentlightning.compat").find_spec(name, path)


if not any(getattr(finder, "__name__", "") == "_PathsOf03" for finder in sys.meta_path):
    sys.meta_path.insert(0, _PathsOf03)


def __dir__() -> list[str]:
    return sorted({*globals(), *_module_names(), "__version__"})
