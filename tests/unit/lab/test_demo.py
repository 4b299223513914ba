# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What the demo and the server print."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from lab.demo import LinePrinter
from lab.guests import Guest
from lab.serve import Door


def test_a_console_is_printed_by_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    printer = LinePrinter()
    printer.feed(b"one\r\ntw")
    assert capsys.readouterr().out == "  | one\n"
    printer.feed(b"o\r\n")
    assert capsys.readouterr().out == "  | two\n"
    printer.end()
    assert capsys.readouterr().out == ""


def test_a_guest_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    printer = LinePrinter()
    printer.feed(b"\x1b[2Jgone\x07\xff")
    printer.end()
    assert capsys.readouterr().out == "  | ?[2Jgone?\ufffd\n"


@pytest.fixture
def guest() -> Guest:
    return Guest(
        kernel=Path("/g/vmlinuz"),
        initrd=Path("/g/initrd.img"),
        instant=Path("/g/initrd-min.img"),
        load=Path("/g/initrd-load.img"),
        disk=Path("/g/disk.raw"),
        ready_line="ready",
        instant_line="instant",
    )


def test_the_token_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    door = Door(tmp_path, 8480)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    token = door.token_file.read_text()
    assert len(token) == 64
    assert door.header_file.read_text() == f"Authorization: Bearer {token}\n"


def test_every_printed_line_is_a_curl_line_with_sound_json(tmp_path: Path, guest: Guest) -> None:
    door = Door(tmp_path, 8480)
    first, *lines = door.usage(guest).splitlines()
    assert shlex.split(first) == ["V=http://127.0.0.1:8480/v1", f"H=@{door.header_file}"]
    assert door.token_file.read_text() not in door.usage(guest)
    bodies = []
    for line in lines:
        words = shlex.split(line)
        assert "curl" in words
        if "--json" in words:
            bodies.append(json.loads(words[words.index("--json") + 1]))
    assert {body["name"] for body in bodies} == {"debian", "debian-initrd", "debian-root", "web"}
