"""Algorithms: what decides which rollouts to run, and learns from what comes back."""

from agentlightning.algorithm.base import Algorithm, FunctionalAlgorithm, algo, with_llm_proxy, with_store
from agentlightning.algorithm.batches import batch_iter_over_dataset
from agentlightning.algorithm.fast import Baseline, FastAlgorithm
from agentlightning.algorithm.run import Run

__all__ = [
    "Algorithm",
    "Baseline",
    "FastAlgorithm",
    "FunctionalAlgorithm",
    "Run",
    "algo",
    "batch_iter_over_dataset",
    "with_llm_proxy",
    "with_store",
]
