"""Records of the first interface (v0.1), what an agent may return, and what a dataset is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex, TypeAlias, TypeVar

from pydantic import BaseModel, Field

from agentlightning.types.rollouts import RolloutMode, TaskInput
from agentlightning.types.spans import Span, SpanCoreFields

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

T_co = TypeVar("T_co", covariant=True)


class Triplet(BaseModel):
    """One model call of an agent, as a training example."""

    prompt: Any
    response: Any

    reward: float | None = None
    """What the call was worth. `None`: no reward is known, which is not a reward of 0."""

    metadata: dict[str, Any] = Field(default_factory=dict[str, Any])


class Task(BaseModel):
    """A unit of work of the v0.1 server. Times are seconds since the Unix epoch."""

    rollout_id: str
    input: TaskInput
    mode: RolloutMode | None = None
    resources_id: str | None = None
    create_time: float | None = None

    last_claim_time: float | None = None
    """When a client last took it."""

    num_claims: int | None = None
    """How many times a client took it."""

    metadata: dict[str, Any] = Field(default_factory=dict[str, Any])


class TaskIfAny(BaseModel):
    """The v0.1 server's reply to a client that asks for work."""

    is_available: bool

    task: Task | None = None
    """Present when `is_available`."""


class RolloutLegacy(BaseModel):
    """What a v0.1 client reports of a task it has worked on."""

    rollout_id: str
    task: Task | None = None

    final_reward: float | None = None
    """`None`: no reward is known, which is not a reward of 0."""

    triplets: list[Triplet] | None = None

    trace: list[dict[str, Any]] | None = None
    """The spans, as JSON objects."""

    logs: list[str] | None = None
    metadata: dict[str, Any] = Field(default_factory=dict[str, Any])


class GenericResponse(BaseModel):
    """The v0.1 server's reply to everything that has no reply of its own."""

    status: str = "success"
    message: str | None = None
    data: dict[str, Any] | None = None


# Quoted, and so left unresolved when the program runs: importing OpenTelemetry takes longer than the rest of us.
RolloutRawResult: TypeAlias = float | list["ReadableSpan"] | list[Span] | list[SpanCoreFields] | None
"""What an agent may return: nothing, its final reward, or the spans of its run."""

RolloutRawResultLegacy: TypeAlias = (
    float | list[Triplet] | list[dict[str, Any]] | list["ReadableSpan"] | RolloutLegacy | None
)
"""What an agent written for v0.1 may return."""


class Dataset(Protocol[T_co]):
    """Inputs of rollouts, by position: a list is one, and so are the datasets of the usual libraries."""

    def __getitem__(self, index: SupportsIndex, /) -> T_co:
        """Return the input at `index`, which is at least 0 and less than the length."""
        ...

    def __len__(self) -> int:
        """Return how many inputs there are."""
        ...


# --- What is set up once, then once more in each worker process, and taken down in the opposite ---


class ParallelWorkerBase:
    """The life of a component that works in several processes.

    ``init`` in the process that makes it, ``init_worker`` in each that uses it (it may be the same), ``run``,
    then ``teardown_worker`` and ``teardown``. Both ends may be called again and then do nothing new.
    """

    worker_id: int | None = None
    """The index of the worker that this one was set up in; None outside of any."""

    def __init__(self) -> None:
        """Only assigns; everything that takes time or a thread happens in ``init`` and ``init_worker``."""
        self.worker_id = None

    def init(self, *args: Any, **kwargs: Any) -> None:
        """Set up what all workers share."""

    def init_worker(self, worker_id: int, *args: Any, **kwargs: Any) -> None:
        """Set up what one worker needs. ``worker_id`` counts the workers from 0."""
        self.worker_id = worker_id

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Do the work; what it is, subclasses say."""

    def teardown_worker(self, worker_id: int, *args: Any, **kwargs: Any) -> None:
        """Release what ``init_worker`` took."""
        self.worker_id = None

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Release what ``init`` took."""
