"""Sends a call to a backend: which one, with what asked for, and how often again.

A call is repeated only before the first byte of a reply has come, and only when the backend could not be reached or
said that it is busy or broken. What a backend refuses (4xx) is the agent's to know.
"""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from typing import Any

import aiohttp
import msgspec

from agentlightning.proxy.capture import CallKind, Capabilities, added_to, missing_asks, refused_in
from agentlightning.proxy.errors import Refused
from agentlightning.proxy.models import Ask, Backend
from agentlightning.proxy.recording import CallRecord, Question

# --- Which backend answers: the same one for all calls of a rollout, as long as it is well ---

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


# ---

_logger = logging.getLogger(__name__)

_PATHS: dict[CallKind, str] = {"chat": "/chat/completions", "text_completion": "/completions"}
_REPEATED = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another try may not get."""
_ABOUT_THE_REQUEST = frozenset({400, 422})
"""Statuses of a backend that does not know a field of the request."""
_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 8.0
_CONNECT_SECONDS = 10.0
_MAX_ERROR_BYTES = 1024 * 1024
_LARGE_BYTES = 512 * 1024
"""Larger bodies are written piece by piece, so that the loop does other things in between."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A backend's reply, of which only the head has come."""

    response: aiohttp.ClientResponse
    backend: Backend
    asks: frozenset[Ask]
    """What only the proxy asked for."""


class Upstream:
    """The way to the backends. To be used from one event loop.

    Args:
        session: the connections.
        num_retries: how often a call is tried again.
        wanted: what to ask backends for beyond what agents ask.
        pause: waits so many seconds.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        num_retries: int,
        wanted: frozenset[Ask],
        pause: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        self._session = session
        self._num_retries = num_retries
        self._wanted = wanted
        self._pause = pause
        self._capabilities = Capabilities()

    @asynccontextmanager
    async def call(
        self, routing: Routing, order: Sequence[Backend], question: Question, record: CallRecord
    ) -> AsyncGenerator[Reply]:
        """Send the call; inside of the block its reply can be read, afterwards the connection is let go.

        Args:
            order: backends in the order to try them.
            record: is told the backend and the number of retries.

        Raises:
            Refused: no backend could be reached (502), or it was silent for too long (504).
        """
        reply = await self._open(routing, order, question, record)
        try:
            yield reply
        finally:
            # Closes the connection of a reply that was not read to its end: the backend stops generating.
            reply.response.close()

    async def _open(self, routing: Routing, order: Sequence[Backend], question: Question, record: CallRecord) -> Reply:
        last = self._num_retries
        for number in range(last + 1):
            backend = order[number % len(order)]
            record.backend, record.retries = backend.name, number
            pause = self._pause_after(number, len(order))
            try:
                reply = await self._send(backend, question, record.kind)
            except TimeoutError as error:
                if not isinstance(error, aiohttp.ConnectionTimeoutError):
                    raise Refused(
                        504,
                        "backend_timeout",
                        f"The backend {backend.name} sent nothing for {backend.timeout_seconds:g} s; "
                        "raise the 'timeout' of its entry in the model list if that is too short.",
                    ) from error
                problem = f"cannot be reached within {_CONNECT_SECONDS:g} s"
            except aiohttp.ClientError as error:
                problem = f"cannot be reached: {type(error).__name__}"
                _logger.debug("backend %s: %s", backend.name, error)
            else:
                status = reply.response.status
                wished = _retry_after_seconds(reply.response) if status in _REPEATED else None
                if status not in _REPEATED or number == last or (wished or 0.0) > _LONGEST_PAUSE_SECONDS:
                    if status in _REPEATED:
                        routing.failed(backend)
                    else:
                        routing.answered(backend)
                    return reply
                reply.response.close()
                problem, pause = f"answered {status}", max(pause, wished or 0.0)
            routing.failed(backend)
            if number == last:
                raise Refused(
                    502,
                    "backend_unreachable",
                    f"The backend {backend.name} {problem} (tried {last + 1} times); is it running?",
                )
            _logger.info("backend %s %s; try %d of %d follows", backend.name, problem, number + 2, last + 1)
            await self._pause(pause)
        raise AssertionError("the last try returns or raises")

    @staticmethod
    def _pause_after(number: int, backends: int) -> float:
        """Seconds before the next try: none while there is a backend that was not tried, then more and more."""
        rounds = (number + 1) // backends
        if (number + 1) % backends:
            return 0.0
        longest = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** (rounds - 1))
        return random.uniform(longest / 2, longest)

    async def _send(self, backend: Backend, question: Question, kind: CallKind) -> Reply:
        """Send the call to one backend, without what it turns out not to know."""
        body = {**backend.defaults, **question.body, **backend.overrides, "model": backend.upstream_model}
        asks = self._capabilities.to_ask(backend, kind, missing_asks(kind, body, self._wanted))
        refused: frozenset[Ask] = frozenset()
        while True:
            response = await self._post(backend, kind, added_to(kind, body, asks))
            if 300 <= response.status < 400:
                response.close()
                raise Refused(
                    502,
                    "backend_redirected",
                    f"The backend {backend.name} answered with a redirect; give the URL that it leads to as api_base.",
                )
            if response.status in _ABOUT_THE_REQUEST and not self._capabilities.are_known(backend, kind, asks):
                error = await response.content.read(_MAX_ERROR_BYTES)
                response.close()
                fewer = asks - refused_in(error, asks)
                refused |= asks - fewer
                asks = fewer
                continue
            if response.status < 400 and not self._capabilities.are_known(backend, kind, asks | refused):
                self._capabilities.learn(backend, kind, asks, refused)
                if refused:
                    _logger.warning(
                        "backend %s cannot be asked for %s; spans of its calls will lack that",
                        backend.name,
                        ", ".join(sorted(refused)),
                    )
            return Reply(response, backend, asks)

    async def _post(self, backend: Backend, kind: CallKind, body: dict[str, Any]) -> aiohttp.ClientResponse:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **backend.headers}
        if backend.api_key:
            headers["Authorization"] = f"Bearer {backend.api_key}"
        data = msgspec.json.encode(body)
        return await self._session.post(
            backend.base_url + _PATHS[kind],
            data=BytesIO(data) if len(data) > _LARGE_BYTES else data,
            headers=headers,
            allow_redirects=False,  # a redirect would carry the key elsewhere
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=backend.timeout_seconds),
        )


def _retry_after_seconds(response: aiohttp.ClientResponse) -> float | None:
    """What ``Retry-After`` says (RFC 9110, 10.2.3): seconds, or a date."""
    value = response.headers.get("Retry-After", "")
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
