"""Short names of components, for specs such as ``strategy="cs"`` and ``algorithm={"name": "grpo", …}``."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["AlgorithmRegistry", "ExecutionStrategyRegistry", "StoreRegistry", "TracerRegistry"]

ExecutionStrategyRegistry: Mapping[str, str] = {
    "shm": "agentlightning.execution.shared_memory.SharedMemoryExecutionStrategy",
    "cs": "agentlightning.execution.client_server.ClientServerExecutionStrategy",
}
"""How roles are run: ``shm`` as threads of one process, ``cs`` as processes on one or more machines."""

AlgorithmRegistry: Mapping[str, str] = {
    "baseline": "agentlightning.algorithm.fast.Baseline",
    "grpo": "agentlightning.algorithm.grpo.GRPO",
    "apo": "agentlightning.algorithm.apo.APO",
}

StoreRegistry: Mapping[str, str] = {
    "memory": "agentlightning.store.sqlite.store.InMemoryLightningStore",
    "sqlite": "agentlightning.store.sqlite.store.SqliteLightningStore",
}

TracerRegistry: Mapping[str, str] = {
    "otel": "agentlightning.tracer.otel.OtelTracer",
    "dummy": "agentlightning.tracer.dummy.DummyTracer",
}
