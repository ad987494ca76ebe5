"""`agl runner`: run an agent, on this machine, for a store that may be on another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentlightning.cli.options import ApiKey, Level, LogLevel, Url
from agentlightning.cli.target import Database, locate
from agentlightning.errors import InvalidValue

if TYPE_CHECKING:
    from agentlightning.execution.base import ExecutionEvent
    from agentlightning.store.base import LightningStore


_WHAT = "What to run"
_HOW = "How much"
_WHERE = "For whom"


_Agent = Annotated[
    str | None, typer.Argument(metavar="MODULE:AGENT", help="An agent: my.module:agent or agent.py:agent.")
]
_Exec = Annotated[
    str | None,
    typer.Option("--exec", metavar="COMMAND", help="Any program as the agent instead.", rich_help_panel=_WHAT),
]
_Number = Annotated[
    int, typer.Option("--n", "-n", min=1, help="Runner processes on this machine.", rich_help_panel=_HOW)
]
_Concurrency = Annotated[
    int, typer.Option("--concurrency", "-c", min=1, help="Rollouts at once in each.", rich_help_panel=_HOW)
]
_MaxRollouts = Annotated[
    int | None, typer.Option(min=1, help="Rollouts for each process, then it ends.", rich_help_panel=_HOW)
]
_RunId = Annotated[
    str | None, typer.Option(envvar="AGL_RUN_ID", help="Work for this run only; refuse others.", rich_help_panel=_WHERE)
]
_Wait = Annotated[
    float, typer.Option(min=0, help="Seconds to wait for a server that is not up.", rich_help_panel=_WHERE)
]
_Stay = Annotated[
    bool, typer.Option("--stay", help="When a run is over, wait for the next one.", rich_help_panel=_WHERE)
]
_HeartbeatInterval = Annotated[
    float, typer.Option(min=0.1, help="Seconds between signs of life; lost after three.", rich_help_panel=_WHERE)
]
_Labels = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="What operators shall see of these workers.", rich_help_panel=_WHERE),
]


def runner(
    agent: _Agent = None,
    exec_: _Exec = None,
    n: _Number = 1,
    concurrency: _Concurrency = 1,
    max_rollouts: _MaxRollouts = None,
    url: Url = None,
    api_key: ApiKey = None,
    run_id: _RunId = None,
    wait: _Wait = 300.0,
    stay: _Stay = False,
    heartbeat: _HeartbeatInterval = 10.0,
    label: _Labels = None,
    log_level: Level = LogLevel.INFO,
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
    from agentlightning.runner.bundle import RunAgent
    from agentlightning.telemetry.logs import setup_logging

    if (agent is None) == (exec_ is None):
        raise typer.BadParameter("give either MODULE:AGENT or --exec COMMAND")
    target = locate(url, api_key)
    if isinstance(target, Database):
        raise InvalidValue(f"--url {target} is a file; runners need a server: agl store --db {target}")
    setup_logging(log_level.value)
    bundle = RunAgent(
        agent,
        exec_,
        str(Path.cwd()),
        {
            "concurrency": concurrency,
            "max_rollouts": max_rollouts,
            "heartbeat_interval": heartbeat,
            "labels": _labels(label or []),
        },
    )
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


def _labels(given: list[str]) -> dict[str, str]:
    pairs = [each.partition("=") for each in given]
    for name, sign, _ in pairs:
        if not sign or not name:
            raise typer.BadParameter(f"{name!r} is no label; write NAME=VALUE", param_hint="--label")
    return {name: value for name, _, value in pairs}
