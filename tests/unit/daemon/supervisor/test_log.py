# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Log lines."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar

import pytest

from daemon.supervisor import log
from daemon.supervisor.log import LineFormatter, current_vm, quote


def _record(message: str, *, with_trace: bool = False) -> logging.LogRecord:
    exc_info = None
    if with_trace:
        try:
            raise ValueError("why")
        except ValueError:
            exc_info = sys.exc_info()
    return logging.LogRecord("daemon.x", logging.WARNING, "f", 1, message, (), exc_info)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        (7, "7"),
        ("", '""'),
        ("two words", '"two words"'),
        ('say "a"', '"say \\"a\\""'),
        ("a\nb", '"a\\nb"'),
        ("k=v", '"k=v"'),
    ],
)
def test_a_value_is_quoted_when_it_must_be(value: object, text: str) -> None:
    assert quote(value) == text


def test_every_line_carries_its_vm() -> None:
    token = current_vm.set("web-1")
    try:
        line = LineFormatter(is_journal=False).format(_record("worker stopped"))
    finally:
        current_vm.reset(token)
    assert line.endswith("daemon.x WARNING worker stopped vm=web-1")


def test_a_line_that_names_its_vm_is_left_alone() -> None:
    token = current_vm.set("web-1")
    try:
        line = LineFormatter(is_journal=False).format(_record("worker stopped vm=web-2"))
    finally:
        current_vm.reset(token)
    assert "web-1" not in line


def test_the_journal_gets_a_priority_on_every_line_and_no_time() -> None:
    text = LineFormatter(is_journal=True).format(_record("failed", with_trace=True))
    lines = text.split("\n")
    assert lines[0] == "<4>daemon.x WARNING failed"
    assert len(lines) > 2
    assert all(line.startswith("<4>") for line in lines)


def test_a_line_carries_the_request_that_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_context", {})
    request: ContextVar[str] = ContextVar("request", default="")
    log.tell("request", request)
    line = logging.LogRecord("n", logging.INFO, "p", 1, "it happened", (), None)
    formatter = log.LineFormatter(is_journal=True)
    assert formatter.format(line) == "<6>n INFO it happened"
    request.set("r-1")
    assert formatter.format(line) == "<6>n INFO it happened request=r-1"
    request.set("")
