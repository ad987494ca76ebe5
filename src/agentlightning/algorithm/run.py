"""`Run`: a training run by name, which can be taken up again after its process died.

Two things make that possible. Rollout ids follow from the run's name, the step and the index, so that a
process which does a step again finds the rollouts of the one before it, instead of making new ones. And
what the algorithm has learned is kept in a checkpoint, which is replaced as a whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, cast

from agentlightning.errors import InvalidValue

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,79}")
"""Fits into a file name, and leaves room in a rollout id (at most 128 characters) for two numbers."""


class Run:
    """A name, and a folder where its checkpoint is kept.

    Args:
        name: 1 to 80 characters of ``A-Z a-z 0-9 . _ ~ -``, the first a letter or digit.
        folder: where the checkpoint goes, as ``NAME.checkpoint.json``; made when it is first needed.

    Raises:
        InvalidValue: the name is not like that.
    """

    def __init__(self, name: str, folder: Path | str) -> None:
        if not _NAME.fullmatch(name):
            raise InvalidValue(
                f"the run name {name!r} does not fit into ids and file names; use 1 to 80 letters, digits, '.', "
                "'_', '~' and '-', beginning with a letter or digit"
            )
        self._name = name
        self._path = Path(folder) / f"{name}.checkpoint.json"

    @property
    def name(self) -> str:
        """The name."""
        return self._name

    @property
    def checkpoint_path(self) -> Path:
        """The file that the checkpoint is in, if one was saved."""
        return self._path

    def rollout_id(self, step: int, index: int, kind: str = "") -> str:
        """The id of the rollout at this place of the run: always the same one.

        Args:
            step, index: where it is; numbers of at most 15 digits.
            kind: tells rollouts of one step apart that are counted each for themselves, such as ``val``.
        """
        return f"{self._name}:{kind}{step}:{index}"

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return what was saved last; None if nothing was.

        Raises:
            InvalidValue: the file is not a checkpoint. It is never overwritten for that reason.
        """
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            checkpoint = json.loads(text)
        except ValueError as error:
            raise _not_a_checkpoint(self._path, str(error)) from error
        if not isinstance(checkpoint, dict):
            raise _not_a_checkpoint(self._path, "it holds no JSON object")
        return cast("dict[str, Any]", checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the checkpoint. On return it is on the disk; a crash before leaves the old one whole.

        Raises:
            InvalidValue: it is not strict JSON.
            OSError: it cannot be written.
        """
        try:
            text = json.dumps(checkpoint, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidValue(f"the checkpoint is not JSON: {error}") from error
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        try:
            with unfinished.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._path)
        finally:
            unfinished.unlink(missing_ok=True)
        # The new name is durable only when the folder is, too.
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _not_a_checkpoint(path: Path, why: str) -> InvalidValue:
    return InvalidValue(f"{path} is not a checkpoint: {why}; move it away to begin the run from the start")
