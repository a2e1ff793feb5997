"""How log records become lines: for a person, for the journal, or as JSON.

A record may carry facts through `extra=`: group, generation, run, rank, pid, client, code, and `done=True` for
something that has come up and works. Knows nothing of who logs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import datetime, timezone
from typing import Any, TextIO

FACTS = ("group", "generation", "run", "rank", "pid", "client", "code")
"""The extras that lines carry, in this order."""

_MARKS = {logging.WARNING: "⚠️ ", logging.ERROR: "❌", logging.CRITICAL: "❌"}
_COLOURS = {logging.DEBUG: "2", logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31"}
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


def start_logging(level: str = "info", format: str = "text", stream: TextIO | None = None) -> None:
    """Sends every record of this process to the stream, standard error by default.

    Args:
        level: "debug", "info", "warning" or "error".
        format: "text" or "json".
    """
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream)
    if format == "json":
        handler.setFormatter(JsonLines())
    elif to_journal(stream, os.environ.get("JOURNAL_STREAM", "")):
        handler.setFormatter(JournalLines())
    else:
        handler.setFormatter(TextLines(colour=stream.isatty() and "NO_COLOR" not in os.environ))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def to_journal(stream: TextIO, journal_stream: str) -> bool:
    """Whether the stream is the one that systemd connected to its journal ("device:inode")."""
    try:
        stat = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return journal_stream == f"{stat.st_dev}:{stat.st_ino}"


class TextLines(logging.Formatter):
    """`2026-01-31 12:00:00.123 ✅ groups: flux1-dev is ready on cuda:0 and cuda:1. (group g1)`"""

    def __init__(self, *, colour: bool = False) -> None:
        super().__init__()
        self.colour = colour

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        text = _sentence(record)
        colour = _COLOURS.get(record.levelno) if self.colour else None
        if colour:
            text = f"\x1b[{colour}m{text}\x1b[0m"
        return f"{when} {text}{_traceback(self, record)}"


class JournalLines(logging.Formatter):
    """Without a time, which the journal knows, but with the priority that it filters by, on each line."""

    def format(self, record: logging.LogRecord) -> str:
        text = _sentence(record) + _traceback(self, record)
        priority = _PRIORITIES.get(record.levelno, 6)
        return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))


class JsonLines(logging.Formatter):
    """One object per line: time (ISO 8601, UTC), level, logger, message, and the record's facts."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _facts(record)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _sentence(record: logging.LogRecord) -> str:
    mark = "✅" if getattr(record, "done", False) else _MARKS.get(record.levelno, "  ")
    component = record.name.rpartition(".")[2]
    facts = ", ".join(f"{name} {_printable(str(value))}" for name, value in _facts(record).items())
    return f"{mark} {component}: {_printable(record.getMessage())}" + (f" ({facts})" if facts else "")


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    return {name: record.__dict__[name] for name in FACTS if record.__dict__.get(name) not in (None, "")}


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return "\n" + formatter.formatException(record.exc_info) if record.exc_info else ""


def _printable(text: str) -> str:
    """A client's own words must not forge a line or move the cursor."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
