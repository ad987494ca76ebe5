"""The server of a run's store: who may use it, and how the processes of the run and of its user find it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from agentlightning.errors import NotAllowed
from agentlightning.execution.run import RunSettings, ServerAccess
from agentlightning.security.access import Permission, Principal
from agentlightning.security.hosts import is_loopback, is_this_machine
from agentlightning.security.keys import new_key
from agentlightning.security.local_servers import LocalServer, announce
from agentlightning.store.base import LightningStore

if TYPE_CHECKING:
    from agentlightning.http.server.server import LightningStoreServer

_log = logging.getLogger(__name__)


@contextmanager
def served_store(
    settings: RunSettings,
    store: LightningStore,
    run_id: str,
    why_no_guests: str | None,
    on_refusal: Callable[[str], None],
) -> Generator[tuple[LightningStoreServer, ServerAccess], None, None]:
    """Serve the store for the length of the block. Without a key from the user, the server gets a new one.

    Args:
        settings: where, and with which key.
        store: what is served.
        run_id: the run.
        why_no_guests: why runners on other machines cannot work for it; None: they can.
        on_refusal: called with that, in any thread, when the first of them is refused.

    Yields:
        The server, and how processes on this machine reach it.
    """
    # Imported late, because a machine that only has runners does not need the server's framework.
    from agentlightning.http.server.server import LightningStoreServer

    if is_loopback(settings.server_host):
        why_no_guests = None  # no other machine reaches it
    key, tls = new_key() if settings.api_key is None else settings.api_key, settings.tls
    server = LightningStoreServer(
        store,
        settings.server_host,
        settings.server_port,
        api_key=key,
        run_id=run_id,
        tls_certificate=None if tls is None else tls.certificate,
        tls_key=None if tls is None else tls.key,
        access_policy=None if why_no_guests is None else GuestPolicy(why_no_guests, on_refusal),
    )
    server.take_port()
    certificate = None if tls is None else os.path.abspath(tls.certificate)
    database = getattr(store, "path", None)
    own_key = key if settings.api_key is None else None
    real_path = None if database is None else os.path.realpath(database)
    # Before it answers: a runner that waits for it would be refused, and take it for the server of somebody else.
    withdraw = announce(LocalServer(server.endpoint, own_key, real_path, certificate))
    try:
        server.start_blocking()
        _log.info("run %s is served at %s", run_id, server.endpoint)
        yield server, ServerAccess(server.endpoint, key or None, None, certificate)
    finally:
        withdraw()
        server.stop_blocking()


class GuestPolicy:
    """The access policy of a run for which runners on other machines cannot work: they are told so.

    Args:
        why: the reason.
        on_refusal: called with it, in the server's loop, when the first of them is refused.
    """

    def __init__(self, why: str, on_refusal: Callable[[str], None]) -> None:
        self._why = why
        self._on_refusal = on_refusal
        self._addresses: dict[str, bool] = {}
        """Whether they belong to this machine."""

    def authorize(self, principal: Principal, permission: Permission) -> None:
        """Refuse to let a caller on another machine run rollouts. Raises ``NotAllowed``."""
        address = principal.address
        if permission != "run" or address is None:
            return
        if address not in self._addresses:
            self._addresses[address] = is_this_machine(address)
            if not self._addresses[address]:
                _log.error("a runner at %s is refused: %s", address, self._why)
                self._on_refusal(self._why)
        if not self._addresses[address]:
            raise NotAllowed(self._why)
