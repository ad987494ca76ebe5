"""What a run is bound to: its algorithm, its agent and its datasets, as people know them.

Their code may change while a run goes on (a mistake in an agent is corrected), so names stand for it. Datasets are
known by their length and some of their rows.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from agentlightning.algorithm.batches import reads_by_position
from agentlightning.store.validation import canonical, encode_json

_ROWS = 64
"""Rows that are part of a fingerprint: the first, the last, and some between."""


def identity_of(algorithm: object, agent: object, **datasets: Any) -> dict[str, str]:
    """What identifies a run.

    Args:
        algorithm, agent: objects; a function stands for what was made of it.
        datasets: by name; their rows are strict JSON.
    """
    told = {"algorithm": _name_of(algorithm), "agent": _name_of(agent)}
    return told | {name: _fingerprint(dataset) for name, dataset in datasets.items()}


def origin_of_this_process() -> dict[str, Any]:
    """How to begin this process again: its command, if it is no notebook's, and its folder."""
    command = [] if "ipykernel" in sys.modules else sys.orig_argv
    return {"command": command, "folder": str(Path.cwd())}


def _name_of(thing: object) -> str:
    """``module.name`` of a class or function. A script has the name of its file, run or imported."""
    named: Any = getattr(thing, "__wrapped__", type(thing))
    module = named.__module__
    if module == "__main__":
        module = Path(getattr(sys.modules["__main__"], "__file__", None) or "__main__").stem
    return f"{module}.{named.__qualname__}"


def _fingerprint(dataset: Any) -> str:
    if dataset is None:
        return "none"
    if not reads_by_position(dataset):
        return f"a {type(dataset).__name__}"
    size = len(dataset)
    digest = hashlib.sha256()
    for index in sorted({place * (size - 1) // (_ROWS - 1) for place in range(_ROWS)} if size else ()):
        digest.update(canonical(encode_json(dataset[index], "a row")) + b"\n")
    return f"of {size:,} rows, {digest.hexdigest()[:12]}"
