"""OpenAI's newer wire, ``POST /v1/responses``, as its SDKs, Codex and many frameworks speak it.

Requests, replies and events have the shapes of https://platform.openai.com/docs/api-reference/responses; the names of
the events and their order are those that the package ``openai`` (3.57.0) parses. Replies are kept for their attempt,
unless the request says ``store: false``, so that later requests can continue them by ``previous_response_id``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from typing_extensions import override

from agentlightning.proxy.dialects.base import Lookup, ModelRequest, ProxyError
from agentlightning.proxy.dialects.lenient import read_object
from agentlightning.proxy.dialects.replies import object_of
from agentlightning.proxy.dialects.responses_events import ResponseWriter
from agentlightning.proxy.dialects.responses_input import ItemReader, ToolTable, add_choice, input_items
from agentlightning.proxy.dialects.responses_memory import AttemptKey, KeptReply, ReplyMemory
from agentlightning.proxy.dialects.responses_output import AskedResponse, write_response
from agentlightning.proxy.dialects.translated import ChatRequest, TranslatedDialect, Untranslatable, sse

_SAME = {
    "temperature": "temperature",
    "top_p": "top_p",
    "max_output_tokens": "max_tokens",
    "parallel_tool_calls": "parallel_tool_calls",
}
_LEFT_OUT = ("reasoning", "include", "truncation", "max_tool_calls", "context_management", "moderation")
_IMPOSSIBLE = ("conversation", "prompt", "background")
"""What only the vendor's servers keep, or run."""


class Responses(TranslatedDialect):
    """``POST /v1/responses``, and the replies that are kept."""

    name = "responses"
    paths = ("/responses",)
    count_paths = ("/responses/input_tokens",)

    def __init__(self) -> None:
        self._memory = ReplyMemory()

    # --- Requests ---

    @override
    def translate(self, asked: Mapping[str, Any], path_params: Mapping[str, str], chat: ChatRequest) -> bool:
        for name in _IMPOSSIBLE:
            if asked.get(name):
                raise Untranslatable(f"The field {name!r} needs the vendor's servers.", name)
        key = _key_of(path_params)
        table = ToolTable()
        table.add(asked.get("tools") or (), chat)
        if instructions := asked.get("instructions"):
            chat.say("system", str(instructions))
        items = input_items(asked.get("input", []))
        history: list[dict[str, Any]] = []
        if previous := asked.get("previous_response_id"):
            history = self._history(key, str(previous))
        ItemReader(chat, table, lambda item_id: self._memory.item(key, item_id)).read([*history, *items])
        if not chat.messages:
            raise Untranslatable("The request says nothing; fill the field 'input'.", "input")
        add_choice(asked.get("tool_choice"), table, chat)
        chat.copy(asked, _SAME)
        chat.leave_out(asked, _LEFT_OUT)
        _add_format(object_of(asked.get("text")), chat)
        chat.context = AskedResponse(key, items, table)
        return asked.get("stream") is True

    def _history(self, key: AttemptKey, previous_id: str) -> list[dict[str, Any]]:
        history = self._memory.history(key, previous_id)
        if history is None:
            why = f"This attempt has no reply {previous_id!r}, or the request for it said store: false."
            raise ProxyError(400, "previous_response_not_found", why, param="previous_response_id")
        return history

    @override
    def count_reply(self, count: int) -> dict[str, Any]:
        return {"object": "response.input_tokens", "input_tokens": count}

    # --- Replies ---

    @override
    def write_reply(self, reply: Mapping[str, Any], request: ModelRequest) -> dict[str, Any]:
        response = write_response(reply, request)
        self.keep(response, request)
        return response

    @override
    def open_writer(self, request: ModelRequest) -> ResponseWriter:
        return ResponseWriter(request, lambda response: self.keep(response, request))

    def keep(self, response: dict[str, Any], request: ModelRequest) -> None:
        """Keep a whole reply for its attempt, unless the agent does not want it."""
        if request.asked.get("store") is False:
            return
        asked = cast("AskedResponse", request.context)
        previous = request.asked.get("previous_response_id")
        items = [{"id": f"{response['id']}_in_{number}", **item} for number, item in enumerate(asked.items)]
        self._memory.keep(asked.key, str(previous) if previous else None, items, response)

    @override
    def error_event(self, error: ProxyError) -> bytes:
        shown = object_of((read_object(self.error_body(error)) or {}).get("error"))
        event = {"type": "error", "code": shown.get("code"), "message": error.message, "param": error.param}
        # The vendor's SDKs raise only if there is an object under ``error``; else their streams just end.
        return sse("error", {**event, "sequence_number": 0, "error": shown})

    # --- Replies that are kept ---

    @override
    def lookups(self) -> Sequence[Lookup]:
        path = "/responses/(?P<response_id>[^/]+)"
        return (
            Lookup("GET", path, self._show),
            Lookup("DELETE", path, self._delete),
            Lookup("GET", f"{path}/input_items", self._list_input),
        )

    def _find(self, path_params: Mapping[str, str]) -> KeptReply:
        response_id = path_params["response_id"]
        kept = self._memory.find(_key_of(path_params), response_id)
        if kept is None:
            raise ProxyError(404, "response_not_found", f"This attempt has no reply {response_id!r}.")
        return kept

    def _show(self, path_params: Mapping[str, str]) -> dict[str, Any]:
        return self._find(path_params).response_object()

    def _delete(self, path_params: Mapping[str, str]) -> dict[str, Any]:
        self._find(path_params)
        self._memory.forget(_key_of(path_params), path_params["response_id"])
        return {"id": path_params["response_id"], "object": "response", "deleted": True}

    def _list_input(self, path_params: Mapping[str, str]) -> dict[str, Any]:
        kept = self._find(path_params)
        history = [] if kept.previous_id is None else self._memory.history(_key_of(path_params), kept.previous_id)
        items = [*(history or []), *kept.input_items()]
        items.reverse()  # the newest first, as the vendor's
        first, last = (items[0].get("id"), items[-1].get("id")) if items else (None, None)
        return {"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": False}


def _key_of(path_params: Mapping[str, str]) -> AttemptKey:
    return path_params.get("rollout_id", ""), path_params.get("attempt_id", "")


def _add_format(text: dict[str, Any], chat: ChatRequest) -> None:
    form = object_of(text.get("format"))
    if form.get("type") == "json_schema":
        schema = {
            name: form[name] for name in ("name", "description", "schema", "strict") if form.get(name) is not None
        }
        chat.body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif form.get("type") == "json_object":
        chat.body["response_format"] = {"type": "json_object"}
    chat.leave_out(text, ("verbosity",))
