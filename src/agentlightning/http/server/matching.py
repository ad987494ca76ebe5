"""From a verb and a path to a route of the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from agentlightning.http.routes import DIALECTS, ROUTES, Dialect, Route


class Bound(NamedTuple):
    """A route below a prefix."""

    route: Route
    dialect: Dialect
    label: str
    """Verb and path with the names of arguments: for metrics and logs."""
    names: tuple[str, ...]
    """The arguments in the path, in order."""


class Match(NamedTuple):
    """What a request leads to."""

    bound: Bound
    values: Sequence[str]
    """The arguments in the path, in order."""


class RouteTable:
    """All routes below all prefixes, by path; arguments in a path are replaced by None for the look-up."""

    def __init__(self) -> None:
        self._whole: dict[str, dict[str, Bound]] = {}
        self._shapes: dict[tuple[str | None, ...], dict[str, Bound]] = {}
        self._holes: dict[int, list[tuple[int, ...]]] = {}
        """Where arguments may stand in a path, by its number of parts; those with the fewest arguments first."""
        for dialect in DIALECTS:
            for route in ROUTES:
                self._add(dialect, route)

    def find(self, verb: str, path: str) -> Match | None:
        """The route for ``verb`` and ``path``; None if there is none. One that is written out goes first."""
        whole = self._whole.get(path)
        if whole is not None and verb in whole:
            return Match(whole[verb], ())
        parts = path.split("/")
        for holes in self._holes.get(len(parts), ()):
            shape: list[str | None] = [*parts]
            for hole in holes:
                shape[hole] = None
            bound = self._shapes.get(tuple(shape), _NONE).get(verb)
            if bound is not None:
                return Match(bound, [parts[hole] for hole in holes])
        return None

    def verbs(self, path: str) -> list[str]:
        """The verbs that ``path`` takes; none if there is nothing under it."""
        return sorted(verb for verb in {route.verb for route in ROUTES} if self.find(verb, path) is not None)

    def _add(self, dialect: Dialect, route: Route) -> None:
        path = dialect.prefix + route.path
        parts = path.split("/")
        holes = tuple(number for number, part in enumerate(parts) if part.startswith("{"))
        bound = Bound(route, dialect, f"{route.verb} {path}", tuple(parts[hole][1:-1] for hole in holes))
        if not holes:
            self._whole.setdefault(path, {})[route.verb] = bound
            return
        shape = tuple(None if number in holes else part for number, part in enumerate(parts))
        self._shapes.setdefault(shape, {})[route.verb] = bound
        known = self._holes.setdefault(len(parts), [])
        if holes not in known:
            known.append(holes)
            known.sort(key=len)


_NONE: Mapping[str, Bound] = {}
