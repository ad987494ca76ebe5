"""`ModelProxy`: what algorithms ask of an LLM proxy, which is above them and imports none of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from agentlightning.store.base import LightningStore
from agentlightning.types import LLM


class ModelProxy(Protocol):
    """Forwards agents' model calls to backends by model name, and records every call with its attempt."""

    @property
    def model_list(self) -> Sequence[Any]:
        """The backends, as they were given to `update_model_list`."""
        ...

    def get_store(self) -> LightningStore | None:
        """Return the store that calls are recorded in, if there is one."""
        ...

    def set_store(self, store: LightningStore) -> None:
        """Set the store that calls are recorded in."""
        ...

    def is_running(self) -> bool:
        """Return whether it accepts calls."""
        ...

    def start(self) -> Awaitable[None]:
        """Begin to accept calls."""
        ...

    def stop(self) -> Awaitable[None]:
        """Stop, and free the port. May be called again."""
        ...

    def update_model_list(self, model_list: list[Any]) -> None:
        """Replace the backends, also while it runs."""
        ...

    def as_resource(
        self,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
        model: str | None = None,
        sampling_parameters: dict[str, Any] | None = None,
    ) -> LLM:
        """Return the resource by which an agent reaches it."""
        ...

    def pause(self) -> Awaitable[Any]:
        """Accept no new calls, and return when those in progress have ended."""
        ...

    def resume(self) -> Awaitable[None]:
        """Accept calls again."""
        ...

    def set_model_version(self, version: str) -> None:
        """Set the version of the weights that answer from now on; every recorded call carries it."""
        ...

    def impose_sampling(self, parameters: Mapping[str, float | None], model: str) -> None:
        """Replace sampling parameters in the calls that training rollouts make to a model; empty: in none."""
        ...


@asynccontextmanager
async def running_proxy(proxy: ModelProxy, store: LightningStore) -> AsyncGenerator[None]:
    """Have the proxy running inside the block. It is stopped after, unless it was running before.

    Args:
        proxy: is started if it is not running.
        store: it records calls here if it has no store yet.
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
