"""Where a new interpreter of a run begins: as a child (``spawn``), or as the nursery (``spawn``, ``forkserver``).

Run as ``python -m agentlightning.execution.launcher_main LETTER``: the number of an open file that says what to be.
"""

from __future__ import annotations

import importlib
import logging
import pickle
import sys
from multiprocessing.connection import Connection

from agentlightning.execution.child import Lines, live
from agentlightning.execution.launcher_process import Nursery, Payload, StartMethod, serve
from agentlightning.execution.messages import Start
from agentlightning.execution.process_tree import Cgroup

PRELOADED = (
    "agentlightning.execution.jobs",
    "agentlightning.runner.agent",
    "agentlightning.tracer.otel",
)
"""What runners need and a forkserver loads once, for all. None of it starts a thread."""


def main() -> None:
    """Read the letter, and be what it says."""
    with open(int(sys.argv[1]), "rb") as letter:
        letter.seek(0)
        content = pickle.load(letter)
    if isinstance(content[0], int):
        _be_nursery(*content)
    else:
        _be_child(*content)


def _be_child(start: Start, lines: Lines, nursery: int, path: list[str], packed: bytes) -> None:
    sys.path[:] = path
    live(start, lambda: Payload(packed=packed).load(start.job), lines, nursery)


def _be_nursery(
    connection: int,
    supervisor: int,
    path: list[str],
    packed: dict[str, bytes],
    method: StartMethod,
    mark: str,
    cgroup: Cgroup | None,
) -> None:
    sys.path[:] = path
    if method == "forkserver":
        for module in PRELOADED:
            try:
                importlib.import_module(module)
            except ImportError as error:
                logging.getLogger(__name__).debug("%s is not preloaded: %s", module, error)
    jobs = {name: Payload(packed=each) for name, each in packed.items()}
    serve(lambda: Nursery(Connection(connection), jobs, method, mark, supervisor, cgroup))


if __name__ == "__main__":
    main()
