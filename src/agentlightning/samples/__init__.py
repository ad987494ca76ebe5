"""Exact training data: the model calls of attempts as token sequences, of which every sampled token is trained once."""

from agentlightning.samples.graph import SampleSet, build_samples
from agentlightning.samples.sample import Sample, Turn

__all__ = ["Sample", "SampleSet", "Turn", "build_samples"]
