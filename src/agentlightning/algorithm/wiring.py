"""Decorators that hand an algorithm's method what the trainer gave the algorithm."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

from agentlightning.algorithm.base import Algorithm, ModelProxy
from agentlightning.errors import InvalidValue
from agentlightning.store.base import LightningStore

A = TypeVar("A", bound=Algorithm)
P = ParamSpec("P")
R = TypeVar("R")


def with_store(
    func: Callable[Concatenate[A, LightningStore, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[A, P], Coroutine[Any, Any, R]]:
    """Give the decorated method the algorithm's store as its first argument after ``self``.

    Raises:
        InvalidValue: when called: the algorithm has no store.
    """

    @functools.wraps(func)
    async def with_it(self: A, *args: P.args, **kwargs: P.kwargs) -> R:
        return await func(self, self.get_store(), *args, **kwargs)

    return with_it


@asynccontextmanager
async def running_proxy(proxy: ModelProxy, store: LightningStore) -> AsyncGenerator[None]:
    """A proxy that runs while the block does; one that ran before also runs after.

    Args:
        proxy: is started if it does not run.
        store: takes what it records, if it has no store yet.
    """
    if proxy.get_store() is None:
        proxy.set_store(store)
    if proxy.is_running():
        yield
        return
    await proxy.start()
    try:
        yield
    finally:
        await proxy.stop()


def with_llm_proxy(
    required: bool = False, auto_start: bool = True
) -> Callable[[Callable[..., Coroutine[Any, Any, Any]]], Callable[..., Coroutine[Any, Any, Any]]]:
    """Give the decorated method the algorithm's LLM proxy, or None, as its argument ``llm_proxy``.

    Args:
        required: an algorithm without a proxy is an error.
        auto_start: a proxy that does not run is started before the method and stopped after it. It records in
            the algorithm's store, if it has no store of its own.

    Raises:
        InvalidValue: when called: there is no proxy, and it is required; or it is to be started, and the
            algorithm has no store.
    """

    def decorate(func: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
        @functools.wraps(func)
        async def with_it(self: Algorithm, *args: Any, **kwargs: Any) -> Any:
            proxy = self.get_llm_proxy()
            if proxy is None and required:
                raise InvalidValue(
                    f"{type(self).__name__} needs an LLM proxy; pass llm_proxy= to the Trainer, or call set_llm_proxy()"
                )
            if proxy is None or not auto_start or proxy.is_running():
                return await func(self, *args, llm_proxy=proxy, **kwargs)
            async with running_proxy(proxy, self.get_store()):
                return await func(self, *args, llm_proxy=proxy, **kwargs)

        return with_it

    return decorate
