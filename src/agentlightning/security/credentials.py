"""What a client shows to a server, and what it accepts of it: the key, and the server's certificate."""

from __future__ import annotations

from typing import NamedTuple

from agentlightning.security.local_servers import find_local
from agentlightning.security.tls import AnyPath, TlsTrust
from agentlightning.settings import LightningEnvVar, resolve_str_env_var


class Credentials(NamedTuple):
    """For one server."""

    api_key: str | None
    trust: TlsTrust

    @property
    def headers(self) -> dict[str, str]:
        """The headers that present the key."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def credentials_for(
    url: str,
    api_key: str | None = None,
    *,
    tls_ca_file: AnyPath | None = None,
    tls_certificate: AnyPath | None = None,
) -> Credentials:
    """What to use with the server at ``url``.

    Args:
        url: its root, without a key.
        api_key: the key, where the caller was given one. Default: the one that a server of this user on this machine
            has made for itself, else ``AGL_API_KEY``.
        tls_ca_file: the authorities that its certificate is checked with. Default: ``AGL_TLS_CA_FILE``.
        tls_certificate: its certificate, where the caller belongs to it. Default: that of such a server.
    """
    local = find_local(url)
    key = api_key or (local and local.api_key) or resolve_str_env_var(LightningEnvVar.AGL_API_KEY) or None
    ca_file = resolve_str_env_var(LightningEnvVar.AGL_TLS_CA_FILE) if tls_ca_file is None else str(tls_ca_file)
    certificate = (local and local.certificate) if tls_certificate is None else str(tls_certificate)
    return Credentials(key, TlsTrust(ca_file or None, certificate))
