"""The algorithm's side of a run, made without a Trainer."""

from __future__ import annotations

import agentlightning as agl
from agentlightning.algorithm.run import Run
from agentlightning.trainer.roles import AlgorithmRole


def algorithm_role(algorithm: agl.Algorithm, *, run: Run | None = None, linger_seconds: float = 0.0) -> AlgorithmRole:
    """The role of an algorithm that needs neither datasets nor a model."""
    return AlgorithmRole(
        algorithm=algorithm,
        adapter=agl.TracerTraceToTriplet(),
        llm_proxy=None,
        initial_resources=None,
        rollout_config=agl.RolloutConfig(),
        run=run,
        train_dataset=None,
        val_dataset=None,
        progress="off",
        linger_seconds=linger_seconds,
    )
