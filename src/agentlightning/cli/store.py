"""`agl store`: serve a store in a process of its own."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentlightning.cli.options import LogLevel
from agentlightning.errors import InvalidValue

if TYPE_CHECKING:
    from agentlightning.store.engine import EngineStore


class _Format(StrEnum):
    CONSOLE = "console"
    JSON = "json"


class _Durability(StrEnum):
    FULL = "full"
    PROCESS = "process"
    NONE = "none"


_SERVE = "Serving"
_SAFE = "Who may come in"
_LOG = "Logging"

_Host = Annotated[str, typer.Option(envvar="AGL_SERVER_HOST", help="Address to listen on.", rich_help_panel=_SERVE)]
_Port = Annotated[
    int,
    typer.Option(envvar="AGL_SERVER_PORT", min=0, max=65535, help="0: any that is free.", rich_help_panel=_SERVE),
]
_Database = Annotated[
    str, typer.Option(help="Database file, made if it is not there; or 'memory'.", rich_help_panel=_SERVE)
]
_Durable = Annotated[
    _Durability,
    typer.Option(help="What an acknowledged write survives: full: power loss.", rich_help_panel=_SERVE),
]
_Key = Annotated[
    str | None,
    typer.Option(envvar="AGL_API_KEY", help="Secret that every request has to show.", rich_help_panel=_SAFE),
]
_AllowedHosts = Annotated[
    list[str] | None, typer.Option(help="Name under which the server is reached.", rich_help_panel=_SAFE)
]
_CorsOrigins = Annotated[
    list[str] | None, typer.Option(help="Web page that may use the server; '*': all.", rich_help_panel=_SAFE)
]
_Certificate = Annotated[Path | None, typer.Option(help="Certificate chain in PEM, for HTTPS.", rich_help_panel=_SAFE)]
_CertificateKey = Annotated[Path | None, typer.Option(help="Its private key in PEM.", rich_help_panel=_SAFE)]
_Level = Annotated[LogLevel, typer.Option(case_sensitive=False, help="debug logs every request.", rich_help_panel=_LOG)]
_LogFormat = Annotated[
    _Format | None, typer.Option(help="Default: console on a terminal, else json.", rich_help_panel=_LOG)
]
_LogFile = Annotated[Path | None, typer.Option(help="Log there, too; rotated when it is large.", rich_help_panel=_LOG)]


def store(
    host: _Host = "127.0.0.1",
    port: _Port = 4747,
    db: _Database = "agentlightning.db",
    durability: _Durable = _Durability.FULL,
    api_key: _Key = None,
    allowed_host: _AllowedHosts = None,
    cors_origin: _CorsOrigins = None,
    tls_cert: _Certificate = None,
    tls_key: _CertificateKey = None,
    log_level: _Level = LogLevel.INFO,
    log_format: _LogFormat = None,
    log_file: _LogFile = None,
) -> None:
    """Serve the store: queue, attempts, spans, resources.

    Prints one line, 'serving … at URL', when it answers. SIGTERM or Ctrl+C: finishes what it has begun, then ends.

    [bold]Examples[/bold]

      agl store
      agl store --db runs/today.db --port 0
      AGL_API_KEY=... agl store --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
    """
    from agentlightning.http.server.server import LightningStoreServer, run_service
    from agentlightning.telemetry.logs import setup_logging

    if (tls_cert is None) != (tls_key is None):
        raise typer.BadParameter("for HTTPS give both --tls-cert and --tls-key, for HTTP neither")
    setup_logging(log_level.value, format=None if log_format is None else log_format.value, files=log_file)
    served = _open(db, durability)
    server = LightningStoreServer(
        served,
        host,
        port,
        cors_origin or None,
        api_key=api_key,
        allowed_hosts=allowed_host or (),
        tls_certificate=tls_cert,
        tls_key=tls_key,
    )
    run_service(server, served, lambda: typer.echo(f"serving {db} at {server.endpoint}"))


def _open(db: str, durability: _Durability) -> EngineStore:
    from agentlightning.store.sqlite.store import InMemoryLightningStore, SqliteLightningStore

    if db == "memory":
        return InMemoryLightningStore()
    scheme, separator, rest = db.partition("://")
    if separator and scheme != "sqlite":
        raise InvalidValue(f"--db {db!r} is not possible here; give the path of a file, sqlite://PATH, or memory")
    return SqliteLightningStore(rest if separator else db, durability.value)
