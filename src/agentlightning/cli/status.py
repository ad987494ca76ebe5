"""``agl status``: one screen that says what goes on, what stands still, and why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated

import typer

from agentlightning.cli.options import ApiKey, Format, Output, Url

if TYPE_CHECKING:
    from rich.console import RenderableType

    from agentlightning.cli.overview import Overview
    from agentlightning.store.base import LightningStore


_SILENCE_SECONDS = 3.0
"""Answers come sooner than this; what takes longer is shown as silence."""


def status(
    url: Url = None,
    api_key: ApiKey = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl+C.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two looks, with --watch.")] = 2.0,
    output: Output = Format.TABLE,
) -> None:
    """One screen: what goes on, what stands still, and why.

    [bold]Examples[/bold]

      agl status                                    the server on this machine
      agl status --url http://gpu-1:4747 --watch    another one, looked at again and again
      agl status --url agentlightning.db            a file, also while its owner runs
      agl status -o json | jq .rollouts.queuing

    With --watch and -o json each look is one line of JSON.
    """
    from agentlightning.cli.output import console, print_json
    from agentlightning.cli.overview import gather
    from agentlightning.cli.status_screen import record_of, screen_of
    from agentlightning.cli.target import locate, look

    place = str(locate(url, api_key))
    if watch:
        asyncio.run(_watch(url, api_key, place, interval, output))
        return
    overview = look(url, api_key, gather)
    if output is Format.JSON:
        print_json(record_of(overview, place))
    else:
        console().print(screen_of(overview, place), crop=False)


async def _watch(url: str | None, api_key: str | None, place: str, interval: float, output: Format) -> None:
    """Look until interrupted."""
    from rich.live import Live

    from agentlightning.cli.output import console, json_text
    from agentlightning.cli.status_screen import record_of
    from agentlightning.cli.target import open_view

    screen = console()
    async with open_view(url, api_key) as store:
        if output is Format.JSON:
            async for overview, silence in _looks(store, interval):
                if overview is not None and not silence:
                    typer.echo(json_text(record_of(overview, place)))
        elif screen.is_terminal:
            with Live(console=screen, screen=True, auto_refresh=False) as live:
                async for overview, silence in _looks(store, interval):
                    live.update(_watched(overview, silence, place), refresh=True)
        else:
            async for overview, silence in _looks(store, interval):
                screen.print(_watched(overview, silence, place))


async def _looks(store: LightningStore, interval: float) -> AsyncIterator[tuple[Overview | None, float]]:
    """One look after the other: (the newest overview, for how many seconds the next one has been awaited).

    A server that is away is waited for: the client tries again by itself, and when it gives up, we do.
    """
    from agentlightning.cli.overview import gather
    from agentlightning.errors import StoreUnavailable

    overview: Overview | None = None
    silent_since: float | None = None
    while True:
        began = time.monotonic()
        look = asyncio.ensure_future(gather(store))
        try:
            while not (await asyncio.wait({look}, timeout=max(interval, _SILENCE_SECONDS)))[0]:
                silent_since = began if silent_since is None else silent_since
                yield overview, time.monotonic() - silent_since
            overview, silent_since = look.result(), None
            yield overview, 0.0
        except StoreUnavailable:
            silent_since = began if silent_since is None else silent_since
            yield overview, time.monotonic() - silent_since
        finally:
            look.cancel()
        await asyncio.sleep(interval)


def _watched(overview: Overview | None, silence: float, place: str) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from agentlightning.cli.output import duration
    from agentlightning.cli.status_screen import screen_of

    parts: list[RenderableType] = [screen_of(overview, place)] if overview is not None else [Text(place, style="bold")]
    if silence:
        parts += [
            Text(),
            Text(f"✗ No answer for {duration(silence)}; trying on. What is above is old.", style="bold red"),
        ]
    return Group(*parts)
