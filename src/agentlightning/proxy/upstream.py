"""Sends calls to backends: to which one, with which capture fields, and how often again.

A call is repeated only before the first byte of a reply has come, and only when the backend could not be reached or
answered that it is busy or broken. Other errors of the backend (4xx) are passed on to the agent.
"""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from typing import Any

import aiohttp

from agentlightning.proxy.dialects.base import CaptureField, ModelRequest, ProxyError, WireDialect
from agentlightning.proxy.dialects.lenient import write_json
from agentlightning.proxy.models import ModelBackend
from agentlightning.proxy.recording import CallRecord

_logger = logging.getLogger(__name__)

_COOLDOWN_SECONDS = 5.0
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another try may not get."""
_ABOUT_THE_REQUEST = frozenset({400, 422})
"""Statuses of a backend that does not know a field of the request."""
_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 8.0
_CONNECT_SECONDS = 10.0
_MAX_ERROR_BYTES = 1024 * 1024
_LARGE_BYTES = 512 * 1024


class Routing:
    """The backends of each model, and which of them failed a moment ago.

    Args:
        backends: by the model's name.
        clock: monotonic seconds.
    """

    def __init__(
        self, backends: Mapping[str, tuple[ModelBackend, ...]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._backends = backends
        self._clock = clock
        self._turns = itertools.count()
        self._cooling_until: dict[str, float] = {}

    def models(self) -> list[str]:
        """Return the names of the models, in the order of the model list."""
        return list(self._backends)

    def order(self, model: str, rollout_id: str | None) -> list[ModelBackend]:
        """Return the backends of a model in the order to try them; those that failed a moment ago come last.

        All calls of a rollout go to one backend, because its prompt cache holds the rollout's earlier turns.
        Rendezvous hashing (Thaler and Ravishankar, 1998) chooses it: the choice is the same in every proxy and after
        a restart, and a backend that goes moves only its own rollouts.

        Args:
            rollout_id: None: each call begins with the next backend.

        Raises:
            ProxyError: there is no such model (404).
        """
        known = self._backends.get(model)
        if known is None:
            why = f"The model {model!r} does not exist here; this proxy serves: {', '.join(self._backends) or 'none'}"
            raise ProxyError(404, "model_not_found", why, param="model")
        if rollout_id is None or len(known) == 1:
            first = next(self._turns) % len(known)
            ordered = [*known[first:], *known[:first]]
        else:
            ordered = sorted(
                known, key=lambda each: blake2b(f"{each.name}\0{rollout_id}".encode(), digest_size=8).digest()
            )
        if self._cooling_until:
            now = self._clock()
            ordered.sort(key=lambda each: self._cooling_until.get(each.name, 0.0) > now)
        return ordered

    def failed(self, backend: ModelBackend) -> None:
        """Try other backends before this one for the next few seconds."""
        self._cooling_until[backend.name] = self._clock() + _COOLDOWN_SECONDS

    def answered(self, backend: ModelBackend) -> None:
        """Try this backend first again where it comes first."""
        self._cooling_until.pop(backend.name, None)


@dataclass(frozen=True, slots=True)
class UpstreamReply:
    """A backend's reply, of which only the head has come."""

    response: aiohttp.ClientResponse
    backend: ModelBackend
    hidden: frozenset[CaptureField]
    """The capture fields that only the proxy asked for."""


class Upstream:
    """The way to the backends. Used by one event loop.

    It finds out which capture fields each backend accepts on each wire. A backend that refuses a request with capture
    fields may refuse the fields or the request itself. The request is therefore repeated without the fields, and only
    a repeat that succeeds proves that they were the reason.

    Args:
        client: the connections.
        routing: models and backends; may be replaced.
        num_retries: how often a call is tried again.
        capture: the capture fields to ask for.
    """

    def __init__(
        self, client: aiohttp.ClientSession, routing: Routing, *, num_retries: int, capture: frozenset[CaptureField]
    ) -> None:
        self.routing = routing
        self._client = client
        self._num_retries = num_retries
        self._capture = capture
        self._accepts: dict[tuple[str, str, CaptureField], bool] = {}
        """What was found out, by the names of backend and dialect."""

    @asynccontextmanager
    async def call(self, request: ModelRequest, record: CallRecord) -> AsyncGenerator[UpstreamReply]:
        """Send a call of an agent; its reply can be read inside of the block.

        Args:
            request: the request of the agent.
            record: is told the backend and the number of retries.

        Raises:
            ProxyError: there is no such model (404), no backend of it could be reached (502), or one sent nothing for
                too long (504).
        """
        reply = await self._send_until_answered(request, record)
        try:
            yield reply
        finally:
            # Closes the connection if the reply was not read to its end, so that the backend stops generating.
            reply.response.close()

    async def _send_until_answered(self, request: ModelRequest, record: CallRecord) -> UpstreamReply:
        routing = self.routing  # one for all tries, also if it is replaced meanwhile
        order = routing.order(request.model, record.origin and record.origin.rollout_id)
        for number in range(self._num_retries + 1):
            backend = order[number % len(order)]
            is_last = number == self._num_retries
            record.backend, record.retries = backend.name, number
            pause = _pause_seconds(number, len(order))
            reply = await self._try(backend, request, record.dialect)
            if isinstance(reply, UpstreamReply):
                status = reply.response.status
                if status not in _RETRIED:
                    routing.answered(backend)
                    return reply
                wished = _retry_after_seconds(reply.response) or 0.0
                routing.failed(backend)
                if is_last or wished > _LONGEST_PAUSE_SECONDS:  # the agent can wait longer than its call may
                    return reply
                reply.response.close()
                reply, pause = f"answered {status}", max(pause, wished)
            routing.failed(backend)
            if is_last:
                why = f"The backend {backend.name} {reply} (tried {number + 1} times); is it running?"
                raise ProxyError(502, "backend_unreachable", why)
            _logger.info("backend %s %s; retry %d of %d follows", backend.name, reply, number + 1, self._num_retries)
            await asyncio.sleep(pause)
        raise AssertionError("the last try returns or raises")

    async def _try(self, backend: ModelBackend, request: ModelRequest, dialect: WireDialect) -> UpstreamReply | str:
        """Send the call to one backend; returns why it cannot be reached, if so."""
        try:
            return await self._send(backend, request, dialect)
        except aiohttp.ConnectionTimeoutError:
            return f"cannot be reached within {_CONNECT_SECONDS:g} s"
        except TimeoutError as error:
            # Not retried: the backend may still be generating, and a repeat would double its load.
            why = (
                f"The backend {backend.name} sent nothing for {backend.timeout_seconds:g} s; "
                "raise the 'timeout' of its entry in the model list if that is too short."
            )
            raise ProxyError(504, "backend_timeout", why) from error
        except aiohttp.ClientError as error:
            _logger.debug("backend %s: %s", backend.name, error)
            return f"cannot be reached: {type(error).__name__}"

    async def _send(self, backend: ModelBackend, request: ModelRequest, dialect: WireDialect) -> UpstreamReply:
        """Send the call to one backend, without the capture fields that it turns out to refuse."""
        body = {**backend.defaults, **request.body, **backend.overrides, "model": backend.upstream_model}
        fields = dialect.missing_capture(body, self._capture)
        if backend.capture is not None:
            fields &= backend.capture
        else:
            fields -= {each for each in fields if not self._accepts.get((backend.name, dialect.name, each), True)}
        refused: frozenset[CaptureField] = frozenset()
        while True:
            response = await self._post(backend, dialect, dialect.add_capture(body, fields) if fields else body)
            status = response.status
            if 300 <= status < 400:
                response.close()
                why = f"The backend {backend.name} answered with a redirect; give the URL that it leads to as api_base."
                raise ProxyError(502, "backend_redirected", why)
            if backend.capture is not None:  # the operator said what it accepts: an error is about the request
                return UpstreamReply(response, backend, fields)
            if status in _ABOUT_THE_REQUEST and not self._are_accepted(backend, dialect, fields):
                error = await response.content.read(_MAX_ERROR_BYTES)
                response.close()
                blamed = dialect.blamed_capture(error, fields)
                fields, refused = fields - blamed, refused | blamed
                continue
            if status < 400 and not self._are_accepted(backend, dialect, fields | refused):
                for each in fields | refused:
                    self._accepts[backend.name, dialect.name, each] = each in fields
                if refused:
                    names = ", ".join(sorted(refused))
                    _logger.warning("backend %s cannot be asked for %s; its spans will lack that", backend.name, names)
            return UpstreamReply(response, backend, fields)

    def _are_accepted(self, backend: ModelBackend, dialect: WireDialect, fields: Iterable[CaptureField]) -> bool:
        """Whether the backend has accepted all these fields before, so that a refusal is about the request."""
        return all(self._accepts.get((backend.name, dialect.name, each), False) for each in fields)

    async def _post(self, backend: ModelBackend, dialect: WireDialect, body: dict[str, Any]) -> aiohttp.ClientResponse:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **backend.headers}
        if backend.api_key:
            headers["Authorization"] = f"Bearer {backend.api_key}"
        data = write_json(body)
        return await self._client.post(
            backend.base_url + dialect.backend_path,
            # A large body is written in pieces, so that other calls go on in between.
            data=BytesIO(data) if len(data) > _LARGE_BYTES else data,
            headers=headers,
            allow_redirects=False,  # a redirect would carry the key elsewhere
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=backend.timeout_seconds),
        )


def _pause_seconds(number: int, backends: int) -> float:
    """Return how long to wait after try ``number``: not at all while a backend is untried, then twice as long per
    round, with jitter so that calls which failed together do not return together."""
    rounds = (number + 1) // backends
    if (number + 1) % backends:
        return 0.0
    longest = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** (rounds - 1))
    return random.uniform(longest / 2, longest)


def _retry_after_seconds(response: aiohttp.ClientResponse) -> float | None:
    """Read ``Retry-After`` (RFC 9110, 10.2.3): seconds, or a date."""
    value = response.headers.get("Retry-After", "")
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
