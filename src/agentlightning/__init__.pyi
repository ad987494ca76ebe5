"""Types of the public names; ``__init__.py`` reads which module defines each name from this file."""

from agentlightning.adapter.adapters import (
    Adapted as Adapted,
    Adapter as Adapter,
    LlmProxyTraceToTriplet as LlmProxyTraceToTriplet,
    OpenAIMessages as OpenAIMessages,
    OtelTraceAdapter as OtelTraceAdapter,
    TraceAdapter as TraceAdapter,
    TracerTraceToTriplet as TracerTraceToTriplet,
    TraceToMessages as TraceToMessages,
    TraceToTripletBase as TraceToTripletBase,
    UnusableSpan as UnusableSpan,
)
from agentlightning.adapter.calls import (
    Conversation as Conversation,
    ModelCall as ModelCall,
)
from agentlightning.adapter.filters import CallFilter as CallFilter
from agentlightning.adapter.tree import (
    RewardMatchPolicy as RewardMatchPolicy,
    TraceTree as TraceTree,
)
from agentlightning.algorithm.apo import APO as APO
from agentlightning.algorithm.base import (
    Algorithm as Algorithm,
    FunctionalAlgorithm as FunctionalAlgorithm,
    algo as algo,
    with_llm_proxy as with_llm_proxy,
    with_store as with_store,
)
from agentlightning.algorithm.batches import batch_iter_over_dataset as batch_iter_over_dataset
from agentlightning.algorithm.fast import (
    Baseline as Baseline,
    FastAlgorithm as FastAlgorithm,
)
from agentlightning.algorithm.grpo import (
    GRPO as GRPO,
)
from agentlightning.algorithm.policy import (
    Policy as Policy,
    PolicyBatch as PolicyBatch,
    PolicyUpdate as PolicyUpdate,
    SampledCall as SampledCall,
)
from agentlightning.algorithm.run import (
    Run as Run,
)
from agentlightning.demo.policy_endpoint import PolicyEndpoint as PolicyEndpoint
from agentlightning.demo.softmax_policy import SoftmaxPolicy as SoftmaxPolicy
from agentlightning.emitter.annotation import (
    OperationContext as OperationContext,
    RewardDimension as RewardDimension,
    emit_annotation as emit_annotation,
    emit_reward as emit_reward,
    operation as operation,
    reward as reward,
)
from agentlightning.emitter.emit import (
    emit_exception as emit_exception,
    emit_message as emit_message,
    emit_object as emit_object,
    encode_object as encode_object,
    extract_links_from_attributes as extract_links_from_attributes,
    extract_tags_from_attributes as extract_tags_from_attributes,
    get_message_value as get_message_value,
    get_object_value as get_object_value,
    make_link_attributes as make_link_attributes,
    make_tag_attributes as make_tag_attributes,
    query_linked_spans as query_linked_spans,
)
from agentlightning.errors import (
    AgentLightningError as AgentLightningError,
    BadRequest as BadRequest,
    Conflict as Conflict,
    CorruptStore as CorruptStore,
    DiskFull as DiskFull,
    ExecutionFailed as ExecutionFailed,
    ForeignFile as ForeignFile,
    IdReused as IdReused,
    IllegalMove as IllegalMove,
    InvalidId as InvalidId,
    InvalidValue as InvalidValue,
    MissingExtra as MissingExtra,
    NewerSchema as NewerSchema,
    NoSuchRoute as NoSuchRoute,
    NotAllowed as NotAllowed,
    NotAuthenticated as NotAuthenticated,
    NotFound as NotFound,
    NothingToLearn as NothingToLearn,
    NotJson as NotJson,
    Overloaded as Overloaded,
    SpoolFull as SpoolFull,
    StaleAttempt as StaleAttempt,
    StoreClosed as StoreClosed,
    StoreForked as StoreForked,
    StoreOwned as StoreOwned,
    StoreStopped as StoreStopped,
    StoreUnavailable as StoreUnavailable,
    StoreUnreachable as StoreUnreachable,
    TemplateOutOfBounds as TemplateOutOfBounds,
    TooLarge as TooLarge,
    UnsupportedMedia as UnsupportedMedia,
    WrongServer as WrongServer,
)
from agentlightning.execution.abort import Interrupted as Interrupted
from agentlightning.execution.base import (
    AlgorithmBundle as AlgorithmBundle,
    ExecutionEvent as ExecutionEvent,
    ExecutionStrategy as ExecutionStrategy,
    MultiprocessingEvent as MultiprocessingEvent,
    RunnerBundle as RunnerBundle,
    ThreadingEvent as ThreadingEvent,
)
from agentlightning.execution.client_server import (
    ClientServerExecutionStrategy as ClientServerExecutionStrategy,
)
from agentlightning.execution.quotas import Quotas as Quotas
from agentlightning.execution.restarts import RestartPolicy as RestartPolicy
from agentlightning.execution.shared_memory import (
    SharedMemoryExecutionStrategy as SharedMemoryExecutionStrategy,
)
from agentlightning.http.client.client import LightningStoreClient as LightningStoreClient
from agentlightning.http.client.health import HealthReport as HealthReport
from agentlightning.http.client.metrics import ClientMetrics as ClientMetrics
from agentlightning.http.client.retry import Resilience as Resilience
from agentlightning.http.server.limits import ServerLimits as ServerLimits
from agentlightning.http.server.server import LightningStoreServer as LightningStoreServer
from agentlightning.legacy import (
    AgentLightningClient as AgentLightningClient,
    AgentLightningServer as AgentLightningServer,
    DevTaskLoader as DevTaskLoader,
)
from agentlightning.litagent.litagent import (
    AttemptFailed as AttemptFailed,
    FunctionalLitAgent as FunctionalLitAgent,
    Hook as Hook,
    LitAgent as LitAgent,
    is_v0_1_rollout_api as is_v0_1_rollout_api,
    llm_rollout as llm_rollout,
    prompt_rollout as prompt_rollout,
    rollout as rollout,
)
from agentlightning.proxy import (
    LLMProxy as LLMProxy,
    ModelConfig as ModelConfig,
    get_active_llm_proxy as get_active_llm_proxy,
    set_active_llm_proxy as set_active_llm_proxy,
)
from agentlightning.runner.agent import LitAgentRunner as LitAgentRunner
from agentlightning.runner.base import Runner as Runner
from agentlightning.runner.program import ProgramAgent as ProgramAgent
from agentlightning.samples.graph import (
    SampleSet as SampleSet,
    build_samples as build_samples,
)
from agentlightning.samples.sample import (
    Sample as Sample,
    Turn as Turn,
)
from agentlightning.semconv import (
    AGL_ANNOTATION as AGL_ANNOTATION,
    AGL_EXCEPTION as AGL_EXCEPTION,
    AGL_MESSAGE as AGL_MESSAGE,
    AGL_OBJECT as AGL_OBJECT,
    AGL_OPERATION as AGL_OPERATION,
    AGL_REWARD as AGL_REWARD,
    AGL_VIRTUAL as AGL_VIRTUAL,
    GenAIAttributes as GenAIAttributes,
    LightningResourceAttributes as LightningResourceAttributes,
    LightningSpanAttributes as LightningSpanAttributes,
    LinkAttributes as LinkAttributes,
    LinkPydanticModel as LinkPydanticModel,
    LLMCallAttributes as LLMCallAttributes,
    RewardAttributes as RewardAttributes,
    RewardPydanticModel as RewardPydanticModel,
)
from agentlightning.settings import (
    LightningEnvVar as LightningEnvVar,
    resolve_bool_env_var as resolve_bool_env_var,
    resolve_int_env_var as resolve_int_env_var,
    resolve_str_env_var as resolve_str_env_var,
)
from agentlightning.store.base import (
    LightningStore as LightningStore,
    LightningStoreCapabilities as LightningStoreCapabilities,
    LightningStoreStatistics as LightningStoreStatistics,
    StoreHost as StoreHost,
    is_finished as is_finished,
    is_queuing as is_queuing,
    is_running as is_running,
)
from agentlightning.store.sqlite.store import (
    InMemoryLightningStore as InMemoryLightningStore,
    LightningStoreThreaded as LightningStoreThreaded,
    ReadOnlySqliteStore as ReadOnlySqliteStore,
    SqliteLightningStore as SqliteLightningStore,
)
from agentlightning.telemetry.logs import (
    setup_logging as setup_logging,
)
from agentlightning.tracer.base import (
    DummyTracer as DummyTracer,
    Tracer as Tracer,
    clear_active_tracer as clear_active_tracer,
    get_active_tracer as get_active_tracer,
    set_active_tracer as set_active_tracer,
)
from agentlightning.tracer.otel import OtelTracer as OtelTracer
from agentlightning.tracer.processor import LightningSpanProcessor as LightningSpanProcessor
from agentlightning.trainer.trainer import Trainer as Trainer
from agentlightning.types import (
    LLM as LLM,
    UNSET as UNSET,
    Attempt as Attempt,
    AttemptedRollout as AttemptedRollout,
    AttemptEnd as AttemptEnd,
    AttemptStatus as AttemptStatus,
    Attributes as Attributes,
    AttributeValue as AttributeValue,
    Dataset as Dataset,
    EnqueueRolloutRequest as EnqueueRolloutRequest,
    Event as Event,
    FilterField as FilterField,
    FilterOptions as FilterOptions,
    FinishedAttempt as FinishedAttempt,
    GenericResponse as GenericResponse,
    Link as Link,
    NamedResources as NamedResources,
    OtelResource as OtelResource,
    PaginatedResult as PaginatedResult,
    PromptTemplate as PromptTemplate,
    ProxyLLM as ProxyLLM,
    Resource as Resource,
    ResourcesUpdate as ResourcesUpdate,
    ResourceUnion as ResourceUnion,
    Rollout as Rollout,
    RolloutConfig as RolloutConfig,
    RolloutLegacy as RolloutLegacy,
    RolloutMode as RolloutMode,
    RolloutRawResult as RolloutRawResult,
    RolloutRawResultLegacy as RolloutRawResultLegacy,
    RolloutStatus as RolloutStatus,
    SortOptions as SortOptions,
    Span as Span,
    SpanAttributeNames as SpanAttributeNames,
    SpanContext as SpanContext,
    SpanCoreFields as SpanCoreFields,
    SpanLike as SpanLike,
    SpanNames as SpanNames,
    SpanRecordingContext as SpanRecordingContext,
    StatusCode as StatusCode,
    Task as Task,
    TaskIfAny as TaskIfAny,
    TaskInput as TaskInput,
    TemplateBounds as TemplateBounds,
    TraceState as TraceState,
    TraceStatus as TraceStatus,
    Triplet as Triplet,
    Unset as Unset,
    VerificationReport as VerificationReport,
    Violation as Violation,
    Worker as Worker,
    WorkerDirective as WorkerDirective,
    WorkerStatus as WorkerStatus,
    convert_timestamp as convert_timestamp,
    extract_extra_fields as extract_extra_fields,
)
from agentlightning.types.attempt_spans import used_default_resources as used_default_resources
from agentlightning.types.rewards import (
    find_final_reward as find_final_reward,
    find_reward_spans as find_reward_spans,
    get_reward_value as get_reward_value,
    get_rewards_from_span as get_rewards_from_span,
    is_reward_span as is_reward_span,
)
from agentlightning.types.rollouts import ParallelWorkerBase as ParallelWorkerBase

__all__: list[str]

__version__: str
"""The installed version of the package."""
