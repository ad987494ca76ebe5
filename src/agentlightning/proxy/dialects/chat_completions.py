"""OpenAI's chat completions (https://platform.openai.com/docs/api-reference/chat)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from agentlightning.proxy.dialects.openai import OpenAIDialect
from agentlightning.proxy.dialects.replies import PartialChoice


class ChatCompletions(OpenAIDialect):
    """``POST /v1/chat/completions``: messages in, messages out."""

    name = "chat_completions"
    operation = "chat"
    paths = ("/chat/completions",)
    backend_path = "/chat/completions"
    reply_object = "chat.completion"
    logprobs_request = True

    @override
    def choice_content(self, choice: PartialChoice) -> dict[str, Any]:
        return {"message": choice.message()}

    @override
    def asks_for_logprobs(self, body: Mapping[str, Any]) -> bool:
        return bool(body.get("logprobs"))
