"""Logging: where the log lines of Agent Lightning go, in which format, and what they belong to.

The package logs through the standard library, under the names of its modules, and sets up nothing by itself.
``setup_logging`` sends the lines to the console or to files, as text or as JSON, each with the ids of the request or
attempt that the current task works for (``CURRENT``).
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agentlightning.errors import InvalidValue
from agentlightning.telemetry.rotation import RotatingLog, Rotation

if TYPE_CHECKING:
    from structlog.typing import Processor


LogFormat = Literal["console", "json"]
"""``console``: text for people; ``json``: one JSON object per line."""

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_LOGGERS = ("agentlightning", "uvicorn")
_LEVELS = {name: getattr(logging, name) for name in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")}
_OURS = "_agentlightning_handler"
"""The attribute that marks handlers which `setup_logging` has added, so that a second call can replace them."""


class WorkContext:
    """The ids that log lines of one request or attempt carry.

    Args:
        request_id: the request, by the id that its reply carries too.
        traceparent: the request's header of that name (W3C Trace Context), if it has one.
        ids: what the work is about, by name: ``rollout_id``, ``attempt_id``, ``worker_id`` …
    """

    __slots__ = ("ids", "request_id", "traceparent")

    def __init__(
        self, request_id: str | None = None, traceparent: str | None = None, ids: dict[str, str] | None = None
    ):
        self.request_id = request_id
        self.traceparent = traceparent
        self.ids = ids

    def fields(self) -> dict[str, str]:
        """The fields of a log line. They are computed here, because most requests log nothing."""
        fields = dict(self.ids) if self.ids else {}
        if self.request_id is not None:
            fields["request_id"] = self.request_id
        trace = None if self.traceparent is None else trace_of(self.traceparent)
        if trace is not None:
            fields["trace_id"], fields["parent_span_id"] = trace
        return fields


def trace_of(traceparent: str) -> tuple[str, str] | None:
    """Trace id and span id in a ``traceparent`` header (https://www.w3.org/TR/trace-context/); None if it is not valid.

    Later versions may append fields (section 3.2), so only version 00 must end here.
    """
    parts = _TRACEPARENT.fullmatch(traceparent)
    if parts is None:
        return None
    version, trace_id, span_id, more = parts.groups()
    unknown = version == "ff" or (version == "00" and more is not None)
    return (trace_id, span_id) if trace_id.strip("0") and span_id.strip("0") and not unknown else None


CURRENT: ContextVar[WorkContext | None] = ContextVar("agentlightning_work", default=None)
"""What the current task works for."""


def setup_logging(
    level: str | int = "INFO",
    *,
    console: bool = True,
    format: LogFormat | None = None,
    files: str | Path | Sequence[str | Path] | None = None,
    max_file_bytes: int = Rotation().max_bytes,
    max_file_age_seconds: float | None = None,
    kept_files: int = Rotation().kept,
    propagate: bool = False,
) -> None:
    """Show the log lines of Agent Lightning. A second call replaces what the first one set up.

    Handlers that the program added itself, and the loggers of other libraries, do not change.

    Args:
        level: the lowest level to show: DEBUG, INFO, WARNING, ERROR or CRITICAL.
        console: whether lines go to standard error.
        format: of the lines. Default: ``console`` on a terminal, else ``json``. Files are ``json`` by default.
        files: paths of files that lines go to as well.
        max_file_bytes: a file that would grow larger is put away as ``NAME.TIME.gz``, and a new one is begun.
        max_file_age_seconds: a file is also put away at multiples of this time since the Unix epoch, so that 86,400
            means at midnight UTC. None: files may become as old as they like.
        kept_files: how many files are kept besides the one that is written to.
        propagate: whether lines go to the root logger as well.

    Raises:
        InvalidValue: the level or the format does not exist, a limit is not valid, or a file cannot be written.
    """
    number = level if isinstance(level, int) else _LEVELS.get(level.upper())
    if number is None:
        raise InvalidValue(f"log level {level!r} is not one of {', '.join(_LEVELS)}")
    if format not in (None, "console", "json"):
        raise InvalidValue(f"log format {format!r} is not one of console, json")
    rotation = Rotation(max_file_bytes, max_file_age_seconds, kept_files)
    rotation.check()
    handlers: list[logging.Handler] = []
    if console:
        on_terminal = sys.stderr.isatty()
        stream = logging.StreamHandler(sys.stderr)
        stream.setFormatter(_formatter(format or ("console" if on_terminal else "json"), colors=on_terminal))
        handlers.append(stream)
    paths = [files] if isinstance(files, (str, Path)) else files or ()
    handlers += _open_files(paths, format or "json", rotation)
    _replace_handlers(handlers, number, propagate=propagate)


def _open_files(files: Sequence[str | Path], format: LogFormat, rotation: Rotation) -> Sequence[RotatingLog]:
    """Return handlers that write to the files: to all of them, or none is left open."""
    found: list[RotatingLog] = []
    with ExitStack() as opened:
        for file in files:
            try:
                Path(file).parent.mkdir(parents=True, exist_ok=True)
                handler = RotatingLog(file, rotation)
            except OSError as error:
                raise InvalidValue(f"cannot write the log file {str(file)!r}: {error}") from error
            opened.callback(handler.close)
            handler.setFormatter(_formatter(format, colors=False))
            found.append(handler)
        opened.pop_all()
    return found


def _replace_handlers(handlers: Sequence[logging.Handler], level: int, *, propagate: bool) -> None:
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        for old in [each for each in logger.handlers if getattr(each, _OURS, False)]:
            logger.removeHandler(old)
            old.close()
        for handler in handlers:
            setattr(handler, _OURS, True)
            logger.addHandler(handler)
        logger.propagate = propagate
        # At INFO uvicorn repeats what this package logs itself about every start and stop.
        logger.setLevel(level if name == "agentlightning" else max(level, logging.WARNING))


def _formatter(format: LogFormat, *, colors: bool) -> logging.Formatter:
    import structlog

    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        _add_work,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Processor]
    # Tracebacks without the values of local variables, because API keys may be among them.
    if format == "json":
        last = [
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(default=str, ensure_ascii=False),
        ]
    else:
        plain = structlog.dev.plain_traceback
        last = [structlog.dev.ConsoleRenderer(colors=colors, sort_keys=False, exception_formatter=plain)]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )


def _add_work(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: add the ids of the request or attempt that the line belongs to."""
    work = CURRENT.get()
    if work is not None:
        for name, value in work.fields().items():
            event.setdefault(name, value)
    return event
