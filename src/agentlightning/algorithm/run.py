"""`Run`: a training run by name, what it is bound to, and its checkpoint.

`agentlightning.algorithm.resume` tells what becomes of the run's rollouts when its process has died.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from agentlightning.errors import InvalidValue

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,79}")
"""Fits into a file name, and leaves room in a rollout id (at most 128 characters) for two numbers."""

_BOUND_TO, _CHECKPOINT = "bound_to", "checkpoint"  # the two parts of a checkpoint's file


class Run:
    """A name, and a folder where the run's checkpoint is kept.

    Args:
        name: 1 to 80 characters of ``A-Z a-z 0-9 . _ ~ -``, the first a letter or digit.
        folder: where the checkpoint goes, as ``NAME.checkpoint.json``; created when it is first needed.

    Raises:
        InvalidValue: the name has another form.
    """

    def __init__(self, name: str, folder: Path | str) -> None:
        if not _NAME.fullmatch(name):
            raise InvalidValue(
                f"the run name {name!r} does not fit into ids and file names; use 1 to 80 letters, digits, '.', "
                "'_', '~' and '-', beginning with a letter or digit"
            )
        self.name = name
        self.checkpoint_path = Path(folder) / f"{name}.checkpoint.json"  # if one was saved
        self._identity: dict[str, Any] | None = None  # as it was read or written last

    def rollout_id(self, step: int, index: int, kind: str = "") -> str:
        """Return the id of the rollout at this place of the run: always the same one.

        Args:
            step, index: where it is; at most 15 digits.
            kind: separates rollouts of one step that are counted independently, such as ``val``.
        """
        return f"{self.name}:{kind}{step}:{index}"

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return what was saved last; None if nothing was.

        Raises:
            InvalidValue: the file is not a checkpoint. It is not overwritten for that reason.
        """
        return self._read()[1]

    def save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the checkpoint atomically. It is on the disk on return; a crash before leaves the old one.

        Raises:
            InvalidValue: it is not strict JSON.
            OSError: it cannot be written.
        """
        self._write(self._identity if self._identity is not None else self._read()[0], checkpoint)

    def identity(self) -> dict[str, Any]:
        """Return what the run was bound to; empty if it never was. Raises as ``load_checkpoint``."""
        return self._read()[0]

    def bind(self, identity: Mapping[str, str], origin: Mapping[str, Any]) -> None:
        """Bind the run to what it trains, or make sure that it is bound to the same.

        Args:
            identity: by name, such as ``algorithm``, what identifies it to people.
            origin: how its process is begun; replaces that of an earlier one.

        Raises:
            InvalidValue: the run was begun with something else; both are named.
        """
        known, checkpoint = self._read()
        for name, now in identity.items():
            if (before := known.get(name, now)) != now:
                raise InvalidValue(
                    f"the run {self.name!r} was begun with the {name} {before}, and this is the {name} {now}; "
                    f"give it another name (run=…), or delete that run: agl runs rm {self.name}"
                )
        self._write({**known, **identity, **origin}, checkpoint)

    def _read(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        if not self.checkpoint_path.exists():
            return {}, None
        try:
            told = json.loads(self.checkpoint_path.read_text(encoding="utf-8"))
            if not isinstance(told, dict):
                raise ValueError("it is not a JSON object")
        except ValueError as error:
            raise InvalidValue(
                f"{self.checkpoint_path} is not a checkpoint: {error}; move it away to begin the run from the start"
            ) from error
        found = cast("dict[str, Any]", told)
        if found.keys() != {_BOUND_TO, _CHECKPOINT}:  # of a version that did not bind runs
            return {}, found
        self._identity = found[_BOUND_TO]
        return found[_BOUND_TO], found[_CHECKPOINT]

    def _write(self, identity: dict[str, Any], checkpoint: dict[str, Any] | None) -> None:
        try:
            text = json.dumps({_BOUND_TO: identity, _CHECKPOINT: checkpoint}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidValue(f"the checkpoint is not JSON: {error}") from error
        self._identity = identity
        self.checkpoint_path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.checkpoint_path.with_name(f"{self.checkpoint_path.name}.{os.getpid()}.tmp")
        try:
            with unfinished.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.checkpoint_path)
        finally:
            unfinished.unlink(missing_ok=True)
        # The rename is durable only once the folder is on the disk, too.
        folder = os.open(self.checkpoint_path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
