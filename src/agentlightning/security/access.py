"""Who may do what: the one place where a policy decides about a request, before its handler runs."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

Permission = Literal["read", "submit", "run", "operate"]
"""What a route needs. ``read``: look at everything. ``submit``: make and change rollouts and resources (an algorithm).
``run``: claim, report, trace (a runner). ``operate``: direct workers, delete."""


class Principal(NamedTuple):
    """Who sends a request, as far as the server knows."""

    name: str
    """``key`` for a caller that has shown the API key, ``anonymous`` for any other."""
    address: str | None = None
    """Where the request comes from, as far as the connection tells. Behind a reverse proxy it is that one's."""


ANONYMOUS, KEY_HOLDER = Principal("anonymous"), Principal("key")


class AccessPolicy(Protocol):
    """Decides what a caller may do. A server takes any object with this method."""

    def authorize(self, principal: Principal, permission: Permission) -> None:
        """Return if the principal has the permission.

        Raises:
            NotAllowed: it does not.
        """
        ...


class AllowAll:
    """The policy of a server without roles: who is let in may do everything."""

    def authorize(self, principal: Principal, permission: Permission) -> None:
        """Allow it."""
