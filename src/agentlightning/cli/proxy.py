"""`agl proxy`: serve models in a process of its own, and record every call of an attempt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentlightning.cli.options import ApiKey, Level, LogLevel, Url
from agentlightning.cli.target import open_store
from agentlightning.errors import InvalidValue

if TYPE_CHECKING:
    from agentlightning.proxy import LLMProxy, ModelConfig


_MODELS = "Models"
_STORE = "The record"
_SERVE = "Serving"

_Models = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", metavar="NAME=URL", help="A backend; again for more.", rich_help_panel=_MODELS),
]
_Config = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="File with a model_list, .toml or .json.", rich_help_panel=_MODELS),
]
_UpstreamKey = Annotated[
    str | None,
    typer.Option(
        metavar="VARIABLE",
        help="Environment variable that has the key for the backends of --model.",
        rich_help_panel=_MODELS,
    ),
]
_Retries = Annotated[int, typer.Option(min=0, help="How often a call is tried again.", rich_help_panel=_MODELS)]
_NoRecord = Annotated[
    bool, typer.Option("--no-record", help="Pass calls on and record none: no store.", rich_help_panel=_STORE)
]
_Host = Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_SERVE)]
_Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.", rich_help_panel=_SERVE)]
_PublicUrl = Annotated[
    str | None, typer.Option(help="How agents reach it, if not by host and port.", rich_help_panel=_SERVE)
]
_Key = Annotated[
    str | None,
    typer.Option(envvar="AGL_PROXY_KEY", help="Secret that agents have to show.", rich_help_panel=_SERVE),
]
_ControlKey = Annotated[
    str | None,
    typer.Option(
        envvar="AGL_PROXY_CONTROL_KEY", help="Secret that opens /control (pause, resume).", rich_help_panel=_SERVE
    ),
]


def proxy(
    model: _Models = None,
    config: _Config = None,
    upstream_key_env: _UpstreamKey = None,
    retries: _Retries = 2,
    url: Url = None,
    api_key: ApiKey = None,
    no_record: _NoRecord = False,
    host: _Host = "127.0.0.1",
    port: _Port = 4748,
    public_url: _PublicUrl = None,
    proxy_key: _Key = None,
    control_key: _ControlKey = None,
    log_level: Level = LogLevel.INFO,
) -> None:
    """Serve models under OpenAI's protocol, and record every call of an attempt.

    Agents call URL/rollout/ROLLOUT_ID/attempt/ATTEMPT_ID/v1. Prints one line, 'serving … at URL', when it answers.
    SIGTERM or Ctrl+C: lets calls end, brings their spans to the store, then ends.

    [bold]Examples[/bold]

      agl proxy --model policy=http://gpu:8000/v1
      agl proxy --config models.toml --url http://lab:4747 --host 0.0.0.0
      agl proxy --model policy=http://a:8000/v1 --model policy=http://b:8000/v1 --no-record
    """
    import asyncio

    from agentlightning.proxy import LLMProxy
    from agentlightning.telemetry.logs import setup_logging

    setup_logging(log_level.value)
    served = LLMProxy(
        port,
        _model_list(model or [], config, upstream_key_env),
        host=host,
        num_retries=retries,
        api_key=proxy_key,
        control_key=control_key,
        public_url=public_url,
    )
    asyncio.run(_serve(served, None if no_record else (url, api_key), shows_key=proxy_key is None))


def _model_list(words: list[str], config: Path | None, upstream_key_env: str | None) -> list[ModelConfig]:
    from agentlightning.proxy.models import model_of_word, read_model_list

    key = None if upstream_key_env is None else f"os.environ/{upstream_key_env}"
    models = [model_of_word(word, key) for word in words]
    if config is not None:
        models += read_model_list(config)
    if not models:
        raise InvalidValue("there is no model to serve; give --model NAME=URL, or --config FILE")
    return models


async def _serve(served: LLMProxy, target: tuple[str | None, str | None] | None, *, shows_key: bool) -> None:
    """Serve until a signal comes; a second one ends the process at once."""
    import asyncio
    import signal
    from contextlib import AsyncExitStack

    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end() -> None:
        ended.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    async with AsyncExitStack() as stack:
        if target is not None:
            served.set_store(await stack.enter_async_context(open_store(*target)))
        await served.start()
        stack.push_async_callback(served.stop)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        typer.echo(f"serving {', '.join(served.models)} at {served.url}/v1")
        if shows_key and served.api_key is not None:
            typer.echo(f"agents have to show the key {served.api_key} (choose one with --proxy-key)")
        await ended.wait()
