"""The request of ``generateContent``, as a chat completion: its contents become messages, its declarations tools."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

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

_CAPITAL = re.compile("([A-Z])")
_CONFIG = {
    "temperature": "temperature", "topP": "top_p", "topK": "top_k", "maxOutputTokens": "max_tokens",
    "stopSequences": "stop", "seed": "seed", "presencePenalty": "presence_penalty",
    "frequencyPenalty": "frequency_penalty",
}  # fmt: skip
_LEFT_OUT = ("thinkingConfig", "speechConfig", "mediaResolution", "routingConfig")
_MODES = {"AUTO": "auto", "ANY": "required", "NONE": "none", "VALIDATED": "auto"}


def field_of(value: Mapping[str, Any], name: str) -> Any:
    """Return a field by its name in camel case, which may be in snake case there; None if it is absent."""
    found = value.get(name)
    return value.get(_CAPITAL.sub(r"_\1", name).lower()) if found is None else found


def add_config(config: Mapping[str, Any], chat: ChatRequest) -> None:
    """Add sampling parameters and the form of the reply."""
    known = {name: field_of(config, name) for name in (*_CONFIG, *_LEFT_OUT)}
    chat.copy(known, _CONFIG)
    chat.leave_out(known, _LEFT_OUT)
    if field_of(config, "candidateCount") not in (None, 1):
        raise Untranslatable("Only one candidate can be asked for.", "generationConfig.candidateCount")
    if field_of(config, "responseLogprobs"):
        chat.notes.append("responseLogprobs is left out")
    schema = field_of(config, "responseJsonSchema") or _json_schema(field_of(config, "responseSchema"))
    if schema:
        named = {"name": "reply", "schema": schema}
        chat.body["response_format"] = {"type": "json_schema", "json_schema": named}
    elif field_of(config, "responseMimeType") == "application/json":
        chat.body["response_format"] = {"type": "json_object"}


def _json_schema(schema: Any) -> Any:
    """Return a schema in the vendor's form (types in capitals, ``nullable``) as JSON Schema."""
    if isinstance(schema, list):
        return [_json_schema(each) for each in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    given = cast("dict[str, Any]", schema)
    # A property may be called ``type``; then it is a schema, and no text.
    found = {
        name: value.lower() if name == "type" and isinstance(value, str) else _json_schema(value)
        for name, value in given.items()
        if name != "nullable" or not isinstance(value, bool)
    }
    if given.get("nullable") is True and isinstance(found.get("type"), str):
        found["type"] = [found["type"], "null"]
    return found


def add_tools(tools: Iterable[Any], config: Mapping[str, Any], chat: ChatRequest) -> None:
    """Add the functions of a request, and what it says of which are to be called."""
    for given in tools:
        tool = object_of(given)
        for entry in field_of(tool, "functionDeclarations") or ():
            function = object_of(entry)
            schema = field_of(function, "parametersJsonSchema") or _json_schema(function.get("parameters"))
            chat.add_function(str(function.get("name")), function.get("description"), schema)
        others = [name for name in tool if name not in ("functionDeclarations", "function_declarations")]
        chat.notes += [f"tool {name} is left out: only its vendor has it" for name in others]
    calling = object_of(field_of(config, "functionCallingConfig"))
    mode = str(calling.get("mode") or "").upper()
    if "tools" not in chat.body or mode not in _MODES:
        return
    chat.body["tool_choice"] = _MODES[mode]
    allowed = field_of(calling, "allowedFunctionNames")
    if allowed:
        chat.body["tools"] = [tool for tool in chat.body["tools"] if tool["function"]["name"] in allowed]


class ContentReader:
    """Makes chat messages of contents. Calls and their results have no ids in some requests; then their order tells
    which belong together."""

    def __init__(self, chat: ChatRequest) -> None:
        self._chat = chat
        self._count = 0
        self._open: list[tuple[str, str]] = []
        """Name and id of each call that has no result yet."""

    def read_system(self, content: object) -> None:
        """Add the system's instruction, if there is one."""
        if content is None:
            return
        parts = [content] if isinstance(content, str) else object_of(content).get("parts", [content])
        if text := str(content_of([self._part(part, "systemInstruction") for part in _objects(parts)])):
            self._chat.say("system", text)

    def read(self, contents: object) -> None:
        """Add the messages. Raises ``Untranslatable`` for what no chat message can say."""
        given_list: object = [object_of(cast("object", contents))] if isinstance(contents, dict) else contents
        if not isinstance(given_list, list) or not given_list:
            raise Untranslatable("The field 'contents' is missing or empty.", "contents")
        for number, given in enumerate(cast("list[Any]", given_list)):
            content = object_of(given)
            parts = _objects(content.get("parts"))
            if content.get("role") == "model":
                self._chat.messages.append(self._turn(parts, f"contents.{number}"))
            else:
                self._add_user(parts, f"contents.{number}")

    def _turn(self, parts: Sequence[dict[str, Any]], where: str) -> dict[str, Any]:
        """Return a message of the model."""
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        for part in parts:
            if call := object_of(field_of(part, "functionCall")):
                self._count += 1
                call_id, name = str(call.get("id") or f"call_{self._count}"), str(call.get("name"))
                self._open.append((name, call_id))
                calls.append(tool_call(call_id, name, write_json(call.get("args") or {}).decode()))
            elif isinstance(part.get("text"), str):
                (thoughts if part.get("thought") else texts).append(part["text"])
            elif part.keys() - {"thoughtSignature", "thought_signature", "thought"}:
                raise _unknown(part, where)
        message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) if texts else None}
        if thoughts:
            message["reasoning_content"] = "".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        return message

    def _add_user(self, parts: Sequence[dict[str, Any]], where: str) -> None:
        said: list[dict[str, Any]] = []
        for part in parts:
            result = object_of(field_of(part, "functionResponse"))
            if not result:
                said.append(self._part(part, where))
                continue
            name = str(result.get("name"))
            call_id = self._answered(name, result.get("id"))
            content = write_json(result.get("response") or {}).decode()
            self._chat.messages.append({"role": "tool", "tool_call_id": call_id, "name": name, "content": content})
            said += [self._part(each, where) for each in _objects(result.get("parts"))]
        self._chat.add_user_parts(said)

    def _answered(self, name: str, given: object) -> str:
        """Return the id of the call that a result is of."""
        for call in self._open:
            if call[1] == given or (not given and call[0] == name):
                self._open.remove(call)
                return call[1]
        return str(given or f"call_{name}")

    def _part(self, part: dict[str, Any], where: str) -> dict[str, Any]:
        if isinstance(part.get("text"), str):
            return text_part(part["text"])
        if data := object_of(field_of(part, "inlineData")):
            kind = str(field_of(data, "mimeType"))
            url = data_url(kind, str(data.get("data")))
            if kind.startswith("image/"):
                return image_part(url)
            return {"type": "file", "file": {"filename": "file", "file_data": url}}
        file = object_of(field_of(part, "fileData"))
        if str(field_of(file, "mimeType")).startswith("image/"):
            return image_part(str(field_of(file, "fileUri")))
        raise _unknown(part, where)


def _objects(parts: object) -> list[dict[str, Any]]:
    if not isinstance(parts, list):
        return []
    return [text_part(part) if isinstance(part, str) else object_of(part) for part in cast("list[Any]", parts)]


def _unknown(part: Mapping[str, Any], where: str) -> Untranslatable:
    return Untranslatable(f"A part with {', '.join(part) or 'nothing'} cannot be given to this model.", where)
