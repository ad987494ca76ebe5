"""The names of spans and attributes that Agent Lightning writes and reads.

Names of agentlightning 0.3 first; then those of model calls, which extend the OpenTelemetry conventions for
generative AI (https://opentelemetry.io/docs/specs/semconv/gen-ai/) by what training needs.
"""

from __future__ import annotations

from enum import Enum, StrEnum

from pydantic import BaseModel

AGL_ANNOTATION = "agentlightning.annotation"
"""Span that says something about the attempt; rewards travel in it."""
AGL_MESSAGE = "agentlightning.message"
AGL_OBJECT = "agentlightning.object"
AGL_EXCEPTION = "agentlightning.exception"
AGL_OPERATION = "agentlightning.operation"
AGL_REWARD = "agentlightning.reward"
"""Name of the reward spans of 0.2; still understood."""
AGL_VIRTUAL = "agentlightning.virtual"
"""Name of a span that was given none."""


class LightningResourceAttributes(Enum):
    """Attributes that say where a span belongs, on the span itself or on its resource."""

    ROLLOUT_ID = "agentlightning.rollout_id"
    ATTEMPT_ID = "agentlightning.attempt_id"
    SPAN_SEQUENCE_ID = "agentlightning.span_sequence_id"
    TRACER_NAME = "agentlightning.tracer.name"


class LightningSpanAttributes(Enum):
    """Attributes of the spans that emitters make. Those of lists and objects are flattened: ``reward.0.name``."""

    REWARD = "agentlightning.reward"
    LINK = "agentlightning.link"
    TAG = "agentlightning.tag"
    MESSAGE_BODY = "agentlightning.message.body"
    OBJECT_TYPE = "agentlightning.object.type"
    OBJECT_LITERAL = "agentlightning.object.literal"
    OBJECT_JSON = "agentlightning.object.json"
    OPERATION_NAME = "agentlightning.operation.name"
    OPERATION_INPUT = "agentlightning.operation.input"
    OPERATION_OUTPUT = "agentlightning.operation.output"
    DEFAULT_RESOURCES = "agentlightning.default_resources"
    """Why the attempt ran with the runner's default resources, and not with those of its rollout."""
    MENDED = "agentlightning.mended"
    """What the tracer had to change, because no store would have taken it: ``name``, ``attributes.KEY`` and so on."""
    CUT = "agentlightning.cut"
    """What of the span is not whole: of ``attributes.KEY`` only the beginning is there, or nothing if it was a list of
    numbers; of ``attributes`` or ``events`` a limit of OpenTelemetry left some out."""


class RewardAttributes(Enum):
    """Fields of one dimension of a reward, below ``agentlightning.reward.<index>``."""

    REWARD_NAME = "name"
    REWARD_VALUE = "value"


class RewardPydanticModel(BaseModel):
    """One dimension of a reward."""

    name: str
    value: float


class LinkAttributes(Enum):
    """Fields of one link to other spans, below ``agentlightning.link.<index>``."""

    KEY_MATCH = "key_match"
    VALUE_MATCH = "value_match"


class LinkPydanticModel(BaseModel):
    """A link to the spans whose attribute ``key_match`` is ``value_match``."""

    key_match: str
    value_match: str


class GenAIAttributes(Enum):
    """The OpenTelemetry attributes of a model call that are read or written here."""

    OPERATION_NAME = "gen_ai.operation.name"
    """``chat`` or ``text_completion``. The span's name is this and the model."""
    PROVIDER_NAME = "gen_ai.provider.name"
    SYSTEM = "gen_ai.system"
    """What older instrumentations write instead of ``gen_ai.provider.name``."""
    AGENT_NAME = "gen_ai.agent.name"
    REQUEST_MODEL = "gen_ai.request.model"
    REQUEST_TEMPERATURE = "gen_ai.request.temperature"
    REQUEST_TOP_P = "gen_ai.request.top_p"
    REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
    REQUEST_SEED = "gen_ai.request.seed"
    RESPONSE_ID = "gen_ai.response.id"
    RESPONSE_MODEL = "gen_ai.response.model"
    RESPONSE_FINISH_REASONS = "gen_ai.response.finish_reasons"
    USAGE_INPUT_TOKENS = "gen_ai.usage.input_tokens"
    USAGE_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
    INPUT_MESSAGES = "gen_ai.input.messages"
    OUTPUT_MESSAGES = "gen_ai.output.messages"
    TOOL_DEFINITIONS = "gen_ai.tool.definitions"
    ERROR_TYPE = "error.type"
    HTTP_STATUS_CODE = "http.response.status_code"


class LLMCallAttributes(Enum):
    """What the LLM proxy records of a model call beyond ``GenAIAttributes``."""

    WIRE = "agentlightning.llm.wire"
    """The wire that the agent spoke: ``chat_completions``, ``completions``, ``responses``, ``messages``,
    ``generate_content``. Calls of all but the first two are made and recorded as chat completions."""
    NOTES = "agentlightning.llm.notes"
    """What the agent asked for and no backend got, because a chat completion cannot say it."""
    REQUEST = "agentlightning.llm.request"
    """The request body as the agent sent it, or as it was translated, as a JSON string."""
    RESPONSE = "agentlightning.llm.response"
    """The response body as the agent got it, or would have got it on ``chat_completions``, as a JSON string. Of a
    stream: put together to what the same call without streaming would have answered."""
    PROMPT_TOKEN_IDS = "agentlightning.llm.prompt_token_ids"
    """List of integers."""
    RESPONSE_TOKEN_IDS = "agentlightning.llm.response_token_ids"
    """List of integers, of the first choice. Those of the choice ``n`` are ``agentlightning.llm.choices.n`` and what
    stands here after ``agentlightning.llm``; its prompt is there only if it is another one."""
    RESPONSE_LOGPROBS = "agentlightning.llm.response_logprobs"
    """List of floats, one for each of ``RESPONSE_TOKEN_IDS``: natural logarithms of probabilities."""
    MODEL_VERSION = "agentlightning.llm.model_version"
    """Which weights answered: what the algorithm last said, or else what the backend says of itself."""
    IMPOSED_SAMPLING = "agentlightning.llm.imposed_sampling"
    """Sampling parameters that the proxy changed for training, as a JSON string: by name, what the agent ``asked`` and
    what was ``sent``. ``REQUEST`` has what was asked, ``gen_ai.request.*`` what was sent."""
    BACKEND = "agentlightning.llm.backend"
    """Name of the backend that answered; never its key."""
    LATENCY_SECONDS = "agentlightning.llm.latency_seconds"
    FIRST_BYTE_SECONDS = "agentlightning.llm.first_byte_seconds"
    RETRIES = "agentlightning.llm.retries"
    """How often the proxy tried again."""
    STREAMED = "agentlightning.llm.streamed"
    UNUSABLE = "agentlightning.llm.unusable"
    """Why the call is no example to learn from: one of ``UnusableReason``. Absent if it is one."""
    SHORTENED = "agentlightning.llm.shortened"
    """Whose texts are shortened, because the span would have been too large: ``request``, ``response``. Token ids and
    log-probabilities never are."""
    CHOICES = "agentlightning.llm.choices."
    """What the names of attributes of further choices begin with."""
    PREFIX_SPAN_ID = "agentlightning.llm.prefix.span_id"
    """The span of an earlier call of the attempt that this one repeats the beginning of. ``types.recorded_calls`` puts
    such spans together."""
    PREFIX_TOKENS = "agentlightning.llm.prefix.tokens"
    """So many tokens of its prompt and reply, taken together, are the beginning of this prompt."""
    PREFIX_MESSAGES = "agentlightning.llm.prefix.messages"
    """So many messages of its request are the first ones of this request."""
    PREFIX_FIELDS = "agentlightning.llm.prefix.fields"
    """These other fields of its request are the same in this one."""
    PROMPT_TOKEN_IDS_REST = "agentlightning.llm.prompt_token_ids.rest"
    """In place of ``PROMPT_TOKEN_IDS``: what follows the beginning."""
    REQUEST_REST = "agentlightning.llm.request.rest"
    """In place of ``REQUEST``: the request without the messages and fields that the earlier one has."""
    PARTS = "agentlightning.llm.parts"
    """Ids of spans that hold lists of this one, piece by piece, because they would make it too large."""
    PART_OF = "agentlightning.llm.part.of"
    """On such a span: the attribute that it holds a piece of."""
    PART_VALUES = "agentlightning.llm.part.values"
    CALL_SPAN_ID = "agentlightning.llm.call_span_id"
    """On a later span: the id of the call's span that ``UNUSABLE`` is about."""


class UnusableReason(StrEnum):
    """Why a recorded model call is no example to learn from, although its span may be without an error."""

    TOKEN_IDS_INCOMPLETE = "token_ids_incomplete"
    """The token ids of the reply are not as many as the backend says that it wrote."""
    PROMPT_TOKEN_IDS_INCOMPLETE = "prompt_token_ids_incomplete"
    """The token ids of the prompt are not as many as the backend says that it read."""
    UNREADABLE_CHUNK = "unreadable_chunk"
    """A part of the stream was no JSON, so what it said is missing."""
    FINISHED_WITH_ERROR = "finished_with_error"
    """The backend gave up in the middle of the reply: its finish reason is ``error`` or ``abort``."""
    CALL_FAILED = "call_failed"
    """There is no reply, or it is an error; the span's status says which."""
    PREFIX_MISSING = "prefix_missing"
    """The span of an earlier call, or of a part, that this one refers to is not there."""
    NOT_RECEIVED = "not_received"
    """The agent closed its connection before it had the reply; it may have asked again."""


def choice_attribute(attribute: LLMCallAttributes, number: int) -> str:
    """Return the name of an attribute that is about one choice of a reply; 0 is the first."""
    return attribute.value if number == 0 else attribute.value.replace(".llm.", f".llm.choices.{number}.")
