"""OpenAI's text completions (https://platform.openai.com/docs/api-reference/completions)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from agentlightning.proxy.dialects.openai import OpenAIDialect
from agentlightning.proxy.dialects.replies import PartialChoice


class Completions(OpenAIDialect):
    """``POST /v1/completions``: a prompt in, text out."""

    name = "completions"
    operation = "text_completion"
    paths = ("/completions",)
    backend_path = "/completions"
    reply_object = "text_completion"
    logprobs_request = 1
    """How many alternatives of each token are reported besides the one that was chosen; 0 is valid too."""

    @override
    def choice_content(self, choice: PartialChoice) -> dict[str, Any]:
        return {"text": choice.text()}

    @override
    def asks_for_logprobs(self, body: Mapping[str, Any]) -> bool:
        return bool(body.get("logprobs")) or type(body.get("logprobs")) is int
