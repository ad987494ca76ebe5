"""What an algorithm needs of the LLM proxy. `LLMProxy` has it; so may a proxy of the user's own."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from agentlightning.store.base import LightningStore
from agentlightning.types import LLM

__all__ = ["ModelProxy"]


class ModelProxy(Protocol):
    """Records the model calls of every attempt, and says which backend answers for which model."""

    @property
    def model_list(self) -> Sequence[Any]:
        """The backends, as `update_model_list` was given them."""
        ...

    def get_store(self) -> LightningStore | None:
        """Where the calls are recorded."""
        ...

    def set_store(self, store: LightningStore) -> None:
        """Say where the calls are to be recorded."""
        ...

    def is_running(self) -> bool:
        """Whether it takes calls."""
        ...

    def start(self) -> Awaitable[None]:
        """Begin to take calls."""
        ...

    def stop(self) -> Awaitable[None]:
        """End, and free the port. May be called again."""
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
        """Take no new calls, and return when those under way are done."""
        ...

    def resume(self) -> Awaitable[None]:
        """Take calls again."""
        ...

    def set_model_version(self, version: str) -> None:
        """Say which weights answer from now on; every call that is recorded carries it."""
        ...
