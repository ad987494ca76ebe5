"""A reply of ``/v1/responses``: the object, and its items."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import msgspec

from agentlightning.proxy.dialects.base import ModelRequest
from agentlightning.proxy.dialects.replies import object_of
from agentlightning.proxy.dialects.responses_input import CUSTOM_INPUT, ToolTable
from agentlightning.proxy.dialects.responses_memory import AttemptKey
from agentlightning.proxy.dialects.translated import (
    ToolCall,
    Usage,
    first_choice,
    reasoning_of,
    text_in,
    tool_calls_of,
    usage_of,
)

_ECHOED: Mapping[str, Any] = {
    "instructions": None, "metadata": {}, "parallel_tool_calls": True, "temperature": None, "tool_choice": "auto",
    "tools": [], "top_p": None, "max_output_tokens": None, "previous_response_id": None, "reasoning": None,
    "text": {"format": {"type": "text"}}, "truncation": "disabled", "user": None, "store": True,
}  # fmt: skip
"""The fields of a reply that repeat the request, and what they are if that does not say it."""


class AskedResponse(NamedTuple):
    """What a reply needs of its request."""

    key: AttemptKey
    items: list[dict[str, Any]]
    """What is new."""
    table: ToolTable


def write_response(reply: Mapping[str, Any], request: ModelRequest) -> dict[str, Any]:
    """Return a whole chat reply as a response."""
    choice = first_choice(reply)
    message = object_of(choice.get("message"))
    response_id = new_response_id()
    output: list[dict[str, Any]] = []
    if thought := reasoning_of(message):
        output.append(reasoning_item(item_id_of("rs", response_id, 0), thought))
    calls, text = tool_calls_of(message), text_in(message)
    if text or not calls:
        output.append(message_item(item_id_of("msg", response_id, len(output)), text))
    table = cast("AskedResponse", request.context).table
    for call in calls:
        output.append(call_item(item_id_of("fc", response_id, len(output)), call, table))
    begun = begin_response(response_id, request, reply.get("created"))
    return end_response(begun, output, choice.get("finish_reason"), usage_of(reply))


def new_response_id() -> str:
    """Return an id for a response. That of the backend's reply does not serve: some backends repeat theirs."""
    return f"resp_{secrets.token_hex(16)}"


def item_id_of(prefix: str, response_id: str, place: int) -> str:
    """Return the id of an item of a response."""
    return f"{prefix}_{response_id.removeprefix('resp_')}_{place}"


def begin_response(response_id: str, request: ModelRequest, created: object) -> dict[str, Any]:
    """Return a reply that has just begun."""
    echoed = {
        name: request.asked[name] if request.asked.get(name) is not None else default
        for name, default in _ECHOED.items()
    }
    return {
        "id": response_id,
        "object": "response",
        "created_at": created if type(created) in (int, float) else int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": request.model,
        "output": [],
        "usage": None,
        **echoed,
    }


def end_response(
    begun: Mapping[str, Any], output: list[dict[str, Any]], finish_reason: object, usage: Usage
) -> dict[str, Any]:
    """Return a reply that has ended."""
    reasons = {"length": "max_output_tokens", "content_filter": "content_filter"}
    reason = reasons.get(str(finish_reason))
    return {
        **begun,
        "status": "completed" if reason is None else "incomplete",
        "incomplete_details": None if reason is None else {"reason": reason},
        "output": output,
        "usage": {
            "input_tokens": usage.input,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.output,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.input + usage.output,
        },
    }


def reasoning_item(item_id: str, text: str) -> dict[str, Any]:
    """Return an item that says what the model thought."""
    return {"id": item_id, "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def message_item(item_id: str, text: str, status: str = "completed") -> dict[str, Any]:
    """Return an item that is a text of the model."""
    part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"id": item_id, "type": "message", "role": "assistant", "status": status, "content": [part]}


def call_item(item_id: str, call: ToolCall, table: ToolTable, status: str = "completed") -> dict[str, Any]:
    """Return an item that is a call of a tool, under the name that the agent knows."""
    tool = table.find(call.name)
    item: dict[str, Any] = {"id": item_id, "call_id": call.id, "name": tool.name, "status": status}
    if tool.namespace is not None:
        item["namespace"] = tool.namespace
    if tool.is_custom:
        return {"type": "custom_tool_call", "input": custom_input(call.arguments), **item}
    return {"type": "function_call", "arguments": call.arguments, **item}


def custom_input(arguments: str) -> str:
    """Return the free text for a custom tool: the one argument of the function that stands for it, or everything that
    the model wrote if that is something else."""
    try:
        given = object_of(msgspec.json.decode(arguments)).get(CUSTOM_INPUT)
    except (msgspec.MsgspecError, UnicodeEncodeError):
        given = None
    return given if isinstance(given, str) else arguments
