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
from typing import Any


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
    else:
        # With these two Python adds the name that may have been meant.
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    globals()[name] = value  # the next use does not come by here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_module_names(), "__version__"})
