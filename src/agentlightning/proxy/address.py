"""Where a proxy listens, and the address by which agents reach it."""

from __future__ import annotations

from urllib.parse import urlsplit

from agentlightning.errors import InvalidValue
from agentlightning.security.hosts import EVERY_ADDRESS, is_loopback, outward_address, url_of
from agentlightning.security.tls import Serving, TlsFiles

LOOPBACK = "127.0.0.1"


class ProxyAddress:
    """Where a proxy listens, and the address by which agents reach it.

    Args:
        host: the name or address to listen on. None: where the run of the proxy serves its store, else only this
            machine.
        port: None or 0: that of ``public_url``, if that leads straight here, else any free one.
        public_url: how agents reach it, if not by host and port.
        tls: for HTTPS. None: as the run serves its store, if others can reach that.

    Raises:
        InvalidValue: ``public_url`` is no URL.
    """

    def __init__(self, host: str | None, port: int | None, public_url: str | None, tls: TlsFiles | None) -> None:
        self._given_host = host
        self._given_tls = tls
        self._beside: Serving | None = None
        self._public_url = None if public_url is None else public_url.rstrip("/").removesuffix("/v1")
        self._wanted_port = port or self._public_port()
        self._bound_port: int | None = None

    def follow(self, serving: Serving | None) -> None:
        """Listen where a store is served, as far as nothing else was given. For the next start."""
        self._beside = serving

    def note_port(self, port: int) -> None:
        """Note the port that was bound."""
        self._bound_port = port

    def keep_port(self) -> None:
        """Take the port that was bound last at the next start, too."""
        self._wanted_port = self._wanted_port or self._bound_port or 0

    @property
    def host(self) -> str:
        """The name or address to listen on."""
        return self._given_host or (LOOPBACK if self._beside is None else self._beside.host)

    @property
    def port(self) -> int:
        """The port to listen on; 0: any free one."""
        return self._wanted_port

    @property
    def tls(self) -> TlsFiles | None:
        """The files for HTTPS; None: plain HTTP."""
        if self._given_tls is not None or self._beside is None or is_loopback(self.host):
            return self._given_tls
        return self._beside.tls

    @property
    def url(self) -> str:
        """Where agents reach the proxy, without ``/v1``.

        Raises:
            InvalidValue: its port is not known before it has been started.
        """
        if self._public_url is not None:
            return self._public_url
        port = self._bound_port or self._wanted_port
        if not port:
            raise InvalidValue("the proxy takes any free port, so its URL is known after start(); or give it a port")
        return url_of(self._handed_out_host, port, "http" if self.tls is None else "https")

    @property
    def is_private(self) -> bool:
        """Whether the address leads to the machine that uses it, whichever that is."""
        return self._public_url is None and is_loopback(self._handed_out_host)

    def why_no_guests(self) -> str | None:
        """Why agents on other machines cannot reach the proxy, with what to do; None: they can."""
        if not self.is_private:
            return None
        if self.host in EVERY_ADDRESS:
            why = "because this machine has no other address"
        elif self._given_host is not None:
            why = f"because it has host={self._given_host!r}; without that it would listen where the store is served"
        else:
            why = "because it listens where the store is served"
        return (
            f"the LLM proxy hands out {self._handed_out_host}, which leads every machine to itself, {why}. "
            "LLMProxy(public_url='http://NAME:PORT') gives the address by which agents on other machines reach it"
        )

    @property
    def _handed_out_host(self) -> str:
        return (outward_address() or LOOPBACK) if self.host in EVERY_ADDRESS else self.host

    def _public_port(self) -> int:
        """The port in the public URL, if the proxy itself can answer there; 0: there is none."""
        if self._public_url is None:
            return 0
        try:
            parts = urlsplit(self._public_url)
            port, host = parts.port, parts.hostname
        except ValueError:
            parts = port = host = None
        if parts is None or parts.scheme not in ("http", "https") or not host:
            raise InvalidValue(f"public_url {self._public_url!r} is no URL; give one like http://gpu-1:4748")
        return port or 0 if parts.scheme == ("http" if self._given_tls is None else "https") else 0
