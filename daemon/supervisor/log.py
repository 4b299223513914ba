# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Logs: one line per event, the event first, then key=value.

Every line carries the VM that it is about, from a ContextVar. Tokens, console contents and guest
memory never get here.
"""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from typing import Final, TextIO

current_vm: ContextVar[str | None] = ContextVar("current_vm", default=None)

_context: dict[str, ContextVar[str]] = {}

# sd-daemon(3): a line that starts with <N> has syslog priority N.
_PRIORITIES: Final = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}


def quote(value: object) -> str:
    """Return a value as it stands behind ``key=``: quoted when it holds blanks or quotes."""
    text = str(value)
    if text and text.isprintable() and not set(text) & set(' "='):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.encode("unicode_escape").decode("ascii").replace("\\\\", "\\") + '"'


class LineFormatter(logging.Formatter):
    """Formats a record as one line.

    Args:
        is_journal: put sd-daemon's priority prefix in front and leave the time to journald.
    """

    def __init__(self, *, is_journal: bool) -> None:
        super().__init__(
            "%(name)s %(levelname)s %(message)s"
            if is_journal
            else "%(asctime)s %(name)s %(levelname)s %(message)s"
        )
        self._is_journal = is_journal

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a traceback's lines follow, each with the prefix."""
        text = super().format(record)
        vm = current_vm.get()
        if vm is not None and " vm=" not in text:
            first, newline, rest = text.partition("\n")
            text = f"{first} vm={quote(vm)}{newline}{rest}"
        for key, variable in _context.items():
            if value := variable.get(""):
                first, newline, rest = text.partition("\n")
                text = f"{first} {key}={quote(value)}{newline}{rest}"
        if not self._is_journal:
            return text
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in text.split("\n"))


def tell(key: str, variable: ContextVar[str]) -> None:
    """Have every line end with ``key=`` and the variable's value, where that is not empty."""
    _context[key] = variable


def setup(level: str, stream: TextIO | None = None, *, is_journal: bool) -> None:
    """Send everything from ``level`` on to ``stream`` (standard error).

    Args:
        level: as in the configuration.
        stream: None for standard error.
        is_journal: whether journald reads the stream (JOURNAL_STREAM is set).
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(is_journal=is_journal))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Its own access lines would tell each request a second time.
    logging.getLogger("uvicorn.access").disabled = True
