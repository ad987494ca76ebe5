"""Agent Lightning: train agents that run anywhere.

``import agentlightning as agl`` and use the names from here. Importing is quick because nothing is
loaded until it is used (PEP 562): the first use of a name loads the module that defines it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentlightning.adapter.base import (
        Adapter as Adapter,
        OtelTraceAdapter as OtelTraceAdapter,
        TraceAdapter as TraceAdapter,
    )
    from agentlightning.adapter.messages import (
        OpenAIMessages as OpenAIMessages,
        TraceToMessages as TraceToMessages,
    )
    from agentlightning.adapter.tree import (
        RewardMatchPolicy as RewardMatchPolicy,
        TraceTree as TraceTree,
    )
    from agentlightning.adapter.triplet import (
        LlmProxyTraceToTriplet as LlmProxyTraceToTriplet,
        TracerTraceToTriplet as TracerTraceToTriplet,
        TraceToTripletBase as TraceToTripletBase,
    )
    from agentlightning.adapter.usable import (
        Adapted as Adapted,
        UnusableSpan as UnusableSpan,
    )
    from agentlightning.algorithm.apo import APO as APO
    from agentlightning.algorithm.base import (
        Algorithm as Algorithm,
    )
    from agentlightning.algorithm.batches import (
        batch_iter_over_dataset as batch_iter_over_dataset,
    )
    from agentlightning.algorithm.decorator import (
        FunctionalAlgorithm as FunctionalAlgorithm,
        algo as algo,
    )
    from agentlightning.algorithm.fast import (
        Baseline as Baseline,
        FastAlgorithm as FastAlgorithm,
    )
    from agentlightning.algorithm.grpo import (
        GRPO as GRPO,
    )
    from agentlightning.algorithm.policy_endpoint import (
        PolicyEndpoint as PolicyEndpoint,
    )
    from agentlightning.algorithm.policy_update import (
        PolicyUpdate as PolicyUpdate,
    )
    from agentlightning.algorithm.run import (
        Run as Run,
    )
    from agentlightning.algorithm.softmax_policy import (
        SoftmaxPolicy as SoftmaxPolicy,
    )
    from agentlightning.algorithm.wiring import (
        with_llm_proxy as with_llm_proxy,
        with_store as with_store,
    )
    from agentlightning.emitter.annotation import (
        OperationContext as OperationContext,
        emit_annotation as emit_annotation,
        operation as operation,
    )
    from agentlightning.emitter.exception import (
        emit_exception as emit_exception,
    )
    from agentlightning.emitter.links import (
        extract_links_from_attributes as extract_links_from_attributes,
        extract_tags_from_attributes as extract_tags_from_attributes,
        make_link_attributes as make_link_attributes,
        make_tag_attributes as make_tag_attributes,
        query_linked_spans as query_linked_spans,
    )
    from agentlightning.emitter.message import (
        emit_message as emit_message,
        get_message_value as get_message_value,
    )
    from agentlightning.emitter.object import (
        emit_object as emit_object,
        encode_object as encode_object,
        get_object_value as get_object_value,
    )
    from agentlightning.emitter.reward import (
        RewardDimension as RewardDimension,
        emit_reward as emit_reward,
        find_final_reward as find_final_reward,
        find_reward_spans as find_reward_spans,
        get_reward_value as get_reward_value,
        get_rewards_from_span as get_rewards_from_span,
        is_reward_span as is_reward_span,
        reward as reward,
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
        TooLarge as TooLarge,
        UnsupportedMedia as UnsupportedMedia,
        WrongServer as WrongServer,
    )
    from agentlightning.execution.base import (
        AlgorithmBundle as AlgorithmBundle,
        ExecutionStrategy as ExecutionStrategy,
        RunnerBundle as RunnerBundle,
    )
    from agentlightning.execution.client_server import (
        ClientServerExecutionStrategy as ClientServerExecutionStrategy,
    )
    from agentlightning.execution.events import (
        ExecutionEvent as ExecutionEvent,
        MultiprocessingEvent as MultiprocessingEvent,
        ThreadingEvent as ThreadingEvent,
    )
    from agentlightning.execution.interrupts import (
        Interrupted as Interrupted,
    )
    from agentlightning.execution.quotas import (
        Quotas as Quotas,
    )
    from agentlightning.execution.restarts import (
        RestartPolicy as RestartPolicy,
    )
    from agentlightning.execution.shared_memory import (
        SharedMemoryExecutionStrategy as SharedMemoryExecutionStrategy,
    )
    from agentlightning.legacy.client import (
        AgentLightningClient as AgentLightningClient,
        DevTaskLoader as DevTaskLoader,
    )
    from agentlightning.legacy.server import (
        AgentLightningServer as AgentLightningServer,
    )
    from agentlightning.litagent.decorator import (
        FunctionalLitAgent as FunctionalLitAgent,
        llm_rollout as llm_rollout,
        prompt_rollout as prompt_rollout,
        rollout as rollout,
    )
    from agentlightning.litagent.hooks import (
        Hook as Hook,
    )
    from agentlightning.litagent.litagent import (
        LitAgent as LitAgent,
        is_v0_1_rollout_api as is_v0_1_rollout_api,
    )
    from agentlightning.proxy import (
        LLMProxy as LLMProxy,
        ModelConfig as ModelConfig,
        get_active_llm_proxy as get_active_llm_proxy,
        set_active_llm_proxy as set_active_llm_proxy,
    )
    from agentlightning.runner.agent import (
        LitAgentRunner as LitAgentRunner,
    )
    from agentlightning.runner.base import (
        Runner as Runner,
    )
    from agentlightning.runner.program import (
        ProgramAgent as ProgramAgent,
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
    from agentlightning.store.client_server.client.client import (
        LightningStoreClient as LightningStoreClient,
    )
    from agentlightning.store.client_server.client.metrics import (
        ClientMetrics as ClientMetrics,
    )
    from agentlightning.store.client_server.resilience.health import (
        HealthReport as HealthReport,
    )
    from agentlightning.store.client_server.resilience.resilience import (
        Resilience as Resilience,
    )
    from agentlightning.store.client_server.server.limits import (
        ServerLimits as ServerLimits,
    )
    from agentlightning.store.client_server.server.server import (
        LightningStoreServer as LightningStoreServer,
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
    from agentlightning.tracer.active import (
        clear_active_tracer as clear_active_tracer,
        get_active_tracer as get_active_tracer,
        set_active_tracer as set_active_tracer,
    )
    from agentlightning.tracer.base import (
        Tracer as Tracer,
    )
    from agentlightning.tracer.dummy import (
        DummyTracer as DummyTracer,
    )
    from agentlightning.tracer.otel import (
        OtelTracer as OtelTracer,
    )
    from agentlightning.tracer.processor import (
        LightningSpanProcessor as LightningSpanProcessor,
    )
    from agentlightning.trainer.trainer import (
        Trainer as Trainer,
    )
    from agentlightning.types import (
        LLM as LLM,
        UNSET as UNSET,
        Attempt as Attempt,
        AttemptedRollout as AttemptedRollout,
        AttemptStatus as AttemptStatus,
        Attributes as Attributes,
        AttributeValue as AttributeValue,
        Dataset as Dataset,
        EnqueueRolloutRequest as EnqueueRolloutRequest,
        Event as Event,
        FilterField as FilterField,
        FilterOptions as FilterOptions,
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
    from agentlightning.types.parallel import (
        ParallelWorkerBase as ParallelWorkerBase,
    )

    __version__: str
    """The installed version of the package."""

_MODULE_NAMES = {
    "Adapter": "agentlightning.adapter.base",
    "OtelTraceAdapter": "agentlightning.adapter.base",
    "TraceAdapter": "agentlightning.adapter.base",
    "OpenAIMessages": "agentlightning.adapter.messages",
    "TraceToMessages": "agentlightning.adapter.messages",
    "RewardMatchPolicy": "agentlightning.adapter.tree",
    "TraceTree": "agentlightning.adapter.tree",
    "LlmProxyTraceToTriplet": "agentlightning.adapter.triplet",
    "TracerTraceToTriplet": "agentlightning.adapter.triplet",
    "TraceToTripletBase": "agentlightning.adapter.triplet",
    "Adapted": "agentlightning.adapter.usable",
    "UnusableSpan": "agentlightning.adapter.usable",
    "APO": "agentlightning.algorithm.apo",
    "Algorithm": "agentlightning.algorithm.base",
    "batch_iter_over_dataset": "agentlightning.algorithm.batches",
    "FunctionalAlgorithm": "agentlightning.algorithm.decorator",
    "algo": "agentlightning.algorithm.decorator",
    "Baseline": "agentlightning.algorithm.fast",
    "FastAlgorithm": "agentlightning.algorithm.fast",
    "GRPO": "agentlightning.algorithm.grpo",
    "PolicyEndpoint": "agentlightning.algorithm.policy_endpoint",
    "PolicyUpdate": "agentlightning.algorithm.policy_update",
    "Run": "agentlightning.algorithm.run",
    "SoftmaxPolicy": "agentlightning.algorithm.softmax_policy",
    "with_llm_proxy": "agentlightning.algorithm.wiring",
    "with_store": "agentlightning.algorithm.wiring",
    "OperationContext": "agentlightning.emitter.annotation",
    "emit_annotation": "agentlightning.emitter.annotation",
    "operation": "agentlightning.emitter.annotation",
    "emit_exception": "agentlightning.emitter.exception",
    "extract_links_from_attributes": "agentlightning.emitter.links",
    "extract_tags_from_attributes": "agentlightning.emitter.links",
    "make_link_attributes": "agentlightning.emitter.links",
    "make_tag_attributes": "agentlightning.emitter.links",
    "query_linked_spans": "agentlightning.emitter.links",
    "emit_message": "agentlightning.emitter.message",
    "get_message_value": "agentlightning.emitter.message",
    "emit_object": "agentlightning.emitter.object",
    "encode_object": "agentlightning.emitter.object",
    "get_object_value": "agentlightning.emitter.object",
    "RewardDimension": "agentlightning.emitter.reward",
    "emit_reward": "agentlightning.emitter.reward",
    "find_final_reward": "agentlightning.emitter.reward",
    "find_reward_spans": "agentlightning.emitter.reward",
    "get_reward_value": "agentlightning.emitter.reward",
    "get_rewards_from_span": "agentlightning.emitter.reward",
    "is_reward_span": "agentlightning.emitter.reward",
    "reward": "agentlightning.emitter.reward",
    "AgentLightningError": "agentlightning.errors",
    "BadRequest": "agentlightning.errors",
    "Conflict": "agentlightning.errors",
    "CorruptStore": "agentlightning.errors",
    "DiskFull": "agentlightning.errors",
    "ExecutionFailed": "agentlightning.errors",
    "ForeignFile": "agentlightning.errors",
    "WrongServer": "agentlightning.errors",
    "IdReused": "agentlightning.errors",
    "IllegalMove": "agentlightning.errors",
    "InvalidId": "agentlightning.errors",
    "InvalidValue": "agentlightning.errors",
    "MissingExtra": "agentlightning.errors",
    "NewerSchema": "agentlightning.errors",
    "NoSuchRoute": "agentlightning.errors",
    "NotAllowed": "agentlightning.errors",
    "NotAuthenticated": "agentlightning.errors",
    "NotFound": "agentlightning.errors",
    "NotJson": "agentlightning.errors",
    "Overloaded": "agentlightning.errors",
    "SpoolFull": "agentlightning.errors",
    "StaleAttempt": "agentlightning.errors",
    "StoreClosed": "agentlightning.errors",
    "StoreForked": "agentlightning.errors",
    "StoreOwned": "agentlightning.errors",
    "StoreStopped": "agentlightning.errors",
    "StoreUnavailable": "agentlightning.errors",
    "StoreUnreachable": "agentlightning.errors",
    "TooLarge": "agentlightning.errors",
    "UnsupportedMedia": "agentlightning.errors",
    "NothingToLearn": "agentlightning.errors",
    "AlgorithmBundle": "agentlightning.execution.base",
    "ExecutionStrategy": "agentlightning.execution.base",
    "RunnerBundle": "agentlightning.execution.base",
    "ClientServerExecutionStrategy": "agentlightning.execution.client_server",
    "ExecutionEvent": "agentlightning.execution.events",
    "MultiprocessingEvent": "agentlightning.execution.events",
    "ThreadingEvent": "agentlightning.execution.events",
    "Interrupted": "agentlightning.execution.interrupts",
    "Quotas": "agentlightning.execution.quotas",
    "RestartPolicy": "agentlightning.execution.restarts",
    "SharedMemoryExecutionStrategy": "agentlightning.execution.shared_memory",
    "AgentLightningClient": "agentlightning.legacy.client",
    "DevTaskLoader": "agentlightning.legacy.client",
    "AgentLightningServer": "agentlightning.legacy.server",
    "FunctionalLitAgent": "agentlightning.litagent.decorator",
    "llm_rollout": "agentlightning.litagent.decorator",
    "prompt_rollout": "agentlightning.litagent.decorator",
    "rollout": "agentlightning.litagent.decorator",
    "Hook": "agentlightning.litagent.hooks",
    "LitAgent": "agentlightning.litagent.litagent",
    "is_v0_1_rollout_api": "agentlightning.litagent.litagent",
    "ProgramAgent": "agentlightning.runner.program",
    "LLMProxy": "agentlightning.proxy",
    "ModelConfig": "agentlightning.proxy",
    "get_active_llm_proxy": "agentlightning.proxy",
    "set_active_llm_proxy": "agentlightning.proxy",
    "LitAgentRunner": "agentlightning.runner.agent",
    "Runner": "agentlightning.runner.base",
    "AGL_ANNOTATION": "agentlightning.semconv",
    "AGL_EXCEPTION": "agentlightning.semconv",
    "AGL_MESSAGE": "agentlightning.semconv",
    "AGL_OBJECT": "agentlightning.semconv",
    "AGL_OPERATION": "agentlightning.semconv",
    "AGL_REWARD": "agentlightning.semconv",
    "AGL_VIRTUAL": "agentlightning.semconv",
    "GenAIAttributes": "agentlightning.semconv",
    "LLMCallAttributes": "agentlightning.semconv",
    "LightningResourceAttributes": "agentlightning.semconv",
    "LightningSpanAttributes": "agentlightning.semconv",
    "LinkAttributes": "agentlightning.semconv",
    "LinkPydanticModel": "agentlightning.semconv",
    "RewardAttributes": "agentlightning.semconv",
    "RewardPydanticModel": "agentlightning.semconv",
    "LightningEnvVar": "agentlightning.settings",
    "resolve_bool_env_var": "agentlightning.settings",
    "resolve_int_env_var": "agentlightning.settings",
    "resolve_str_env_var": "agentlightning.settings",
    "LightningStore": "agentlightning.store.base",
    "LightningStoreCapabilities": "agentlightning.store.base",
    "LightningStoreStatistics": "agentlightning.store.base",
    "StoreHost": "agentlightning.store.base",
    "is_finished": "agentlightning.store.base",
    "is_queuing": "agentlightning.store.base",
    "is_running": "agentlightning.store.base",
    "LightningStoreClient": "agentlightning.store.client_server.client.client",
    "ClientMetrics": "agentlightning.store.client_server.client.metrics",
    "HealthReport": "agentlightning.store.client_server.resilience.health",
    "Resilience": "agentlightning.store.client_server.resilience.resilience",
    "ServerLimits": "agentlightning.store.client_server.server.limits",
    "LightningStoreServer": "agentlightning.store.client_server.server.server",
    "InMemoryLightningStore": "agentlightning.store.sqlite.store",
    "LightningStoreThreaded": "agentlightning.store.sqlite.store",
    "ReadOnlySqliteStore": "agentlightning.store.sqlite.store",
    "SqliteLightningStore": "agentlightning.store.sqlite.store",
    "setup_logging": "agentlightning.telemetry.logs",
    "clear_active_tracer": "agentlightning.tracer.active",
    "get_active_tracer": "agentlightning.tracer.active",
    "set_active_tracer": "agentlightning.tracer.active",
    "Tracer": "agentlightning.tracer.base",
    "DummyTracer": "agentlightning.tracer.dummy",
    "OtelTracer": "agentlightning.tracer.otel",
    "LightningSpanProcessor": "agentlightning.tracer.processor",
    "Trainer": "agentlightning.trainer.trainer",
    "LLM": "agentlightning.types",
    "UNSET": "agentlightning.types",
    "Attempt": "agentlightning.types",
    "AttemptStatus": "agentlightning.types",
    "AttemptedRollout": "agentlightning.types",
    "AttributeValue": "agentlightning.types",
    "Attributes": "agentlightning.types",
    "Dataset": "agentlightning.types",
    "EnqueueRolloutRequest": "agentlightning.types",
    "Event": "agentlightning.types",
    "FilterField": "agentlightning.types",
    "FilterOptions": "agentlightning.types",
    "GenericResponse": "agentlightning.types",
    "Link": "agentlightning.types",
    "NamedResources": "agentlightning.types",
    "OtelResource": "agentlightning.types",
    "PaginatedResult": "agentlightning.types",
    "PromptTemplate": "agentlightning.types",
    "ProxyLLM": "agentlightning.types",
    "Resource": "agentlightning.types",
    "ResourceUnion": "agentlightning.types",
    "ResourcesUpdate": "agentlightning.types",
    "Rollout": "agentlightning.types",
    "RolloutConfig": "agentlightning.types",
    "RolloutLegacy": "agentlightning.types",
    "RolloutMode": "agentlightning.types",
    "RolloutRawResult": "agentlightning.types",
    "RolloutRawResultLegacy": "agentlightning.types",
    "RolloutStatus": "agentlightning.types",
    "SortOptions": "agentlightning.types",
    "Span": "agentlightning.types",
    "SpanAttributeNames": "agentlightning.types",
    "SpanContext": "agentlightning.types",
    "SpanCoreFields": "agentlightning.types",
    "SpanLike": "agentlightning.types",
    "SpanNames": "agentlightning.types",
    "SpanRecordingContext": "agentlightning.types",
    "StatusCode": "agentlightning.types",
    "Task": "agentlightning.types",
    "TaskIfAny": "agentlightning.types",
    "TaskInput": "agentlightning.types",
    "TraceState": "agentlightning.types",
    "TraceStatus": "agentlightning.types",
    "Triplet": "agentlightning.types",
    "Unset": "agentlightning.types",
    "VerificationReport": "agentlightning.types",
    "Violation": "agentlightning.types",
    "Worker": "agentlightning.types",
    "WorkerDirective": "agentlightning.types",
    "WorkerStatus": "agentlightning.types",
    "convert_timestamp": "agentlightning.types",
    "extract_extra_fields": "agentlightning.types",
    "ParallelWorkerBase": "agentlightning.types.parallel",
}
"""Every exported name, and the module that defines it."""

if not TYPE_CHECKING:  # a type checker knows the names from the imports above, and takes no list that is computed
    __all__ = list(_MODULE_NAMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("agentlightning")
    elif name in _MODULE_NAMES:
        value = getattr(import_module(_MODULE_NAMES[name]), name)
    else:
        # With these two Python adds the name that may have been meant.
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    globals()[name] = value  # the next use does not come by here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_NAMES, "__version__"})
