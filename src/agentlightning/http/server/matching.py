"""From a verb and a path to a route of the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    """All routes below all prefixes: a dictionary of whole paths, and one of shapes with holes."""

    def __init__(self) -> None:
        self._whole: dict[str, dict[str, Bound]] = {}
        self._shapes: dict[int, list[tuple[list[str | None], dict[str, Bound]]]] = {}
        for dialect in DIALECTS:
            for route in ROUTES:
                self._add(dialect, route)

    def find(self, verb: str, path: str) -> Match | None:
        """The route for ``verb`` and ``path``; None if there is none. One that is written out goes first."""
        whole = self._whole.get(path)
        if whole is not None and verb in whole:
            return Match(whole[verb], ())
        for by_verb, values in self._fitting(path):
            if verb in by_verb:
                return Match(by_verb[verb], values)
        return None

    def verbs(self, path: str) -> list[str]:
        """The verbs that ``path`` takes; none if there is nothing under it."""
        found = set(self._whole.get(path, ()))
        for by_verb, _ in self._fitting(path):
            found.update(by_verb)
        return sorted(found)

    def _fitting(self, path: str) -> Iterator[tuple[Mapping[str, Bound], Sequence[str]]]:
        parts = path.split("/")
        for shape, by_verb in self._shapes.get(len(parts), ()):
            values: list[str] = []
            for expected, part in zip(shape, parts, strict=True):
                if expected is None:
                    values.append(part)
                elif expected != part:
                    break
            else:
                yield by_verb, values

    def _add(self, dialect: Dialect, route: Route) -> None:
        path = dialect.prefix + route.path
        parts = path.split("/")
        names = tuple(part[1:-1] for part in parts if part.startswith("{"))
        bound = Bound(route, dialect, f"{route.verb} {path}", names)
        if not names:
            self._whole.setdefault(path, {})[route.verb] = bound
            return
        shape = [None if part.startswith("{") else part for part in parts]
        shapes = self._shapes.setdefault(len(parts), [])
        for known, by_verb in shapes:
            if known == shape:
                by_verb[route.verb] = bound
                return
        shapes.append((shape, {route.verb: bound}))
