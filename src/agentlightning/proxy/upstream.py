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
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from typing import Any, NamedTuple

import aiohttp

from agentlightning.proxy.capture import CallKind, CaptureMemory
from agentlightning.proxy.dialects.base import (
    CAPTURE_FIELDS,
    FIRST_OF_EVENTS,
    CaptureField,
    EventSplitter,
    ModelRequest,
    ProxyError,
    WireDialect,
    data_of,
)
from agentlightning.proxy.dialects.lenient import read_object, write_json
from agentlightning.proxy.dialects.replies import choices_of, has_content, is_error
from agentlightning.proxy.models import ModelBackend
from agentlightning.proxy.recording import CallRecord

_logger = logging.getLogger(__name__)
_chance = random.SystemRandom().random
"""For jitter; not from the generator that a program in this process may have seeded."""

_COOLDOWN_SECONDS = 5.0
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another try may not get."""
_BUSY = frozenset({408, 425, 429})
"""Those of them that no field of a request causes."""
_ABOUT_THE_REQUEST = frozenset({400, 422, 501})
"""Statuses of a backend that does not know a field of the request, or cannot do what it asks for. Others (403, 404, 413
and so on) may be because of a field, too, but teach that only if they name it, or come again and again."""
_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 8.0
_CONNECT_SECONDS = 10.0
_MAX_ERROR_BYTES = 1024 * 1024
_MAX_BEGINNING_BYTES = 64 * 1024
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
    first: bytes = b""
    """What has been read of its body."""

    async def parts(self) -> AsyncGenerator[bytes]:
        """Yield the body in pieces, as they come."""
        if self.first:
            yield self.first
        async for part in self.response.content.iter_any():
            yield part


class _Unreached(NamedTuple):
    """A try that got no reply."""

    why: str
    hidden: frozenset[CaptureField] = frozenset()
    """The capture fields that it asked for, if they may be the reason."""


class Upstream:
    """The way to the backends. Used by one event loop.

    It finds out which capture fields each backend accepts for each kind of call. A backend that refuses a request with
    capture fields, or fails, may do so because of the fields or of the request itself. The request is therefore
    repeated without the fields before the agent gets such an answer, so that no agent sees an error that is not its
    own, and only a repeat that succeeds proves that they were the reason.

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
        self.client = client
        self._num_retries = num_retries
        self._capture = capture
        self._memory = CaptureMemory()

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
        turn = 0
        failed: frozenset[CaptureField] = frozenset()
        """What the last try asked for and failed with, so that this one goes to the same backend without."""
        for number in itertools.count():
            backend = order[turn % len(order)]
            is_last = number >= self._num_retries
            record.backend, record.retries = backend.name, number
            kind, capture = CallKind.of(backend, request, record.dialect), self._capture
            reply = await self._try(backend, request, record.dialect, frozenset() if failed else capture)
            status = reply.response.status if isinstance(reply, UpstreamReply) else None
            if isinstance(reply, UpstreamReply) and status not in _RETRIED:
                routing.answered(backend)
                if failed and reply.response.status < 400:
                    self._learn_failure(kind, failed)
                return reply
            if not failed and self._may_be_blamed(kind, reply.hidden, status, number, is_last=is_last):
                failed = reply.hidden
                if isinstance(reply, UpstreamReply):
                    reply.response.close()
                continue
            failed = frozenset()
            routing.failed(backend)
            pause = _pause_seconds(turn, len(order))
            if isinstance(reply, UpstreamReply):
                wished = _retry_after_seconds(reply.response) or 0.0
                if is_last or wished > _LONGEST_PAUSE_SECONDS:  # the agent can wait longer than its call may
                    return reply
                reply.response.close()
                pause = max(pause, wished)
            elif is_last:
                why = f"The backend {backend.name} {reply.why} (tried {number + 1} times); is it running?"
                raise ProxyError(502, "backend_unreachable", why)
            why = f"answered {status}" if isinstance(reply, UpstreamReply) else reply.why
            _logger.info("backend %s %s; retry %d of %d follows", backend.name, why, number + 1, self._num_retries)
            await asyncio.sleep(pause)
            turn += 1
        raise AssertionError("the last try returns or raises")

    def _learn(
        self,
        kind: CallKind,
        accepted: frozenset[CaptureField],
        refused: frozenset[CaptureField],
        failed: frozenset[CaptureField],
    ) -> None:
        """Note that a backend answered a call, and what it had refused or failed with before."""
        if failed:
            self._learn_failure(kind, failed)
        self._memory.learn(kind, accepted, refused)
        if refused:
            names = ", ".join(sorted(refused))
            _logger.warning("backend %s cannot be asked for %s; its spans will lack that", kind.backend, names)

    def _may_be_blamed(
        self, kind: CallKind, fields: frozenset[CaptureField], status: int | None, number: int, *, is_last: bool
    ) -> bool:
        """Whether a try that failed with capture fields is to be repeated without: at once after a 500, else before
        the agent gets the failure. Status None: the backend closed the connection."""
        if not fields or status in _BUSY:
            return False
        if status == 503:  # it says that it is busy: that has to last, and where fields were accepted it is true
            return is_last and number > 0 and not self._memory.are_accepted(kind, fields)
        return is_last or status == 500

    def _learn_failure(self, kind: CallKind, fields: frozenset[CaptureField]) -> None:
        """Note that a backend answered only without these fields, where it had failed with them."""
        names = ", ".join(sorted(fields))
        if self._memory.failed(kind, fields):
            _logger.warning("backend %s fails when asked for %s; its spans will lack that", kind.backend, names)
        else:
            _logger.info("backend %s failed when asked for %s; the span of this call lacks that", kind.backend, names)

    def _prepare(
        self, backend: ModelBackend, request: ModelRequest, dialect: WireDialect, capture: frozenset[CaptureField]
    ) -> tuple[dict[str, Any], frozenset[CaptureField], frozenset[CaptureField]]:
        """Return the body for a backend, which of the ``capture`` fields to ask for in it, and all that are missing."""
        body = {**backend.defaults, **request.body, **backend.overrides, "model": backend.upstream_model}
        wanted = dialect.missing_capture(body, capture)
        if backend.capture is not None:
            wanted &= backend.capture
        return body, self._memory.askable(CallKind.of(backend, request, dialect), wanted), wanted

    async def _try(
        self, backend: ModelBackend, request: ModelRequest, dialect: WireDialect, capture: frozenset[CaptureField]
    ) -> UpstreamReply | _Unreached:
        """Send the call to one backend."""
        try:
            return await self._send(backend, request, dialect, capture)
        except aiohttp.ConnectionTimeoutError:
            return _Unreached(f"cannot be reached within {_CONNECT_SECONDS:g} s")
        except TimeoutError as error:
            # Not retried: the backend may still be generating, and a repeat would double its load.
            why = (
                f"The backend {backend.name} sent nothing for {backend.timeout_seconds:g} s; "
                "raise the 'timeout' of its entry in the model list if that is too short."
            )
            raise ProxyError(504, "backend_timeout", why) from error
        except aiohttp.ClientError as error:
            _logger.debug("backend %s: %s", backend.name, error)
            is_down = isinstance(error, aiohttp.ClientConnectorError)
            asked = frozenset[CaptureField]() if is_down else self._prepare(backend, request, dialect, capture)[1]
            return _Unreached(f"cannot be reached: {type(error).__name__}", asked)

    async def _send(
        self, backend: ModelBackend, request: ModelRequest, dialect: WireDialect, capture: frozenset[CaptureField]
    ) -> UpstreamReply:
        """Send the call to one backend, without those of the ``capture`` fields that it turns out to refuse."""
        memory, kind = self._memory, CallKind.of(backend, request, dialect)
        body, fields, wanted = self._prepare(backend, request, dialect, capture)
        refused, failed = frozenset[CaptureField](), frozenset[CaptureField]()
        while True:
            # In headers can be asked for what the body may not ask for; servers that do not know them ignore them.
            headers, first, is_error = dialect.capture_headers(wanted - fields), b"", False
            response = await self._post(
                backend, dialect, dialect.add_capture(body, fields) if fields else body, headers
            )
            status = response.status
            if 300 <= status < 400:
                response.close()
                why = f"The backend {backend.name} answered with a redirect; give the URL that it leads to as api_base."
                raise ProxyError(502, "backend_redirected", why)
            is_accepted = memory.are_accepted(kind, fields | refused)
            if status >= 400:
                is_error = status not in _RETRIED and status != 401  # whose key is wrong is told so before all else
                first = await response.content.read(_MAX_ERROR_BYTES) if is_error and fields else b""
            elif not is_accepted:  # some servers say errors under a status of success; the first reply shows it
                first, is_error = await _read_beginning(response)
            is_named = is_error and dialect.blamed_capture(first, CAPTURE_FIELDS) != CAPTURE_FIELDS
            if is_error and fields and (is_named or not is_accepted):
                response.close()
                if is_named or status in _ABOUT_THE_REQUEST:
                    blamed = dialect.blamed_capture(first, fields)
                    fields, refused = fields - blamed, refused | blamed
                else:  # it may have another reason
                    fields, failed = frozenset[CaptureField](), fields
                continue
            if status < 400 and not is_error:
                self._learn(kind, fields, frozenset() if is_accepted else refused, failed)
            return UpstreamReply(response, backend, wanted if headers else fields, first)

    async def _post(
        self, backend: ModelBackend, dialect: WireDialect, body: dict[str, Any], more: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **more, **backend.headers}
        if backend.api_key:
            headers["Authorization"] = f"Bearer {backend.api_key}"
        data = write_json(body)
        return await self.client.post(
            backend.base_url + dialect.backend_path,
            # A large body is written in pieces, so that other calls go on in between.
            data=BytesIO(data) if len(data) > _LARGE_BYTES else data,
            headers=headers,
            allow_redirects=False,  # a redirect would carry the key elsewhere
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=backend.timeout_seconds),
        )


async def _read_beginning(response: aiohttp.ClientResponse) -> tuple[bytes, bool]:
    """Read a reply until it is seen whether it is an error: (what was read, whether it is). Of a stream, comments and
    chunks without content are read on: some servers send them before they know that they cannot answer."""
    read = b""
    while len(read) < _MAX_BEGINNING_BYTES:
        part = await response.content.readany()
        read += part
        verdict = _is_error_so_far(read)
        if verdict is not None or not part:
            return read, bool(verdict)
    return read, False


def _is_error_so_far(read: bytes) -> bool | None:
    """Whether the beginning of a reply is an error; None: nothing tells yet."""
    if not read.lstrip().startswith(FIRST_OF_EVENTS):
        return is_error(read_object(read) or {})
    for event in EventSplitter(len(read)).feed(read):
        data = data_of(event)
        chunk = None if data is None else read_object(data)
        if data is not None and chunk is None:
            return False
        if chunk is not None and is_error(chunk):
            return True
        if chunk is not None and any(has_content(each) or each.get("finish_reason") for each in choices_of(chunk)):
            return False
    return None


def _pause_seconds(number: int, backends: int) -> float:
    """Return how long to wait after try ``number``: not at all while a backend is untried, then twice as long per
    round, with jitter so that calls which failed together do not return together."""
    rounds = (number + 1) // backends
    if (number + 1) % backends:
        return 0.0
    longest = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** (rounds - 1))
    return longest * (0.5 + _chance() / 2)


def _retry_after_seconds(response: aiohttp.ClientResponse) -> float | None:
    """Read ``Retry-After`` (RFC 9110, 10.2.3): seconds, or a date."""
    value = response.headers.get("Retry-After", "")
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
