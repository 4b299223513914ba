# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""How back ends are called, and what is refused before they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.errors import HostFailure, Invalid
from daemon.supervisor import backend_tools
from daemon.supervisor.records import DiskRecord, ShareRecord


def disk(path: str = "/d", *, kind: Any = "qcow2", read_only: bool = False) -> DiskRecord:  # noqa: ANN401
    return DiskRecord("d", path, None, False, read_only, 0, format=kind)


def nodes(argv: tuple[str, ...]) -> list[dict[str, Any]]:
    return [json.loads(argv[i + 1]) for i, word in enumerate(argv) if word == "--blockdev"]


@pytest.fixture
def open_file(tmp_path: Path) -> int:
    path = tmp_path / "image"
    path.write_bytes(bytes(512))
    return os.open(path, os.O_RDWR)


def test_image_is_opened_by_its_descriptor_in_its_named_format(open_file: int) -> None:
    command = backend_tools.storage_daemon(disk(), open_file, 98, 99)
    file, top = nodes(command.argv)
    assert file["filename"] == f"/proc/self/fd/{open_file}"
    assert (top["driver"], top["backing"], top["read-only"]) == ("qcow2", None, False)
    assert "writethrough=on" in command.argv[-1]
    assert command.fds == (98, open_file, 99)
    os.close(open_file)


def test_read_only_disk_is_read_only_all_the_way_down(open_file: int) -> None:
    command = backend_tools.storage_daemon(disk(read_only=True), open_file, 98, 99)
    assert [node["read-only"] for node in nodes(command.argv)] == [True, True]
    assert "writable=off" in command.argv[-1]
    os.close(open_file)


@pytest.mark.skipif(os.geteuid() != 0, reason="who is not root has none to drop")
def test_daemon_has_no_capability_unless_the_image_is_another_user_s(open_file: int) -> None:
    assert "--bounding-set=-all" in backend_tools.storage_daemon(disk(), open_file, 98, 99).argv
    os.fchown(open_file, 1, 1)
    argv = backend_tools.storage_daemon(disk(), open_file, 98, 99).argv
    assert "--bounding-set=-all,+dac_override" in argv
    os.close(open_file)


def test_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostFailure, match="apt install qemu-system-common") as caught:
        backend_tools.find_tool("qemu-storage-daemon")
    assert caught.value.code == "tool_missing"


def test_share_without_root_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostFailure, match="run hosteld as root"):
        backend_tools.virtiofsd("/usr/libexec/virtiofsd", ShareRecord("src", "/srv", False), 99)


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        (
            "nbd://10.0.0.1/disk1",
            {"server": {"type": "inet", "host": "10.0.0.1", "port": "10809"}, "export": "disk1"},
        ),
        ("nbd://[::1]:7", {"server": {"type": "inet", "host": "::1", "port": "7"}}),
        (
            "nbd+unix:///a%20b?socket=/run/nbd.sock",
            {"server": {"type": "unix", "path": "/run/nbd.sock"}, "export": "a b"},
        ),
    ],
)
def test_nbd_uri_is_read(uri: str, options: dict[str, Any]) -> None:
    assert backend_tools.parse_nbd(uri) == options


@pytest.mark.parametrize(
    "uri",
    [
        "nbd:///x", "nbd://h/x?a=b", "nbd+unix:///x", "nbd+unix:///x?socket=rel", "http://h/x",
        "nbd+unix:///x?socket=/a&socket=/b", "nbd+unix:///x?socket=/a&b=c", "nbd://h:99999/x",
    ],
)  # fmt: skip
def test_other_uri_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=r"nbd|Port"):
        backend_tools.parse_nbd(uri)


@given(st.text(max_size=40))
def test_any_text_after_the_scheme_is_read_or_refused(text: str) -> None:
    for scheme in ("nbd://", "nbd+unix://"):
        try:
            options = backend_tools.parse_nbd(scheme + text)
        except ValueError:
            continue
        assert set(options) <= {"server", "export"}


@pytest.mark.parametrize("data", [b"", b"QFI", b"RAW\0" + bytes(508), bytes(512)])
def test_what_is_no_qcow2_file_is_refused_by_its_header(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "image"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(Invalid, match="is no qcow2 file"):
        backend_tools.check_header(disk(str(path)), fd, "disks.0.path")
    os.close(fd)
