"""Reads OpenAI's replies into what is recorded of them, and hides what only the proxy asked for.

Backends differ in details, so what has another shape than OpenAI's is passed over; nothing here raises. Token ids come
as each server says them, the first of these that a reply has:

- vLLM: ``prompt_token_ids`` of the reply, or of a choice of a text completion; ``token_ids`` of each choice
  (https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html);
- SGLang: both in each choice, where 0.5.23 says ``response_token_ids`` (https://github.com/sgl-project/sglang/pull/30917);
  in streams ``sglext`` of the reply: ``input_ids``, and ``output_ids`` of all choices
  (https://github.com/sgl-project/sglang/pull/34488);
- llama.cpp: no prompt; ``tokens`` of ``__verbose``, if the server is verbose, and the ``id`` of each entry of the
  log-probabilities (https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from typing_extensions import TypeIs

from agentlightning.proxy.dialects.base import BackendError, CaptureField, RecordedChoice, RecordedReply
from agentlightning.semconv import UnusableReason

RESPONSE_IDS = ("token_ids", "response_token_ids")
"""The fields of a choice that hold the ids of its tokens."""
_CHOICE_IDS = (*RESPONSE_IDS, "prompt_token_ids")
_BROKEN_OFF = frozenset({
    "error", "abort", "aborted", "failed", "failure", "cancelled", "canceled", "timeout", "network_error",
    "insufficient_system_resource",
})  # fmt: skip
"""Finish reasons, in lower case, of replies that the backend did not finish: of vLLM, of SGLang, and of gateways."""


def read_whole_reply(reply: dict[str, Any]) -> RecordedReply:
    """Read a reply that came in one piece. Its ``body`` is left to the caller."""
    record = RecordedReply(prompt_token_ids=integers_of(reply.get("prompt_token_ids")))
    read_head_and_usage(reply, reply.get("usage"), record)
    extension = extension_of(reply)
    verbose = object_of(reply.get("__verbose"))
    if record.prompt_token_ids is None:
        record.prompt_token_ids = integers_of(extension.get("input_ids"))
    for place, given in enumerate(choices_of(reply)):
        reason = given.get("finish_reason")
        record.choices.append(
            RecordedChoice(
                finish_reason=reason if isinstance(reason, str) else None,
                token_ids=next(
                    (ids for ids in _ids_of(given, extension, verbose if place == 0 else {}, place) if ids is not None),
                    None,
                ),
                logprobs=logprobs_of(given.get("logprobs")),
                prompt_token_ids=integers_of(given.get("prompt_token_ids")),
            )
        )
    complete(record)
    return record


def _ids_of(
    choice: dict[str, Any], extension: dict[str, Any], verbose: dict[str, Any], place: int
) -> Iterable[Sequence[int] | None]:
    """Yield the ids of a choice's tokens from each source that there is."""
    for name in RESPONSE_IDS:
        yield integers_of(choice.get(name))
    yield output_ids_of(extension, place)
    yield integers_of(verbose.get("tokens")) or None
    yield entry_ids_of(choice.get("logprobs"))


def complete(record: RecordedReply) -> None:
    """Derive from the choices of a reply what the record says of all of them, and whether it can be used."""
    choices = record.choices
    if record.prompt_token_ids is None and choices:  # some servers say them per choice
        record.prompt_token_ids = choices[0].prompt_token_ids
    for choice in choices:  # one prompt, which each choice repeats, is said once
        if choice.prompt_token_ids == record.prompt_token_ids:
            choice.prompt_token_ids = None
    record.unusable = record.unusable or _why_unusable(record)


def _why_unusable(record: RecordedReply) -> UnusableReason | None:
    choices = record.choices
    if any((choice.finish_reason or "").lower() in _BROKEN_OFF for choice in choices):
        return UnusableReason.FINISHED_WITH_ERROR
    lengths = [len(choice.token_ids) for choice in choices if choice.token_ids is not None]
    if not lengths:
        return None  # without ids it is not known how the text was written, but the text is whole
    if len(lengths) < len(choices) or (record.output_tokens is not None and sum(lengths) != record.output_tokens):
        return UnusableReason.TOKEN_IDS_INCOMPLETE
    if record.output_tokens is None and any(
        choice.logprobs is not None and len(choice.logprobs) != len(choice.token_ids or ()) for choice in choices
    ):
        return UnusableReason.TOKEN_IDS_INCOMPLETE
    prompt = record.prompt_token_ids
    is_one_prompt = all(choice.prompt_token_ids is None for choice in choices)
    if prompt is not None and is_one_prompt and record.input_tokens not in (None, len(prompt)):
        return UnusableReason.PROMPT_TOKEN_IDS_INCOMPLETE
    return None


def read_error_in(reply: dict[str, Any], status: int) -> BackendError:
    """Read the error in a backend's reply, or in a chunk of one."""
    error = reply.get("error") or next((each["error"] for each in choices_of(reply) if each.get("error")), None)
    known = cast("dict[str, Any]", error) if isinstance(error, dict) else {"message": error}
    code = known.get("code") or known.get("type") or reply.get("code")
    message = known.get("message") or reply.get("message") or reply.get("detail")
    return BackendError(
        code if isinstance(code, str) else str(code if type(code) is int else status),
        message if isinstance(message, str) else f"the backend answered with HTTP status {status}",
    )


def is_error(reply: dict[str, Any]) -> bool:
    """Whether a reply, or a chunk of one, is an error, whatever its HTTP status says."""
    if reply.get("error") or any(choice.get("error") for choice in choices_of(reply)):
        return True
    return "choices" not in reply and (reply.get("object") == "error" or reply.get("type") == "error")


def is_no_reply(reply: dict[str, Any]) -> bool:
    """Whether what came in one piece has nothing that a model wrote, so that it is an error, whatever its shape."""
    return is_error(reply) or not choices_of(reply)


def remove_hidden(reply: dict[str, Any], hidden: frozenset[CaptureField]) -> bool:
    """Remove from a reply, or from a chunk of one, what only the proxy asked for.

    Returns:
        Whether anything is left for the agent. A chunk that carries only the usage, or only token ids, would not have
        been sent.
    """
    choices = choices_of(reply)
    removed = False
    if "token_ids" in hidden:
        removed = _remove_ids(reply, choices)
    if "logprobs" in hidden:
        for choice in choices:
            removed = _remove_logprobs(choice) or removed
        object_of(reply.get("__verbose")).pop("completion_probabilities", None)
    if "usage" in hidden and reply.pop("usage", None) is not None:
        removed = True
    return not removed or "error" in reply or any(not _is_empty(choice) for choice in choices)


def _remove_ids(reply: dict[str, Any], choices: Sequence[dict[str, Any]]) -> bool:
    removed = reply.pop("prompt_token_ids", None) is not None
    for choice in choices:
        for name in _CHOICE_IDS:
            removed = choice.pop(name, None) is not None or removed
    extension = extension_of(reply)
    for name in ("input_ids", "output_ids"):
        removed = extension.pop(name, None) is not None or removed
    if not extension and "sglext" in reply:
        del reply["sglext"]
    return removed


def _remove_logprobs(choice: dict[str, Any]) -> bool:
    value = choice.get("logprobs")
    if value is None:
        return False
    if entry_ids_of(value) is not None:  # llama.cpp, which leaves the field out unless it is asked for
        del choice["logprobs"]
    else:
        choice["logprobs"] = None
    return True


def _is_empty(choice: dict[str, Any]) -> bool:
    """Whether a chunk of a choice says nothing. Text completions also have such chunks of their own."""
    if choice.get("delta") != {}:
        return False
    return all(value is None for name, value in choice.items() if name not in ("index", "delta"))


# --- Pieces of replies -----------------------------------------------------------------------------------


def choices_of(reply: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the choices of a reply, or of a chunk of one, that are objects."""
    choices = reply.get("choices")
    if not isinstance(choices, list):
        return []
    return [cast("dict[str, Any]", choice) for choice in cast("list[Any]", choices) if isinstance(choice, dict)]


def has_content(choice: dict[str, Any]) -> bool:
    """Whether a chunk of a choice says anything but who speaks."""
    delta = object_of(choice.get("delta"))
    return bool(choice.get("text")) or any(delta[name] for name in delta if name != "role")


def object_of(value: object) -> dict[str, Any]:
    """Return ``value`` itself if it is an object, else an empty one."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def extension_of(reply: dict[str, Any]) -> dict[str, Any]:
    """Return what SGLang says beyond OpenAI's fields."""
    return object_of(reply.get("sglext"))


def output_ids_of(extension: dict[str, Any], place: int) -> Sequence[int] | None:
    """Return the ids of one choice from what SGLang says of all of them."""
    lists = extension.get("output_ids")
    if not isinstance(lists, list) or not lists:
        return None
    found = cast("list[Any]", lists)
    if integers_of(found) is not None:  # of the only choice
        return integers_of(found) if place == 0 else None
    return integers_of(found[place]) if place < len(found) else None


def read_head_and_usage(head: dict[str, Any], usage: object, record: RecordedReply) -> None:
    """Read what a reply says of itself, and its usage."""
    record.response_id, record.model, record.fingerprint = (
        value if isinstance(value := head.get(name), str) and value else None
        for name in ("id", "model", "system_fingerprint")
    )
    record.input_tokens, record.output_tokens = (
        value if _is_int64(value := object_of(usage).get(name)) else None
        for name in ("prompt_tokens", "completion_tokens")
    )


def _is_int64(value: object) -> TypeIs[int]:
    """Whether it is an integer that a span can hold. JSON has larger ones."""
    return type(value) is int and -(2**63) <= value < 2**63


def integers_of(value: object) -> Sequence[int] | None:
    """Return ``value`` if it is a list of integers that a span can hold."""
    if isinstance(value, list) and all(map(_is_int64, cast("list[Any]", value))):
        return cast("list[int]", value)
    return None


def _entries_of(value: object) -> list[Any] | None:
    """Return the entries of a chat's log-probabilities, one for each token."""
    content = object_of(value).get("content")
    return cast("list[Any]", content) if isinstance(content, list) else None


def entry_ids_of(value: object) -> Sequence[int] | None:
    """Return the token ids that llama.cpp says in the entries of log-probabilities."""
    entries = _entries_of(value)
    if not entries or not isinstance(entries[0], dict) or "id" not in entries[0]:
        return None
    return integers_of([object_of(entry).get("id") for entry in entries])


def logprobs_of(value: object) -> Sequence[float] | None:
    """Return the log-probability of each token from the ``logprobs`` of a choice: a chat's or a text completion's."""
    entries = _entries_of(value)
    if entries is None:
        numbers = object_of(value).get("token_logprobs")
    else:
        numbers = [object_of(entry).get("logprob") for entry in entries]
    if not isinstance(numbers, list) or not all(type(each) in (float, int) for each in cast("list[Any]", numbers)):
        return None
    try:
        return [float(each) for each in cast("list[float]", numbers)]
    except OverflowError:
        return None
