"""Which backend answers: the same one for all calls of a rollout, as long as it is well.

The order of a rollout's backends comes from rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings
to increase hit rates", 1998): no state, the same in every proxy and after every restart, and a backend that comes
or goes moves only its own rollouts. A backend's prompt cache profits from the calls of one rollout staying together.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from hashlib import blake2b

from agentlightning.proxy.models import Backend
from agentlightning.proxy.refusals import Refused

__all__ = ["Routing"]

_COOL_SECONDS = 5.0


class Routing:
    """Backends by model, and which of them failed a moment ago.

    Args:
        backends: by the model's name.
        clock: seconds that never jump.
    """

    def __init__(
        self, backends: Mapping[str, tuple[Backend, ...]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._backends = backends
        self._clock = clock
        self._turns = itertools.count()
        self._cool_until: dict[str, float] = {}

    def models(self) -> list[str]:
        """The names of the models, in the order of the list."""
        return list(self._backends)

    def order(self, model: str, rollout_id: str | None) -> list[Backend]:
        """The backends of a model, in the order to try them: those that failed a moment ago come last.

        Args:
            rollout_id: keeps the order; None: each call begins with the next one.

        Raises:
            Refused: there is no such model (404).
        """
        known = self._backends.get(model)
        if known is None:
            raise Refused(
                404,
                "model_not_found",
                f"The model {model!r} does not exist here; this proxy serves: {', '.join(self._backends) or 'none'}",
                param="model",
            )
        if len(known) == 1:
            return [known[0]]
        if rollout_id is None:
            first = next(self._turns) % len(known)
            ordered = [*known[first:], *known[:first]]
        else:
            ordered = sorted(known, key=lambda backend: _weight(backend.name, rollout_id))
        if self._cool_until:
            now = self._clock()
            ordered.sort(key=lambda backend: self._cool_until.get(backend.name, 0.0) > now)
        return ordered

    def failed(self, backend: Backend) -> None:
        """This backend cannot be reached: others are tried before it, for a few seconds."""
        self._cool_until[backend.name] = self._clock() + _COOL_SECONDS

    def answered(self, backend: Backend) -> None:
        """This backend is well."""
        if self._cool_until:
            self._cool_until.pop(backend.name, None)


def _weight(backend: str, rollout_id: str) -> bytes:
    return blake2b(f"{backend}\0{rollout_id}".encode(), digest_size=8).digest()
