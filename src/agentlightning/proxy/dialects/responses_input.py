"""The request of ``/v1/responses``, as a chat completion: its items become messages, its tools functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

from agentlightning.proxy.dialects.lenient import write_json
from agentlightning.proxy.dialects.replies import object_of
from agentlightning.proxy.dialects.translated import (
    ChatRequest,
    Untranslatable,
    content_of,
    data_url,
    image_part,
    text_part,
    tool_call,
)

CUSTOM_INPUT = "input"
"""The one argument of a function that stands for a tool that takes free text."""
_CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {CUSTOM_INPUT: {"type": "string"}},
    "required": [CUSTOM_INPUT],
    "additionalProperties": False,
}
_TOOL_OUTPUTS = frozenset({"function_call_output", "custom_tool_call_output"})


class ToolName(NamedTuple):
    """A tool as the agent knows it."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


class ToolTable(dict[str, ToolName]):
    """The tools of a request, by the names that they have as functions."""

    def add(self, tools: Iterable[Any], chat: ChatRequest, namespace: str | None = None) -> None:
        """Add tools to a request. Those that only the vendor runs are left out, and noted."""
        for given in tools:
            tool = object_of(given)
            kind, name = tool.get("type"), str(tool.get("name") or "")
            if kind == "namespace":
                self.add(tool.get("tools") or (), chat, name)
                continue
            if kind not in ("function", "custom") or not name:
                chat.notes.append(f"tool of the type {kind} is left out: only its vendor has it")
                continue
            flat = flat_name(name, namespace)
            self[flat] = ToolName(name, namespace, kind == "custom")
            if kind == "custom":
                chat.add_function(flat, _custom_description(tool), _CUSTOM_PARAMETERS)
            else:
                strict = tool.get("strict")
                strict = strict if isinstance(strict, bool) else None
                chat.add_function(flat, tool.get("description"), tool.get("parameters"), strict=strict)

    def find(self, flat: str) -> ToolName:
        """Return the tool that a function stands for; a name that was not offered stands for itself."""
        return self.get(flat, ToolName(flat))


def flat_name(name: str, namespace: object) -> str:
    """Return the name of a function that stands for a tool of a namespace."""
    if not isinstance(namespace, str) or not namespace:
        return name
    return f"{namespace.removesuffix('__')}__{name}"


def _custom_description(tool: Mapping[str, Any]) -> str:
    form = object_of(tool.get("format"))
    said = str(tool.get("description") or "")
    if form.get("type") == "grammar":
        said += f"\nThe input follows this grammar ({form.get('syntax')}):\n{form.get('definition')}"
    return said.strip()


def add_choice(choice: object, table: ToolTable, chat: ChatRequest) -> None:
    """Add what a request says of which tool is to be called."""
    if choice is None or "tools" not in chat.body:
        return
    if isinstance(choice, str):
        chat.body["tool_choice"] = choice
        return
    given = object_of(choice)
    kind = given.get("type")
    if kind in ("function", "custom"):
        name = flat_name(str(given.get("name")), given.get("namespace"))
        chat.body["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif kind == "allowed_tools":
        allowed = {
            flat_name(str(object_of(tool).get("name")), object_of(tool).get("namespace"))
            for tool in given.get("tools") or ()
        }
        chat.body["tools"] = [tool for tool in chat.body["tools"] if tool["function"]["name"] in allowed]
        chat.body["tool_choice"] = given.get("mode", "auto")
        if not chat.body["tools"]:
            del chat.body["tools"], chat.body["tool_choice"]
    else:
        chat.notes.append(f"tool_choice of the type {kind} is left out: only its vendor has that tool")


def input_items(given: object) -> list[dict[str, Any]]:
    """Return the items of a request's ``input``, which may be a text. Raises ``Untranslatable`` if it is neither."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    if not isinstance(given, list):
        raise Untranslatable("The field 'input' is neither a text nor a list of items.", "input")
    return [object_of(item) for item in cast("list[Any]", given)]


class ItemReader:
    """Makes chat messages of items, in their order.

    Items of one turn of the model (reasoning, text, calls) become one message.
    """

    def __init__(self, chat: ChatRequest, table: ToolTable, find: Callable[[str], dict[str, Any] | None]) -> None:
        self._chat = chat
        self._table = table
        self._find = find

    def read(self, items: Iterable[dict[str, Any]]) -> None:
        """Add items. Raises ``Untranslatable`` for one that no chat message can say."""
        for number, item in enumerate(items):
            self._add(item, f"input.{number}")

    def _add(self, item: dict[str, Any], where: str) -> None:
        kind = item.get("type") or ("message" if "role" in item else "item_reference")
        if kind == "message":
            self._add_message(item, where)
        elif kind in ("function_call", "custom_tool_call"):
            self._add_call(item, kind)
        elif kind in _TOOL_OUTPUTS:
            self._add_output(item, where)
        elif kind == "reasoning":
            self._add_reasoning(item)
        elif kind == "additional_tools":
            self._table.add(item.get("tools") or (), self._chat)
        elif kind == "item_reference":
            known = self._find(str(item.get("id")))
            if known is None:
                raise Untranslatable(f"There is no item {item.get('id')!r} in this attempt.", where)
            self._add(known, where)
        else:
            raise Untranslatable(f"An item of the type {kind!r} cannot be given to this model.", where)

    def _add_message(self, item: dict[str, Any], where: str) -> None:
        role, messages = item.get("role"), self._chat.messages
        parts = _parts(item.get("content"), where)
        if role == "assistant":
            text = str(content_of([part for part in parts if part["type"] == "text"]))
            turn = self._turn()
            if turn.get("content") is not None or "tool_calls" in turn:
                turn = self._turn(is_new=True)
            turn["content"] = text
        elif role in ("system", "developer"):  # few templates know developers
            text = str(content_of(parts))
            if messages and all(message["role"] == "system" for message in messages):
                messages[-1]["content"] += f"\n\n{text}"  # some templates take one, at the beginning
            else:
                self._chat.say("system", text)
        elif role == "user":
            self._chat.add_user_parts(parts)
        else:
            raise Untranslatable(f"The role is {role!r}; it must be user, assistant, system or developer.", where)

    def _turn(self, *, is_new: bool = False) -> dict[str, Any]:
        """Return the assistant's message that the next item belongs to."""
        messages = self._chat.messages
        if is_new or not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        return messages[-1]

    def _add_call(self, item: dict[str, Any], kind: str) -> None:
        name = flat_name(str(item.get("name")), item.get("namespace"))
        arguments = item.get("arguments")
        if kind == "custom_tool_call":
            arguments = write_json({CUSTOM_INPUT: item.get("input", "")}).decode()
        call = tool_call(str(item.get("call_id")), name, arguments if isinstance(arguments, str) else "{}")
        self._turn().setdefault("tool_calls", []).append(call)

    def _add_output(self, item: dict[str, Any], where: str) -> None:
        parts = _parts(item.get("output"), where)
        texts = [part for part in parts if part["type"] == "text"]
        call_id = str(item.get("call_id"))
        self._chat.messages.append({"role": "tool", "tool_call_id": call_id, "content": content_of(texts)})
        self._chat.add_user_parts([part for part in parts if part["type"] != "text"])

    def _add_reasoning(self, item: dict[str, Any]) -> None:
        pieces = item.get("content") or item.get("summary") or ()
        text = "\n".join(str(object_of(piece).get("text", "")) for piece in pieces)
        if not text:
            self._chat.notes.append("reasoning that only its vendor can read is left out")
            return
        turn = self._turn()
        if turn.get("content") is not None or "tool_calls" in turn:
            turn = self._turn(is_new=True)
        turn["reasoning_content"] = f"{turn['reasoning_content']}\n{text}" if "reasoning_content" in turn else text


def _parts(content: object, where: str) -> list[dict[str, Any]]:
    """Return the parts of an item's content as those of a chat message."""
    if isinstance(content, str):
        return [text_part(content)]
    if not isinstance(content, list):
        raise Untranslatable("The content is neither a text nor a list.", where)
    return [_part(object_of(part), where) for part in cast("list[Any]", content)]


def _part(part: dict[str, Any], where: str) -> dict[str, Any]:
    kind = part.get("type")
    if kind in ("input_text", "output_text", "text", "summary_text", "reasoning_text"):
        return text_part(str(part.get("text", "")))
    if kind == "refusal":
        return text_part(str(part.get("refusal", "")))
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        detail = part.get("detail")
        return image_part(part["image_url"], detail if isinstance(detail, str) else None)
    if kind == "input_file" and isinstance(part.get("file_data"), str):
        data = part["file_data"]
        data = data if data.startswith("data:") else data_url("application/pdf", data)
        return {"type": "file", "file": {"filename": part.get("filename") or "file.pdf", "file_data": data}}
    raise Untranslatable(f"Content of the type {kind!r} cannot be given to this model.", where)
