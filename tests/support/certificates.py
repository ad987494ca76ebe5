"""Certificates for servers of tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["self_signed"]


def self_signed(folder: Path, *names: str) -> tuple[Path, Path]:
    """A certificate that nobody else has signed, and its key; both are made in ``folder``.

    Args:
        folder: where.
        names: names and addresses that it is for; default: 127.0.0.1.
    """
    given = names or ("127.0.0.1",)
    alternatives = ",".join(f"{'IP' if each[0].isdigit() else 'DNS'}:{each}" for each in given)
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", f"/CN={given[0]}", "-addext", f"subjectAltName={alternatives}"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key
