"""Store versions of resources. A version never changes; the newest row is the latest."""

from __future__ import annotations

from agentlightning.errors import IdReused, NotFound
from agentlightning.lifecycle.records import ResourcesRow
from agentlightning.store.backend import ResourcesBy, Transaction


async def add(tx: Transaction, resources_id: str, content: bytes, digest: bytes) -> ResourcesRow:
    """Store version 1 of a new id; a repeat returns what the first call stored.

    Raises:
        IdReused: the id exists with another content in version 1.
    """
    first = await tx.get_resources(ResourcesBy(resources_id, 1))
    if first is None:
        return await _insert(tx, None, resources_id, content, digest, None)
    if first.digest != digest:
        raise IdReused(
            f"resources {resources_id!r} exist already with other content; use update_resources for a new version"
        )
    return first


async def update(
    tx: Transaction, resources_id: str, content: bytes, digest: bytes, request_id: str | None
) -> ResourcesRow:
    """Store the next version of an id.

    Raises:
        IdReused: ``request_id`` made another version before.
    """
    repeated = await _by_request(tx, resources_id, digest, request_id)
    if repeated is not None:
        return repeated
    newest = await tx.get_resources(ResourcesBy(resources_id))
    return await _insert(tx, newest, resources_id, content, digest, request_id)


async def roll_back(tx: Transaction, resources_id: str, version: int, request_id: str | None) -> ResourcesRow:
    """Store the content of an old version as the next one.

    Raises:
        NotFound: there is no such version.
        IdReused: ``request_id`` made another version before.
    """
    old = await tx.get_resources(ResourcesBy(resources_id, version))
    if old is None:
        raise NotFound(f"there is no version {version} of resources {resources_id!r} in this store")
    return await update(tx, resources_id, old.resources, old.digest, request_id)


async def _by_request(tx: Transaction, resources_id: str, digest: bytes, request_id: str | None) -> ResourcesRow | None:
    if request_id is None:
        return None
    row = await tx.get_resources(ResourcesBy(request_id=request_id))
    if row is not None and (row.resources_id, row.digest) != (resources_id, digest):
        raise IdReused(
            f"request {request_id!r} made version {row.version} of resources {row.resources_id!r}, with other "
            "content; a new version needs a new request_id"
        )
    return row


async def _insert(
    tx: Transaction,
    newest: ResourcesRow | None,
    resources_id: str,
    content: bytes,
    digest: bytes,
    request_id: str | None,
) -> ResourcesRow:
    now = tx.now().wall
    row = ResourcesRow(
        seq=0,
        resources_id=resources_id,
        version=1 if newest is None else newest.version + 1,
        create_time=now if newest is None else newest.create_time,
        update_time=now,
        resources=content,
        request_id=request_id,
        digest=digest,
    )
    tx.count({"resources": 1 if newest is None else 0, "resources_versions": 1})
    return await tx.insert(row)
