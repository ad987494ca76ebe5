"""Rollouts, their attempts and workers, as the store keeps them and users see them; datasets, and the records of v0.1.

All times are seconds since the Unix epoch, as floats. Which state may follow which is
not said here but in `agentlightning.lifecycle`.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, SupportsIndex, TypeAlias, TypeVar, cast

from pydantic import BaseModel, Field, model_validator

from agentlightning.errors import InvalidValue
from agentlightning.types.spans import Span, SpanCoreFields

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

T_co = TypeVar("T_co", covariant=True)

TaskInput: TypeAlias = Any
"""What the agent is to work on. Any JSON value; its meaning is known to the agent and the algorithm only."""

RolloutStatus: TypeAlias = Literal["queuing", "preparing", "running", "failed", "succeeded", "cancelled", "requeuing"]
"""Where a rollout stands. `failed`, `succeeded` and `cancelled` are final."""

AttemptStatus: TypeAlias = Literal["preparing", "running", "failed", "succeeded", "unresponsive", "timeout"]
"""Where an attempt stands. `unresponsive`: nothing was heard of its worker for too long; `timeout`: it ran too long."""

AttemptEnd: TypeAlias = Literal["failed", "succeeded", "unresponsive", "timeout"]
"""The states in which an attempt does not hold its rollout any more."""

RolloutMode: TypeAlias = Literal["train", "val", "test"]
"""What the rollout is for. The runner picks the agent's training or validation method by it."""

_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _without_nulls(body: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Leave out the named keys of a body that are null: on creation a null means the default."""
    return {name: value for name, value in body.items() if value is not None or name not in names}


class RolloutConfig(BaseModel):
    """How long an attempt may take, and what is tried again.

    A null for `max_attempts` or `retry_condition` means the default.
    """

    timeout_seconds: _Seconds | None = None
    """An attempt that runs longer becomes `timeout`. `None`: no limit."""
    unresponsive_seconds: _Seconds | None = None
    """An attempt that is silent for longer becomes `unresponsive`. `None`: it may be silent for ever."""
    max_attempts: int = Field(default=1, ge=1, le=1000)
    """How many attempts there may be in all, the first one included."""
    retry_condition: list[AttemptStatus] = Field(default_factory=list[AttemptStatus])
    """Attempts that end in one of these are followed by another, up to `max_attempts`.

    Only `failed`, `timeout` and `unresponsive` have an effect; the others are taken and ignored.
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        if self.max_attempts > 1 and "retry_condition" not in fields:
            warnings.warn(
                f"RolloutConfig(max_attempts={self.max_attempts}) retries nothing by itself, because retry_condition "
                'is empty. Add retry_condition=["failed", "timeout", "unresponsive"], or those of them that shall be '
                "tried again; give [] if only AttemptFailed(retry=True) is to be tried again",
                stacklevel=2,
            )

    # Pydantic then calls this method only where somebody constructs one, not for what is read from JSON.
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]

    @model_validator(mode="before")
    @classmethod
    def _nulls_mean_defaults(cls, body: Any) -> Any:
        if isinstance(body, dict):  # every rollout that is read comes by here, so without a null nothing is called
            given = cast("dict[str, Any]", body)
            if given.get("max_attempts", 0) is None or given.get("retry_condition", 0) is None:
                return _without_nulls(given, ("max_attempts", "retry_condition"))
        return cast("Any", body)


class Attempt(BaseModel):
    """One execution of a rollout. A retry is a new attempt."""

    rollout_id: str
    attempt_id: str
    sequence_id: int
    """1 for the first attempt of the rollout, then 2, 3 and so on. An attempt with a lower one is stale."""
    start_time: float
    end_time: float | None = None
    status: AttemptStatus = "preparing"
    worker_id: str | None = None
    last_heartbeat_time: float | None = None
    """When the attempt was last heard of: by a span, or by an update. `None`: not yet."""
    metadata: dict[str, Any] | None = None
    reason_code: str | None = None
    """Why the attempt ended as it did, for programs: `worker_lost`, `unconfirmed`, `cancelled` and so on."""
    reason_message: str | None = None
    """The same for people."""


class Rollout(BaseModel):
    """One unit of work: an agent's run on one input."""

    rollout_id: str
    input: TaskInput
    start_time: float
    """When it was enqueued, or started if it never was in the queue."""
    end_time: float | None = None
    """When it reached its final status. `None` until then."""
    mode: RolloutMode | None = None
    resources_id: str | None = None
    """The resources the agent is to use. `None`: there were none when the rollout was created."""
    resources_version: int | None = None
    """The version of `resources_id` that was current at creation. The rollout keeps it for life."""
    priority: int = 0
    """Higher ones are claimed first; among equals, those enqueued first."""
    status: RolloutStatus = "queuing"
    config: RolloutConfig = Field(default_factory=RolloutConfig)
    metadata: dict[str, Any] | None = None
    reason_code: str | None = None
    """Why the rollout ended as it did, for programs: `poison`, `cancelled` and so on."""
    reason_message: str | None = None
    """The same for people."""


class AttemptedRollout(Rollout):
    """A rollout together with one of its attempts, as a claim hands it out."""

    attempt: Attempt

    @model_validator(mode="after")
    def _check_at_construction(self) -> AttemptedRollout:
        return self.check_consistency()  # which a decorator would make a descriptor that type checkers cannot call

    def check_consistency(self) -> AttemptedRollout:
        """Return self if the attempt belongs to this rollout.

        Raises:
            InvalidValue: It belongs to another. Construction wraps it into pydantic's `ValidationError`.
        """
        if self.attempt.rollout_id != self.rollout_id:
            raise InvalidValue(
                f"attempt {self.attempt.attempt_id!r} belongs to rollout {self.attempt.rollout_id!r}, "
                f"not to {self.rollout_id!r}; pass an attempt of the same rollout"
            )
        return self


class FinishedAttempt(BaseModel):
    """What `LightningStore.finish_attempt` did: it stored spans, ended an attempt, and claimed the next rollouts."""

    attempt: Attempt
    """The attempt as it ended."""
    sequence_ids: list[int]
    """The sequence id of each span of the call, in its order; 0: the store had this span before."""
    claimed: list[AttemptedRollout]
    """The rollouts that were claimed; empty if none was asked for, or there was none."""


class EnqueueRolloutRequest(BaseModel):
    """What a caller says of a rollout that is to be created.

    A null means the default, for every field but `input`.
    """

    input: TaskInput
    mode: RolloutMode | None = None
    resources_id: str | None = None
    """`None`: the latest resources at the time of the call."""
    config: RolloutConfig | None = None
    """`None`: a `RolloutConfig()`."""
    metadata: dict[str, Any] | None = None
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    """Higher ones are claimed first. A signed 32-bit number."""
    rollout_id: str | None = None
    """The id the rollout shall have, which makes the call repeatable. `None`: the store issues one."""

    @model_validator(mode="before")
    @classmethod
    def _nulls_mean_defaults(cls, body: Any) -> Any:
        if isinstance(body, dict):
            given = cast("dict[str, Any]", body)
            return given if given.get("priority", 0) is not None else _without_nulls(given, ("priority",))
        return body


# --- Workers: runner processes as the store sees them ---

WorkerStatus: TypeAlias = Literal["idle", "busy", "unknown"]
"""`busy`: it holds an attempt; `unknown`: it was never heard of, or not for too long."""

WorkerDirective: TypeAlias = Literal["drain", "stop"]
"""`drain`: finish what you hold, take nothing new, then end; `stop`: give up what you hold, then end."""


class Worker(BaseModel):
    """A runner process as the store sees it. Times are seconds since the Unix epoch, `None` where it never happened."""

    worker_id: str
    status: WorkerStatus = "unknown"
    heartbeat_stats: dict[str, Any] | None = None
    """What the worker last said of itself (load, memory, and so on). Any JSON object."""
    last_heartbeat_time: float | None = None
    last_dequeue_time: float | None = None
    """When it last claimed a rollout and got one."""
    last_busy_time: float | None = None
    """When it last became `busy`."""
    last_idle_time: float | None = None
    """When it last became `idle`, or, while it is, claimed and got nothing; exact to a minute."""
    current_rollout_id: str | None = None
    current_attempt_id: str | None = None
    stale_attempt_ids: list[str] | None = None
    """The attempts the worker listed in its heartbeat that it no longer holds: stop working on them.

    Only in the reply to a heartbeat; `None` everywhere else.
    """
    lease_seconds: float | None = None
    """For how long the store counts the worker as alive after a heartbeat."""
    registration: dict[str, Any] | None = None
    """What the worker said of itself when it began: host, process, versions, labels. Any JSON object."""
    directive: WorkerDirective | None = None
    """What the worker has been asked to do; a worker that begins anew is free of it."""
    reason_code: str | None = None
    """Why it is `unknown`, for programs: `worker_left` (it has ended in order), `worker_lost` and so on."""
    reason_message: str | None = None
    """The same for people."""


# --- What agents return, datasets, and records of the first interface (v0.1) ---


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
