"""``agl resources``: list, show, compare and roll back what an algorithm tunes."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentlightning.cli.options import ApiKey, Format, Limit, Output, Url
from agentlightning.cli.output import (
    Column,
    ago,
    clean,
    console,
    plain,
    print_facts,
    print_json,
    print_rest,
    print_table,
)
from agentlightning.cli.overview import clock_of
from agentlightning.cli.target import act, look
from agentlightning.errors import NotFound

if TYPE_CHECKING:
    from agentlightning.cli.output import Cell
    from agentlightning.store.base import LightningStore
    from agentlightning.types import PaginatedResult, ResourcesUpdate


_SECRET = "api_key"
_HIDDEN = "••••"

Id = Annotated[str, typer.Argument(metavar="RESOURCES_ID", help="Their id.")]
Version = Annotated[int | None, typer.Option("--version", "-v", min=1, help="Default: the newest.")]
Keys = Annotated[bool, typer.Option("--show-keys", help="Print API keys, which are hidden otherwise.")]


def ls(
    resources_id: Annotated[
        str | None, typer.Argument(metavar="RESOURCES_ID", help="List all versions of this one.", show_default=False)
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    limit: Limit = 20,
    offset: Annotated[int, typer.Option(min=0, help="Pass over so many.")] = 0,
    show_keys: Keys = False,
    output: Output = Format.TABLE,
) -> None:
    """List resources, each in its newest version; or all versions of one, the newest first.

    [bold]Examples[/bold]

      agl resources ls
      agl resources ls rs-01a2 --limit 5
    """

    async def question(store: LightningStore) -> tuple[PaginatedResult[ResourcesUpdate], float]:
        if resources_id is None:
            page = await store.query_resources(sort_order="desc", limit=limit, offset=offset)
        else:
            page = await store.query_resource_versions(resources_id, sort_order="desc", limit=limit, offset=offset)
            if not page.total:
                raise _unknown(resources_id)
        return page, clock_of(await store.statistics())

    page, now = look(url, api_key, question)
    if output is Format.JSON:
        print_json({**plain(page), "items": [_record(each, show_keys) for each in page]})
        return
    columns = (
        Column("resources"),
        Column("version", right=True),
        Column("made", right=True),
        Column("content", wide=True),
    )
    print_table(columns, [_row(each, now) for each in page], empty="No resources.")
    print_rest(page)


def _row(update: ResourcesUpdate, now: float) -> list[Cell | str]:
    content = ", ".join(f"{name}: {each.resource_type}" for name, each in update.resources.items())
    return [update.resources_id, str(update.version), ago(update.update_time, now), content]


def show(
    resources_id: Annotated[
        str | None,
        typer.Argument(metavar="RESOURCES_ID", help="Default: those stored last.", show_default=False),
    ] = None,
    version: Version = None,
    url: Url = None,
    api_key: ApiKey = None,
    show_keys: Keys = False,
    output: Output = Format.TABLE,
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

    update, now = look(url, api_key, question)
    if output is Format.JSON:
        print_json(_record(update, show_keys))
        return
    made = ago(update.update_time, now)
    print_facts({"resources": update.resources_id, "version": str(update.version), "made": made})
    typer.echo()
    for line in _lines(update, show_keys):
        typer.echo(clean(line))


def diff(
    resources_id: Id,
    old: Annotated[
        int | None, typer.Argument(min=1, metavar="OLD", help="Default: the one before NEW.", show_default=False)
    ] = None,
    new: Annotated[
        int | None, typer.Argument(min=1, metavar="NEW", help="Default: the newest.", show_default=False)
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
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

    before, after = look(url, api_key, question)
    changes = list(
        difflib.unified_diff(
            list(_lines(before, show_keys=False)),
            list(_lines(after, show_keys=False)),
            f"{resources_id} version {before.version}",
            f"{resources_id} version {after.version}",
            lineterm="",
        )
    )
    if changes:
        _print_changes(changes)
    else:
        typer.echo("No difference." if before.resources == after.resources else "Only API keys differ.")


def _print_changes(changes: Sequence[str]) -> None:
    screen = console()
    for line in changes:
        heading = line.startswith(("+++ ", "--- "))
        style = "bold" if heading else {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
        screen.print(clean(line), style=style)


def rollback(
    resources_id: Id,
    version: Annotated[int, typer.Argument(min=1, metavar="VERSION", help="The version whose content comes back.")],
    url: Url = None,
    api_key: ApiKey = None,
    show_keys: Keys = False,
    output: Output = Format.TABLE,
) -> None:
    """Store the content of an old version as a new one, which is the latest after. Nothing is lost by it.

    [bold]Examples[/bold]

      agl resources rollback rs-01a2 3
    """
    update = act(url, api_key, lambda store: store.rollback_resources(resources_id, version))
    if output is Format.JSON:
        print_json(_record(update, show_keys))
    else:
        typer.echo(f"{resources_id}: version {update.version} now has the content of version {version}")


# --- Records ---------------------------------------------------------------------------------------


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
    record: dict[str, Any] = plain(update)
    if not show_keys:
        record["resources"] = {name: _hide(each) for name, each in record["resources"].items()}
    return record


def _hide(resource: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _HIDDEN if name == _SECRET and value is not None else value for name, value in resource.items()}


def _lines(update: ResourcesUpdate, show_keys: bool) -> Iterator[str]:
    """The content for reading and comparing: one field in a line, texts line by line."""
    import json

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
