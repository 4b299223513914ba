# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Disks of the host: what is refused, and locks that go with the descriptor."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from api.errors import Conflict, Invalid
from daemon.supervisor import disks
from daemon.supervisor.records import DiskRecord


def record(path: Path, *, read_only: bool = False) -> DiskRecord:
    return DiskRecord("root", str(path), None, False, read_only, 4096)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    return path


def test_a_file_is_a_disk_of_its_size(disk: Path) -> None:
    assert disks.inspect(str(disk), "disks.0.path", read_only=False).size_bytes == 4096


def test_two_names_of_one_file_have_one_identity(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(disk)
    first = disks.inspect(str(disk), "f", read_only=True)
    assert disks.inspect(str(tmp_path / "link"), "f", read_only=True).identity == first.identity


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: path.mkdir(), "disk_kind"),
        (lambda path: os.mkfifo(path), "disk_kind"),
        (lambda path: path.write_bytes(b"x" * 100), "disk_size"),
        (lambda path: path.symlink_to(path.with_name("nowhere")), "disk_missing"),
        (lambda path: None, "disk_missing"),
    ],
    ids=["directory", "fifo", "too small", "dangling link", "missing"],
)
@pytest.mark.parametrize("read_only", [True, False])
def test_what_is_no_disk_is_refused(
    tmp_path: Path, make: object, code: str, read_only: bool
) -> None:
    assert callable(make)
    make(tmp_path / "thing")
    with pytest.raises(Invalid) as caught:
        disks.inspect(str(tmp_path / "thing"), "disks.3.path", read_only=read_only)
    assert (caught.value.code, caught.value.field) == (code, "disks.3.path")


def test_a_writer_keeps_everyone_else_out(disk: Path) -> None:
    fd = disks.open_locked(record(disk), "disks.0.path")
    for read_only in (True, False):
        with pytest.raises(Conflict, match="another VM or program uses it") as caught:
            disks.open_locked(record(disk, read_only=read_only), "disks.2.path")
        assert caught.value.field == "disks.2.path"
    os.close(fd)
    os.close(disks.open_locked(record(disk), "disks.0.path"))


def test_readers_share_and_keep_writers_out(disk: Path) -> None:
    fds = [disks.open_locked(record(disk, read_only=True), "disks.0.path") for _ in range(2)]
    with pytest.raises(Conflict):
        disks.open_locked(record(disk), "disks.0.path")
    for fd in fds:
        os.close(fd)


def test_a_lock_lives_in_the_process_that_was_given_the_descriptor(disk: Path) -> None:
    fd = disks.open_locked(record(disk), "disks.0.path")
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(fd,)
    ) as heir:
        os.close(fd)
        with pytest.raises(Conflict):
            disks.open_locked(record(disk), "disks.0.path")
        heir.kill()
    os.close(disks.open_locked(record(disk), "disks.0.path"))


def test_a_file_system_without_o_direct_is_named() -> None:
    # A regular file of a file system that has none, and is everywhere.
    with pytest.raises(
        Invalid, match="no O_DIRECT, which cache=none needs; use writeback"
    ) as caught:
        disks.inspect("/proc/version", "f", read_only=True, is_direct=True)
    assert caught.value.code == "disk_no_direct"


def test_a_disk_is_opened_past_the_page_cache_if_asked_and_never_nonblocking(disk: Path) -> None:
    try:
        direct = disks.open_locked(replace(record(disk), cache="none"), "disks.0.path")
    except Invalid as err:
        pytest.skip(str(err))
    assert fcntl.fcntl(direct, fcntl.F_GETFL) & (os.O_DIRECT | os.O_NONBLOCK) == os.O_DIRECT
    os.close(direct)
    cached = disks.open_locked(record(disk), "disks.0.path")
    assert fcntl.fcntl(cached, fcntl.F_GETFL) & (os.O_DIRECT | os.O_NONBLOCK) == 0
    os.close(cached)


def test_a_disk_grows(disk: Path) -> None:
    assert disks.grow(str(disk), 8192) == 8192
    assert disk.stat().st_size == 8192


def test_a_disk_does_not_shrink(disk: Path) -> None:
    with pytest.raises(Invalid, match="cannot shrink to 512"):
        disks.grow(str(disk), 512)
    assert disk.stat().st_size == 4096
