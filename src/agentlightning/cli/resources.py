"""``agl resources``: list, show, compare and roll back what an algorithm tunes."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentlightning.cli.target import Target, clock_of
from agentlightning.cli.terminal import (
    Column,
    Limit,
    Offset,
    Output,
    ago,
    clean,
    console,
    plain,
    print_facts,
    print_json,
)
from agentlightning.errors import NotFound

if TYPE_CHECKING:
    from agentlightning.store.base import LightningStore
    from agentlightning.types import PaginatedResult, ResourcesUpdate


_SECRET = "api_key"
_HIDDEN = "••••"

Id = Annotated[str, typer.Argument(metavar="RESOURCES_ID", help="Their id.")]
Version = Annotated[int | None, typer.Option("--version", "-v", min=1, help="Default: the newest.")]
Keys = Annotated[bool, typer.Option("--show-keys", help="Print API keys, which are hidden otherwise.")]


def ls(
    target: Target,
    resources_id: Annotated[
        str | None, typer.Argument(metavar="RESOURCES_ID", help="List all versions of this one.", show_default=False)
    ] = None,
    limit: Limit = 20,
    offset: Offset = 0,
    show_keys: Keys = False,
    output: Output = "table",
) -> None:
    """List resources, each in its newest version; or all versions of one, the newest first.

    [bold]Examples[/bold]

      agl resources ls
      agl resources ls rs-01a2 --limit 5
    """

    async def query(store: LightningStore) -> PaginatedResult[ResourcesUpdate]:
        if resources_id is None:
            return await store.query_resources(sort_order="desc", limit=limit, offset=offset)
        page = await store.query_resource_versions(resources_id, sort_order="desc", limit=limit, offset=offset)
        if not page.total:
            raise _unknown(resources_id)
        return page

    def content(update: ResourcesUpdate) -> str:
        return ", ".join(f"{name}: {each.resource_type}" for name, each in update.resources.items())

    target.print_page(
        output,
        query,
        lambda now: (
            Column("resources", lambda each: each.resources_id),
            Column("version", lambda each: str(each.version), right=True),
            Column("made", lambda each: ago(each.update_time, now), right=True),
            Column("content", content, wide=True),
        ),
        empty="No resources.",
        record=lambda each: _record(each, show_keys),
    )


def show(
    target: Target,
    resources_id: Annotated[
        str | None,
        typer.Argument(metavar="RESOURCES_ID", help="Default: those stored last.", show_default=False),
    ] = None,
    version: Version = None,
    show_keys: Keys = False,
    output: Output = "table",
) -> None:
    """Show the content of one version.

    [bold]Examples[/bold]

      agl resources show                       what a rollout enqueued now would get
      agl resources show rs-01a2 --version 3
    """
    if resources_id is None and version is not None:
        raise typer.BadParameter("--version needs the id of resources")

    async def question(store: LightningStore) -> tuple[ResourcesUpdate, float]:
        return await _one(store, resources_id, version), clock_of(await store.statistics())

    update, now = target.look(question)
    if output == "json":
        print_json(_record(update, show_keys))
        return
    made = ago(update.update_time, now)
    print_facts({"resources": update.resources_id, "version": str(update.version), "made": made})
    typer.echo()
    for line in _lines(update, show_keys):
        typer.echo(clean(line))


def diff(
    target: Target,
    resources_id: Id,
    old: Annotated[
        int | None, typer.Argument(min=1, metavar="OLD", help="Default: the one before NEW.", show_default=False)
    ] = None,
    new: Annotated[
        int | None, typer.Argument(min=1, metavar="NEW", help="Default: the newest.", show_default=False)
    ] = None,
) -> None:
    """Show what changed between two versions, line by line.

    [bold]Examples[/bold]

      agl resources diff rs-01a2          the newest and the one before
      agl resources diff rs-01a2 1 7
    """

    async def question(store: LightningStore) -> tuple[ResourcesUpdate, ResourcesUpdate]:
        after = await _one(store, resources_id, new)
        if old is None and after.version == 1:
            raise NotFound(f"{resources_id} has no version before version 1; `agl resources show` shows it")
        return await _one(store, resources_id, after.version - 1 if old is None else old), after

    before, after = target.look(question)
    old_lines, new_lines = ([*_lines(each, show_keys=False)] for each in (before, after))
    old_name, new_name = (f"{resources_id} version {each.version}" for each in (before, after))
    screen, line = console(), ""
    for line in difflib.unified_diff(old_lines, new_lines, old_name, new_name, lineterm=""):
        heading = line.startswith(("+++ ", "--- "))
        style = "bold" if heading else {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
        screen.print(clean(line), style=style)
    if not line:
        typer.echo("No difference." if before.resources == after.resources else "Only API keys differ.")


def rollback(
    target: Target,
    resources_id: Id,
    version: Annotated[int, typer.Argument(min=1, metavar="VERSION", help="The version whose content comes back.")],
    show_keys: Keys = False,
    output: Output = "table",
) -> None:
    """Store the content of an old version as a new one, which is the latest after. Nothing is lost by it.

    [bold]Examples[/bold]

      agl resources rollback rs-01a2 3
    """
    update = target.act(lambda store: store.rollback_resources(resources_id, version))
    if output == "json":
        print_json(_record(update, show_keys))
    else:
        typer.echo(f"{resources_id}: version {update.version} now has the content of version {version}")


async def _one(store: LightningStore, resources_id: str | None, version: int | None) -> ResourcesUpdate:
    if resources_id is None:
        latest = await store.get_latest_resources()
        if latest is None:
            raise NotFound("the store has no resources yet")
        return latest
    found = await store.get_resources_by_id(resources_id, version=version)
    if found is None and version is not None:
        newest = await store.get_resources_by_id(resources_id)
        if newest is not None:
            raise NotFound(f"{resources_id} has versions 1 to {newest.version}, not {version}")
    if found is None:
        raise _unknown(resources_id)
    return found


def _unknown(resources_id: str) -> NotFound:
    return NotFound(f"there are no resources {resources_id!r}; `agl resources ls` lists them")


def _record(update: ResourcesUpdate, show_keys: bool) -> dict[str, Any]:
    from agentlightning.types.endpoints import without_key

    record: dict[str, Any] = plain(update)
    for resource in () if show_keys else record["resources"].values():
        if resource.get(_SECRET) is not None:
            resource[_SECRET] = _HIDDEN
        if "endpoint" in resource:
            resource["endpoint"] = without_key(resource["endpoint"])
    return record


def _lines(update: ResourcesUpdate, show_keys: bool) -> Iterator[str]:
    """The content for reading and comparing: one field in a line, texts line by line."""
    for name, resource in sorted(_record(update, show_keys)["resources"].items()):
        yield f"{name} ({resource['resource_type']})"
        for field, value in resource.items():
            if field == "resource_type" or value is None:
                continue
            if isinstance(value, str) and "\n" in value:
                yield f"  {field}:"
                yield from (f"    {line}" for line in value.splitlines())
            else:
                yield f"  {field}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
