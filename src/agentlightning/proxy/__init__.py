"""The LLM proxy: an OpenAI-compatible endpoint that records every model call of an attempt."""

from agentlightning.proxy.llm_proxy import LLMProxy, get_active_llm_proxy, set_active_llm_proxy
from agentlightning.proxy.models import ModelConfig

__all__ = ["LLMProxy", "ModelConfig", "get_active_llm_proxy", "set_active_llm_proxy"]
