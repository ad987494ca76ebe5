"""The proxy that runs in this process, for code that is not handed one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentlightning.errors import NotFound

if TYPE_CHECKING:
    from agentlightning.proxy.llm_proxy import LLMProxy

__all__ = ["forget_llm_proxy", "get_active_llm_proxy", "set_active_llm_proxy"]

_active: list[LLMProxy] = []
"""At most one. The interface of 0.3 is a pair of module functions, so its state belongs to the module."""


def get_active_llm_proxy() -> LLMProxy:
    """The proxy that was started last in this process.

    Raises:
        NotFound: there is none.
    """
    if not _active:
        raise NotFound("no LLM proxy is active in this process; start one, or call set_active_llm_proxy")
    return _active[0]


def set_active_llm_proxy(proxy: LLMProxy) -> None:
    """Make ``proxy`` the one that ``get_active_llm_proxy`` returns."""
    _active[:] = [proxy]


def forget_llm_proxy(proxy: LLMProxy) -> None:
    """There is no active proxy after, if ``proxy`` was it."""
    if _active and _active[0] is proxy:
        _active.clear()
