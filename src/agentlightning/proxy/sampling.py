"""Imposed sampling: parameters that the proxy puts in place of those that agents of training rollouts send.

Learning from samples needs samples: an agent that asks for temperature 0, or pins a seed, gets the same reply in every
attempt, so no attempt is better than another. And the log-probabilities of a backend are those of its samples only if
nothing cuts or flattens the distribution.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from agentlightning.errors import AgentLightningError, InvalidValue
from agentlightning.proxy.dialects.base import ProxyError
from agentlightning.proxy.recording import CallRecord
from agentlightning.store.base import LightningStore

_IMPOSABLE = frozenset({
    "frequency_penalty", "min_p", "presence_penalty", "repetition_penalty", "seed", "temperature", "top_k", "top_p",
})  # fmt: skip
_REMEMBERED_ROLLOUTS = 10_000
_LOOK_UP_SECONDS = 10.0


def check_sampling(parameters: Mapping[str, Any]) -> dict[str, float | None]:
    """Return parameters to impose. Raises ``InvalidValue`` unless each is known, and a finite number or None."""
    unknown = sorted(set(parameters) - _IMPOSABLE)
    if unknown:
        raise InvalidValue(f"{', '.join(unknown)} cannot be imposed; what can be: {', '.join(sorted(_IMPOSABLE))}")
    for name, value in parameters.items():
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise InvalidValue(f"{name} is {value!r}; give a finite number, or None to remove it from calls")
    return dict(parameters)


class ImposedSampling:
    """Imposes parameters on the calls of rollouts in mode ``train``; those of all others stay as they are.

    Used by one event loop.

    Args:
        by_model: parameters by model, as ``check_sampling`` returns them; those of ``""`` hold for all models without
            some of their own. None removes a parameter.
        store: returns where the rollouts are.
    """

    def __init__(
        self, by_model: Mapping[str, Mapping[str, float | None]], store: Callable[[], LightningStore | None]
    ) -> None:
        self._by_model = by_model
        self._find_store = store
        self._modes = OrderedDict[str, str | None]()

    async def impose(self, record: CallRecord) -> None:
        """Change the request of a call, and note in its record what was asked and is sent instead.

        Raises:
            ProxyError: the store does not say which mode the rollout has (503); the call would be trained on as
                something that it is not.
        """
        request, origin = record.request, record.origin
        if request is None or origin is None:
            return
        parameters = self._by_model.get(request.model, self._by_model.get("", {}))
        if not parameters or await self._mode_of(origin.rollout_id) != "train":
            return
        body = dict(request.body)
        for name, value in parameters.items():
            if body.get(name) != value:
                record.imposed[name] = {"asked": body.get(name), "sent": value}
            body.pop(name, None)
            if value is not None:
                body[name] = value
        record.request = request._replace(body=body)

    async def _mode_of(self, rollout_id: str) -> str | None:
        if rollout_id not in self._modes:
            store = self._find_store()
            try:
                async with asyncio.timeout(_LOOK_UP_SECONDS):
                    rollout = None if store is None else await store.get_rollout_by_id(rollout_id)
            except (AgentLightningError, TimeoutError) as error:
                why = "The store does not say whether this call belongs to training; repeat it later."
                raise ProxyError(503, "store_behind", why, retry_after_seconds=1.0) from error
            if rollout is None:
                return None
            self._modes[rollout_id] = rollout.mode
            if len(self._modes) > _REMEMBERED_ROLLOUTS:
                self._modes.popitem(last=False)
        return self._modes[rollout_id]
