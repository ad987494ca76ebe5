"""The bodies, queries and replies of the wire that are not records of ``agentlightning.types`` themselves.

Their fields have the names of the arguments of the contract. A field that is absent was not given; it is
left to the contract's own default, which is not what null means. Unknown fields are passed over, because
clients of other versions may send more. Numbers are strict: no text and no boolean counts as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, FailFast, Field, StrictFloat, StrictInt

from agentlightning.types import (
    AttemptEnd,
    AttemptStatus,
    EnqueueRolloutRequest,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    Span,
    TaskInput,
    WorkerDirective,
    WorkerStatus,
)


def _nothing() -> Any:
    """Stands where nothing was given; never looked at, and so not shown in the schema."""
    return None


_ABSENT: Any = Field(default_factory=_nothing)
_FIRST = FailFast()
"""Of ten thousand items that are all wrong, the first is told: telling all takes seconds."""
_Logic = Literal["and", "or"]
_Order = Literal["asc", "desc"]
_Limit = Annotated[StrictInt, Field(description="At least 1; -1 means all.")]
_Offset = Annotated[StrictInt, Field(description="Rows to pass over.")]

# --- Rollouts and attempts -----------------------------------------------------------------------


class EnqueueBody(BaseModel):
    """Rollouts to be put into the queue, all or none."""

    rollouts: Annotated[list[EnqueueRolloutRequest], _FIRST]


class StartRolloutBody(EnqueueRolloutRequest):
    """A rollout to be started past the queue."""

    worker_id: str | None = None
    attempt_id: str | None = None


class ClaimBody(BaseModel):
    """How many rollouts a worker wants, and how long it waits for the first."""

    limit: StrictInt = 1
    worker_id: str | None = None
    request_id: str | None = None
    wait_seconds: StrictFloat = 0.0


class StartAttemptBody(BaseModel):
    """Who makes a new attempt."""

    worker_id: str | None = None
    attempt_id: str | None = None


class UpdateRolloutBody(BaseModel):
    """What is to change of a rollout."""

    input: TaskInput = _ABSENT
    mode: RolloutMode | None = _ABSENT
    resources_id: str | None = _ABSENT
    status: RolloutStatus = _ABSENT
    config: RolloutConfig = _ABSENT
    metadata: dict[str, Any] | None = _ABSENT
    reason_code: str | None = None
    reason_message: str | None = None


class CancelBody(BaseModel):
    """Why a rollout is cancelled."""

    message: str | None = None


class UpdateAttemptBody(BaseModel):
    """What a worker reports of its attempt."""

    status: AttemptStatus = _ABSENT
    worker_id: str = _ABSENT
    last_heartbeat_time: StrictFloat = _ABSENT
    metadata: dict[str, Any] | None = _ABSENT
    reason_code: str | None = None
    reason_message: str | None = None


class FinishAttemptBody(BaseModel):
    """How an attempt ended, its last spans, and how many rollouts its worker wants next."""

    status: AttemptEnd
    spans: Annotated[list[Span], _FIRST] = _ABSENT
    metadata: dict[str, Any] | None = _ABSENT
    reason_code: str | None = None
    reason_message: str | None = None
    claim_limit: StrictInt = 0
    worker_id: str | None = None
    request_id: str | None = None


class RolloutsQuery(BaseModel):
    """Which rollouts."""

    status_in: Annotated[list[RolloutStatus] | None, _FIRST] = None
    rollout_id_in: Annotated[list[str] | None, _FIRST] = None
    rollout_id_contains: str | None = None
    filter_logic: _Logic = "and"
    sort_by: str | None = None
    sort_order: _Order = "asc"
    limit: _Limit = -1
    offset: _Offset = 0


class AttemptsQuery(BaseModel):
    """Which attempts of a rollout."""

    sort_by: str | None = "sequence_id"
    sort_order: _Order = "asc"
    limit: _Limit = -1
    offset: _Offset = 0


class WaitBody(BaseModel):
    """Rollouts to be waited for, and for how many seconds; null: as long as it takes."""

    rollout_ids: Annotated[list[str], _FIRST]
    timeout: StrictFloat | None = None


class DeleteQuery(BaseModel):
    """Which finished rollouts to delete."""

    older_than_seconds: float = Field(ge=0, allow_inf_nan=False)


class Deleted(BaseModel):
    """How many rollouts were deleted."""

    deleted: int


# --- Spans ---------------------------------------------------------------------------------------


class SpansBody(BaseModel):
    """Spans to be stored, all or none."""

    spans: Annotated[list[Span], _FIRST]


class AttemptIds(BaseModel):
    """The attempt a span belongs to."""

    rollout_id: str
    attempt_id: str


class AttemptIdsBody(BaseModel):
    """The attempts that get one span sequence id each."""

    rollout_attempt_ids: Annotated[list[Annotated[list[str], Field(min_length=2, max_length=2)]], _FIRST] = Field(
        description="Pairs of a rollout id and an attempt id."
    )


class SequenceId(BaseModel):
    """The span sequence id that was issued."""

    sequence_id: int


class SequenceIds(BaseModel):
    """One span sequence id for each item of the request, in its order; 0: this span was stored before."""

    sequence_ids: list[int]


class SpansQuery(BaseModel):
    """Which spans of a rollout."""

    rollout_id: str
    attempt_id: str | None = Field(default=None, description="An attempt, or `latest`.")
    trace_id: str | None = None
    trace_id_contains: str | None = None
    span_id: str | None = None
    span_id_contains: str | None = None
    parent_id: str | None = None
    parent_id_contains: str | None = None
    name: str | None = None
    name_contains: str | None = None
    filter_logic: _Logic = "and"
    limit: _Limit = -1
    offset: _Offset = 0
    sort_by: str | None = "sequence_id"
    sort_order: _Order = "asc"


# --- Resources -----------------------------------------------------------------------------------


class NewResourcesQuery(BaseModel):
    """The id of new resources."""

    resources_id: str | None = Field(default=None, description="Makes the call repeatable.")


class ResourcesUpdateQuery(BaseModel):
    """The request that makes a version."""

    request_id: str | None = Field(default=None, description="Makes the call repeatable.")


class RollbackBody(BaseModel):
    """The version whose content is wanted again."""

    version: StrictInt
    request_id: str | None = None


class ResourcesByIdQuery(BaseModel):
    """Which version; absent: the newest."""

    version: StrictInt | None = None


class ResourcesQuery(BaseModel):
    """Which resources."""

    resources_id: str | None = None
    resources_id_contains: str | None = None
    sort_by: str | None = None
    sort_order: _Order = "asc"
    limit: _Limit = -1
    offset: _Offset = 0


class VersionsQuery(BaseModel):
    """Which versions of resources."""

    sort_order: _Order = "asc"
    limit: _Limit = -1
    offset: _Offset = 0


# --- Workers -------------------------------------------------------------------------------------


class UpdateWorkerBody(BaseModel):
    """A worker's heartbeat."""

    heartbeat_stats: dict[str, Any] = _ABSENT
    attempt_ids: Annotated[list[str], _FIRST] = _ABSENT
    lease_seconds: StrictFloat = _ABSENT
    registration: dict[str, Any] = _ABSENT


class LostBody(BaseModel):
    """How a worker died."""

    message: str
    reason_code: str | None = None


class DirectBody(BaseModel):
    """What workers are asked to do; null takes it back."""

    directive: WorkerDirective | None
    worker_ids: Annotated[list[str] | None, _FIRST] = None


class WorkersQuery(BaseModel):
    """Which workers."""

    status_in: Annotated[list[WorkerStatus] | None, _FIRST] = None
    worker_id_contains: str | None = None
    filter_logic: _Logic = "and"
    sort_by: str | None = None
    sort_order: _Order = "asc"
    limit: _Limit = -1
    offset: _Offset = 0


# --- The server itself ---------------------------------------------------------------------------


class Health(BaseModel):
    """The server answers."""

    status: Literal["ok"]


class Readiness(BaseModel):
    """Whether the server takes requests, and why not."""

    status: Literal["ready", "draining", "unavailable"]
    detail: str | None = None


class Problem(BaseModel):
    """Why a request was refused (RFC 9457)."""

    type: Literal["about:blank"] = "about:blank"
    title: str
    status: int
    code: str
    """Stable, for programs: the code of the exception that the same call raises in Python."""
    detail: str
    request_id: str
    errors: Sequence[dict[str, Any]] | None = None
    """Where the body or the query is not as it should be."""
