"""TLS: the files of a server, and how a client checks a server's certificate.

Everything of this package that serves takes the same two files, ``tls_certificate`` and ``tls_key``; everything that
calls one of these servers takes ``tls_ca_file``.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import NamedTuple

from agentlightning.errors import InvalidValue

_END = "-----END CERTIFICATE-----"

AnyPath = str | os.PathLike[str]


class TlsFiles(NamedTuple):
    """The files of an HTTPS server, in PEM."""

    certificate: Path
    """The server's certificate, and those that lead from it to its authority."""
    key: Path

    def server_context(self) -> ssl.SSLContext:
        """How a server with these files encrypts.

        Raises:
            InvalidValue: they cannot be used.
        """
        try:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise InvalidValue(f"the certificate or key for TLS cannot be used: {error}") from error
        return context


def tls_files(certificate: AnyPath | None, key: AnyPath | None) -> TlsFiles | None:
    """The files of a server, from its arguments; None: it serves plain HTTP.

    Raises:
        InvalidValue: one of the two is missing.
    """
    if (certificate is None) != (key is None):
        raise InvalidValue(
            "for HTTPS give both tls_certificate and tls_key (AGL_TLS_CERTIFICATE, AGL_TLS_KEY); for HTTP give neither"
        )
    return None if certificate is None or key is None else TlsFiles(Path(certificate), Path(key))


class Serving(NamedTuple):
    """Where a run serves its store, and so whatever else its runners have to reach."""

    host: str
    """The name or address to listen on."""
    tls: TlsFiles | None = None


class TlsTrust(NamedTuple):
    """Which certificates a client accepts."""

    ca_file: str | None = None
    """Those of the authorities in this file; None: in the system's, or in the one that ``SSL_CERT_FILE`` names."""
    certificate: str | None = None
    """Only the first one in this file, whatever its name: for a process that belongs to the server."""

    def context(self) -> ssl.SSLContext | None:
        """How a client with this trust checks; None: as programs do by default.

        Raises:
            InvalidValue: the file cannot be used.
        """
        try:
            if self.certificate is not None:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname = False  # the names in it are for others
                context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not be an authority's
                first, end, _ = Path(self.certificate).read_text(encoding="ascii").partition(_END)
                context.load_verify_locations(cadata=first + end)
                return context
            return None if self.ca_file is None else ssl.create_default_context(cafile=self.ca_file)
        except (OSError, ValueError) as error:
            raise InvalidValue(
                f"{self.certificate or self.ca_file!r} has no certificates that can be used: {error}"
            ) from error
