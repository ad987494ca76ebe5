"""Which route a request leads to, the call of the store, and the reply that its result makes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import msgspec

from agentlightning.errors import NotFound
from agentlightning.http.codec import encode_result, list_parts, page_parts
from agentlightning.http.routes import DIALECTS, ROUTES, Dialect, Route
from agentlightning.http.server.exchange import Reply
from agentlightning.http.server.intake import Intake
from agentlightning.store.base import LightningStore, sequence_ids_of
from agentlightning.store.records import Views
from agentlightning.store.span_json import span_json
from agentlightning.types import PaginatedResult

DIRECTIVE_HEADER = b"agl-directive"
"""In the reply to a claim of a worker that has been asked to drain or to stop: which of the two."""
_FEW_ITEMS = 16
_KEPT_BYTES = 512
"""What a call that waits keeps, and what it keeps of each rollout that it waits for."""


class Endpoint:
    """Answers one route below one prefix: asks the store, and makes a reply of what it returns.

    Args:
        route, dialect: which.
        store: the store, in the form that is served.
        gives_json: whether its methods return records as JSON, and take encoded spans.
    """

    def __init__(self, route: Route, dialect: Dialect, store: Any, *, gives_json: bool) -> None:
        self.route = route
        self.dialect = dialect
        self.intake = Intake(route, dialect, gives_json=gives_json)
        """Makes the arguments of ``call``."""
        self.may_wait = route.wait_argument is not None
        self.label = f"{route.verb} {dialect.prefix}{route.path}"
        """For metrics and logs."""
        self.direct = route.verb == "POST" and route.priority != "read"
        """Whether a small request may be answered without ASGI. Reads are not, because their replies may be large."""
        self._store = store
        self._is_claim = route.method == "dequeue_many_rollouts"
        method = "add_span_drafts" if self.intake.keeps_spans else route.method
        self.call = self._claim if self._is_claim else getattr(store, method)
        """Asks the store; its result is for ``reply``."""

    def waits(self, arguments: dict[str, Any]) -> bool:
        """Whether a call with these arguments may wait for something to happen in the store."""
        return arguments.get(self.route.wait_argument or "", 0) > 0

    def kept_bytes(self, arguments: dict[str, Any]) -> int:
        """About how many bytes a call with these arguments keeps while it waits."""
        return _KEPT_BYTES * (1 + len(arguments.get("rollout_ids", ())))

    def reply(self, result: Any, arguments: dict[str, Any]) -> Reply:
        """The reply to a call. Raises ``NotFound`` if the store does not know the id."""
        route = self.route
        if route.unknown_is_none and result is None:
            if self.dialect.unknown_is_null:
                return Reply(200, b"null")
            [name] = route.in_path
            raise NotFound(f"there is no {name.removesuffix('_id')} {arguments[name]!r} in this store")
        if isinstance(result, Reply):
            return result
        if self.intake.keeps_spans:
            if not route.sends_sequence_ids:  # one span: as it is stored now, unless it was before
                [draft], [number] = arguments["drafts"], cast("Sequence[int]", result)
                stored = span_json(draft.rollout_id, draft.attempt_id, number, draft.body) if number else b"null"
                return Reply(route.status, stored)
        elif route.sends_sequence_ids:
            result = sequence_ids_of(arguments["spans"], cast("Sequence[Any]", result))
        if isinstance(result, PaginatedResult) and len(cast("PaginatedResult[Any]", result).items) > _FEW_ITEMS:
            page = cast("PaginatedResult[Any]", result)
            held = sum([len(each) for each in page.items if isinstance(each, bytes)])
            return _in_parts(route.status, page_parts(page))._replace(held_bytes=held)
        if isinstance(result, Views) and len(result) > _FEW_ITEMS:
            return _in_parts(route.status, list_parts(result))
        return Reply(route.status, encode_result(route, result))

    async def _claim(self, **arguments: Any) -> Any:
        """Claim; the reply to an empty claim says what its worker is asked to do."""
        if arguments.get("limit") == 0 and self.dialect.empty_limit_is_empty:
            return []
        clock = asyncio.get_running_loop().time
        began = clock()
        claimed = await self._store.dequeue_many_rollouts(**arguments)
        worker_id = arguments.get("worker_id")
        # A worker that is asked to drain or stop is answered before its time is up, so only then it is looked up.
        has_waited = 0 < arguments.get("wait_seconds", 0) <= clock() - began
        if claimed or worker_id is None or has_waited:
            return claimed
        worker = await self._store.get_worker_by_id(worker_id)
        if isinstance(worker, bytes):
            worker = msgspec.json.decode(worker, type=_Directed)
        if worker is None or worker.directive is None:
            return claimed
        return Reply(self.route.status, b"[]", ((DIRECTIVE_HEADER, worker.directive.encode()),))


def _in_parts(status: int, parts: Iterator[bytes]) -> Reply:
    """A reply with these parts; a plain one, if there is only one."""
    first, second = next(parts), next(parts, None)
    if second is None:
        return Reply(status, first)

    async def each() -> AsyncGenerator[bytes]:
        for part in chain((first, second), parts):
            yield part

    return Reply(status, parts=each())


class _Directed(msgspec.Struct):
    """What interests here of a worker's JSON."""

    directive: str | None = None


# --- From a verb and a path to a route -------------------------------------------------------------


class Match(NamedTuple):
    """What a request leads to."""

    endpoint: Endpoint
    ids: dict[str, str]
    """The arguments in the path, in order."""


_SHAPES: dict[tuple[str, str], Route] = {}
"""Routes by verb and path; arguments in the path are ``{}``."""
_HOLES: dict[int, list[tuple[int, ...]]] = {}
"""Where arguments may stand in a path, by its number of parts; those with the fewest arguments first."""
for _route in ROUTES:
    _SHAPES[_route.verb, re.sub(r"{\w+}", "{}", _route.path)] = _route
    _parts = _route.path.split("/")
    _places = tuple(number for number, part in enumerate(_parts) if part.startswith("{"))
    _HOLES[len(_parts)] = sorted({*_HOLES.get(len(_parts), ()), _places}, key=len)


class Endpoints:
    """The endpoints of a store, by verb and path; each is made when it is first needed.

    Args:
        store: any store. One that has a form which gives and takes JSON is used in that form.
    """

    def __init__(self, store: LightningStore) -> None:
        in_json = store.answering_in_json()
        self._store: Any = store if in_json is None else in_json
        self._gives_json = in_json is not None
        self._made: dict[tuple[Route, Dialect], Endpoint] = {}
        self._whole: dict[tuple[str, str], Match] = {}
        """What paths without arguments lead to."""

    def find(self, verb: str, path: str) -> Match | None:
        """What ``verb`` and ``path`` lead to; None if there is no route. One that is written out goes first."""
        found = self._whole.get((verb, path))
        if found is not None:
            return found
        for dialect in DIALECTS:
            if path.startswith(dialect.prefix):
                break
        else:
            return None
        parts = path[len(dialect.prefix) :].split("/")
        for holes in _HOLES.get(len(parts), ()):
            shape = [*parts]
            for hole in holes:
                shape[hole] = "{}"
            route = _SHAPES.get((verb, "/".join(shape)))
            if route is None or len(route.in_path) != len(holes):  # the path itself may have a part "{}"
                continue
            endpoint = self._made.get((route, dialect))
            if endpoint is None:
                endpoint = Endpoint(route, dialect, self._store, gives_json=self._gives_json)
                self._made[route, dialect] = endpoint
            match = Match(endpoint, dict(zip(route.in_path, [parts[hole] for hole in holes], strict=True)))
            if not holes:
                self._whole[verb, path] = match
            return match
        return None

    def verbs(self, path: str) -> Sequence[str]:
        """The verbs that ``path`` takes; none if there is nothing under it."""
        return sorted(verb for verb in {route.verb for route in ROUTES} if self.find(verb, path) is not None)
