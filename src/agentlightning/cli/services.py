"""``agl store``, ``agl proxy`` and ``agl runner``: what goes on until a signal comes."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agentlightning.cli.target import ApiKey, Server, Target, Url, locate
from agentlightning.cli.terminal import LogLevel, OptionGroup, seconds_of
from agentlightning.errors import InvalidValue
from agentlightning.telemetry.logs import setup_logging

if TYPE_CHECKING:
    from agentlightning.execution.base import ExecutionEvent
    from agentlightning.http.server.server import LightningStoreServer
    from agentlightning.proxy import LLMProxy, ModelConfig
    from agentlightning.store.base import LightningStore
    from agentlightning.store.engine import EngineStore


_serving = partial(typer.Option, rich_help_panel="Serving")
_access = partial(typer.Option, rich_help_panel="Who may come in")
_logging = partial(typer.Option, rich_help_panel="Logging")
_models = partial(typer.Option, rich_help_panel="Models")
_record = partial(typer.Option, rich_help_panel="The record")
_what = partial(typer.Option, rich_help_panel="What to run")
_how = partial(typer.Option, rich_help_panel="How much")
_whom = partial(typer.Option, rich_help_panel="For whom")

Level = Annotated[LogLevel, typer.Option(case_sensitive=False, help="The least important lines.")]
_Durability = Literal["full", "process", "none"]


TlsCertificate = Annotated[
    Path | None, _access(envvar="AGL_TLS_CERTIFICATE", help="Certificate chain in PEM, for HTTPS.")
]
TlsKey = Annotated[Path | None, _access(envvar="AGL_TLS_KEY", help="Its private key in PEM.")]


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Raise ``typer.BadParameter`` if only one of the two files for HTTPS is given."""
    if (certificate is None) != (key is None):
        raise typer.BadParameter("for HTTPS give both --tls-cert and --tls-key, for HTTP neither")


@dataclass(frozen=True)
class ServerOptions(OptionGroup):
    """Where a store is served, and who may come in."""

    host: Annotated[str, _serving(envvar="AGL_SERVER_HOST", help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, _serving(envvar="AGL_SERVER_PORT", min=0, max=65535, help="0: any that is free.")] = 4747
    api_key: Annotated[str | None, _access(envvar="AGL_API_KEY", help="Secret that every request has to show.")] = None
    allowed_host: Annotated[list[str] | None, _access(help="Name under which the server is reached.")] = None
    cors_origin: Annotated[list[str] | None, _access(help="Web page that may use the server; '*': all.")] = None
    tls_cert: TlsCertificate = None
    tls_key: TlsKey = None

    def serve(self, store: LightningStore) -> LightningStoreServer:
        """Return a server for the store, which does not serve yet.

        Raises:
            typer.BadParameter, InvalidValue: the options do not go together, or one is not valid.
        """
        from agentlightning.http.server.server import LightningStoreServer

        check_tls(self.tls_cert, self.tls_key)
        return LightningStoreServer(
            store,
            self.host,
            self.port,
            self.cors_origin or None,
            api_key=self.api_key,
            allowed_hosts=self.allowed_host or (),
            tls_certificate=self.tls_cert,
            tls_key=self.tls_key,
        )


@dataclass(frozen=True)
class LogOptions(OptionGroup):
    """What a server logs, and where."""

    log_level: Annotated[LogLevel, _logging(case_sensitive=False, help="debug logs every request.")] = "info"
    log_format: Annotated[
        Literal["console", "json"] | None, _logging(help="Default: console on a terminal, else json.")
    ] = None
    log_file: Annotated[Path | None, _logging(help="Log there, too.")] = None
    log_max_mb: Annotated[int, _logging(min=1, metavar="MB", help="A larger log file is put away, compressed.")] = 64
    log_max_age: Annotated[
        float | None, _logging(parser=seconds_of, metavar="AGE", help="So is an older one; 24h: at midnight UTC.")
    ] = None
    log_keep: Annotated[int, _logging(min=0, help="Log files that are kept besides the one in use.")] = 5

    def set_up(self) -> None:
        """Begin to log. Raises ``InvalidValue`` if the file cannot be written."""
        setup_logging(
            self.log_level,
            format=self.log_format,
            files=self.log_file,
            max_file_bytes=self.log_max_mb * 1_000_000,
            max_file_age_seconds=self.log_max_age,
            kept_files=self.log_keep,
        )


def store(
    serving: ServerOptions,
    logs: LogOptions,
    db: Annotated[str, _serving(help="Database file, made if it is not there; or 'memory'.")] = "agentlightning.db",
    durability: Annotated[
        _Durability, _serving(help="What an acknowledged write survives: full: power loss.")
    ] = "full",
) -> None:
    """Serve the store: queue, attempts, spans, resources.

    Prints one line, 'serving … at URL', when it answers. SIGTERM or Ctrl+C: finishes what it has begun, then ends.

    [bold]Examples[/bold]

      agl store
      agl store --db runs/today.db --port 0
      AGL_API_KEY=... agl store --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
    """
    from agentlightning.http.server.server import run_service

    logs.set_up()
    served = _store_of(db, durability)
    server = serving.serve(served)
    run_service(server, served, lambda: typer.echo(f"serving {db} at {server.endpoint}"))


def _store_of(db: str, durability: _Durability) -> EngineStore:
    from agentlightning.store.sqlite.store import InMemoryLightningStore, SqliteLightningStore

    if db == "memory":
        return InMemoryLightningStore()
    scheme, separator, rest = db.partition("://")
    if separator and scheme != "sqlite":
        raise InvalidValue(f"--db {db!r} is not possible here; give the path of a file, sqlite://PATH, or memory")
    return SqliteLightningStore(rest if separator else db, durability)


def proxy(
    url: Url = None,
    api_key: ApiKey = None,
    model: Annotated[
        list[str] | None, _models("--model", "-m", metavar="NAME=URL", help="A backend; again for more.")
    ] = None,
    config: Annotated[Path | None, _models("--config", "-c", help="File with a model_list, .toml or .json.")] = None,
    upstream_key_env: Annotated[
        str | None,
        _models(metavar="VARIABLE", help="Environment variable that has the key for the backends of --model."),
    ] = None,
    retries: Annotated[int, _models(min=0, help="How often a call is tried again.")] = 2,
    no_record: Annotated[bool, _record("--no-record", help="Pass calls on and record none: no store.")] = False,
    host: Annotated[str, _serving(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, _serving(min=0, max=65535, help="0: any that is free.")] = 4748,
    public_url: Annotated[str | None, _serving(help="How agents reach it, if not by host and port.")] = None,
    proxy_key: Annotated[str | None, _serving(envvar="AGL_PROXY_KEY", help="Secret that agents have to show.")] = None,
    control_key: Annotated[
        str | None, _serving(envvar="AGL_PROXY_CONTROL_KEY", help="Secret that opens /control (pause, resume).")
    ] = None,
    tls_cert: TlsCertificate = None,
    tls_key: TlsKey = None,
    log_level: Level = "info",
) -> None:
    """Serve models under OpenAI's protocol, and record every call of an attempt.

    Agents call URL/rollout/ROLLOUT_ID/attempt/ATTEMPT_ID/v1. Prints one line, 'serving … at URL', when it answers.
    SIGTERM or Ctrl+C: lets calls end, brings their spans to the store, then ends.

    [bold]Examples[/bold]

      agl proxy --model policy=http://gpu:8000/v1
      agl proxy --config models.toml --url http://lab:4747 --host 0.0.0.0
      agl proxy --model policy=http://a:8000/v1 --model policy=http://b:8000/v1 --no-record
    """
    from agentlightning.proxy import LLMProxy

    check_tls(tls_cert, tls_key)
    setup_logging(log_level)
    target = None if no_record else locate(url, api_key)
    served = LLMProxy(
        port,
        _model_list(model or [], config, upstream_key_env),
        host=host,
        num_retries=retries,
        api_key=proxy_key,
        control_key=control_key,
        public_url=public_url,
        tls_certificate=tls_cert,
        tls_key=tls_key,
    )

    asyncio.run(_serve(served, target, served.api_key if proxy_key is None else None))


async def _serve(served: LLMProxy, target: Target | None, new_key: str | None) -> None:
    """Run the proxy until a signal comes; it records into ``target``, if there is one, and says the key that is new."""
    from agentlightning.serving.server import ended_by_signal

    async with AsyncExitStack() as stack:
        if target is not None:
            served.set_store(await stack.enter_async_context(target.open()))
        await served.start()
        stack.push_async_callback(served.stop)
        ended = ended_by_signal()
        typer.echo(f"serving {', '.join(served.models)} at {served.url}/v1")
        if new_key is not None:
            typer.echo(f"agents have to show the key {new_key} (choose one with --proxy-key)")
        await ended.wait()


def _model_list(words: list[str], config: Path | None, upstream_key_env: str | None) -> list[ModelConfig]:
    from agentlightning.proxy.models import model_of_word, read_model_list

    key = None if upstream_key_env is None else f"os.environ/{upstream_key_env}"
    models = [model_of_word(word, key) for word in words]
    if config is not None:
        models += read_model_list(config)
    if not models:
        raise InvalidValue("there is no model to serve; give --model NAME=URL, or --config FILE")
    return models


@dataclass(frozen=True)
class RunnerOptions(OptionGroup):
    """How each runner process works."""

    concurrency: Annotated[int, _how("--concurrency", "-c", min=1, help="Rollouts at once in each.")] = 1
    max_rollouts: Annotated[int | None, _how(min=1, help="Rollouts for each process, then it ends.")] = None
    heartbeat: Annotated[float, _how(min=0.1, help="Seconds between signs of life; lost after three.")] = 10.0
    label: Annotated[
        list[str] | None, _how(metavar="NAME=VALUE", help="What operators shall see of these workers.")
    ] = None
    default_resources: Annotated[
        Path | None,
        _how(metavar="FILE", help="JSON object of resources, used (and marked) while the server cannot give them."),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Arguments of ``LitAgentRunner``. Raises ``typer.BadParameter`` for what is no label."""
        pairs = [each.partition("=") for each in self.label or ()]
        for name, sign, _ in pairs:
            if not sign or not name:
                raise typer.BadParameter(f"{name!r} is no label; write NAME=VALUE", param_hint="--label")
        labels = {name: value for name, _, value in pairs}
        told = {"concurrency": self.concurrency, "max_rollouts": self.max_rollouts, "labels": labels}
        defaults = None if self.default_resources is None else _read_resources(self.default_resources)
        return {**told, "heartbeat_interval": self.heartbeat, "default_resources": defaults}


def _read_resources(file: Path) -> dict[str, Any]:
    """Resources by name, from a file like ``{"llm": {"resource_type": "llm", "endpoint": …, "model": …}}``.

    Raises:
        InvalidValue: it cannot be read, or has something else.
    """
    from pydantic import TypeAdapter, ValidationError

    from agentlightning.types import NamedResources

    try:
        return TypeAdapter[NamedResources](NamedResources).validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise InvalidValue(f"--default-resources {file}: {error}") from error


def runner(
    target: Target,
    settings: RunnerOptions,
    agent: Annotated[
        str | None, typer.Argument(metavar="MODULE:AGENT", help="An agent: my.module:agent or agent.py:agent.")
    ] = None,
    exec_: Annotated[str | None, _what("--exec", metavar="COMMAND", help="Any program as the agent instead.")] = None,
    fresh_cwd: Annotated[bool, _what("--fresh-cwd", help="An empty working directory for each attempt.")] = False,
    fresh_home: Annotated[bool, _what("--fresh-home", help="A HOME and TMPDIR of its own for each attempt.")] = False,
    pass_env: Annotated[
        list[str] | None, _what(metavar="NAME", help="Pass on only this variable, and the basic ones; again for more.")
    ] = None,
    n: Annotated[int, _how("--n", "-n", min=1, help="Runner processes on this machine.")] = 1,
    run_id: Annotated[str | None, _whom(envvar="AGL_RUN_ID", help="Work for this run only; refuse others.")] = None,
    wait: Annotated[float, _whom(min=0, help="Seconds to wait for a server that is not up.")] = 300.0,
    stay: Annotated[bool, _whom("--stay", help="When a run is over, wait for the next one.")] = False,
    log_level: Level = "info",
) -> None:
    """Run agents: claim rollouts from a store, run the agent on each, report how it went.

    It waits for the server, and ends when the run ends, or on Ctrl+C (what is being worked on is finished first; once
    more: at once). A process that crashes is started again, and its rollout is tried again as the run has it.

    A program gets its task in AGL_TASK, the model in OPENAI_BASE_URL and OPENAI_API_KEY, and says its reward by a
    POST to AGL_REWARD_URL, in the file AGL_REWARD_FILE, or in the last line of its output.

    [bold]Examples[/bold]

      agl runner my_agent.py:agent --concurrency 16
      agl runner --exec "node agent.js" --url http://gpu-box:4747 -n 4
      agl runner --exec 'curl -s -d "$AGL_TASK" http://localhost:9000/solve' --stay
    """
    from agentlightning.execution.client_server import ClientServerExecutionStrategy
    from agentlightning.http.client.client import LightningStoreClient
    from agentlightning.runner.program import RunAgent

    if (agent is None) == (exec_ is None):
        raise typer.BadParameter("give either MODULE:AGENT or --exec COMMAND")
    if not isinstance(target, Server):
        raise InvalidValue(f"--url {target} is a file; runners need a server: agl store --db {target}")
    setup_logging(log_level)
    isolation = {"fresh_cwd": fresh_cwd, "fresh_home": fresh_home, "pass_env": pass_env or None}
    if exec_ is None and any(isolation.values()):
        raise typer.BadParameter("--fresh-cwd, --fresh-home and --pass-env are for programs; give --exec COMMAND")
    bundle = RunAgent(agent, exec_, str(Path.cwd()), settings.settings(), isolation)
    bundle.make()  # what is wrong with it shall be said here, not by each process
    ClientServerExecutionStrategy(
        role="runner",
        server_url=target.url,
        n_runners=n,
        api_key=target.api_key,
        run_id=run_id,
        connect_timeout=wait,
        managed_store=True,
        stay=stay,
    ).execute(_elsewhere, bundle, LightningStoreClient(target.url, api_key=target.api_key, spool_dir=None))


async def _elsewhere(store: LightningStore, event: ExecutionEvent) -> None:
    raise RuntimeError("the algorithm runs where the store is; this side has runners only")
