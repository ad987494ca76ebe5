"""A small network of namespaces, whose cables can be pulled. Needs root and ``ip`` (iproute2)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Network", "network"]


class Network:
    """A server's namespace with a switch in it, and one namespace for each client.

    Args:
        clients: how many.
    """

    def __init__(self, clients: int) -> None:
        self._name = f"agl{os.getpid()}"
        self.clients = clients
        self.server_address = "10.77.0.1"

    def inside(self, client: int | None) -> tuple[str, ...]:
        """Words before a command that is to run with a client, or with the server (None)."""
        return ("ip", "netns", "exec", self._space(client))

    def name_server(self, name: str) -> None:
        """Let the clients know the server by a name."""
        for client in range(self.clients):
            folder = Path("/etc/netns", self._space(client))  # `ip netns exec` puts what is in it over /etc
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{self.server_address} {name}\n", encoding="utf-8")

    def cut(self, client: int) -> None:
        """Pull a client's cable: from now on nothing gets through, and nobody is told."""
        _ip("-n", self._space(None), "link", "set", f"v{client}", "down")

    def mend(self, client: int) -> None:
        """Plug it in again."""
        _ip("-n", self._space(None), "link", "set", f"v{client}", "up")

    def build(self) -> None:
        server = self._space(None)
        _ip("netns", "add", server)
        _ip("-n", server, "link", "add", "switch", "type", "bridge")
        _ip("-n", server, "addr", "add", f"{self.server_address}/24", "dev", "switch")
        _ip("-n", server, "link", "set", "switch", "up")
        _ip("-n", server, "link", "set", "lo", "up")
        for client in range(self.clients):
            space = self._space(client)
            _ip("netns", "add", space)
            _ip("-n", server, "link", "add", f"v{client}", "type", "veth", "peer", "name", "net", "netns", space)
            _ip("-n", server, "link", "set", f"v{client}", "master", "switch", "up")
            _ip("-n", space, "addr", "add", f"10.77.0.{client + 10}/24", "dev", "net")
            _ip("-n", space, "link", "set", "net", "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def remove(self) -> None:
        for client in [None, *range(self.clients)]:
            subprocess.run(["ip", "netns", "delete", self._space(client)], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns", self._space(client)), ignore_errors=True)

    def _space(self, client: int | None) -> str:
        return f"{self._name}-{'s' if client is None else client}"


@contextmanager
def network(clients: int) -> Iterator[Network]:
    """A network for the length of the block."""
    made = Network(clients)
    try:
        made.build()
        yield made
    finally:
        made.remove()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
