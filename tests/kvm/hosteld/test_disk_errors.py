# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Disks whose files fail: the guest gets errors and lives, the operator is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disk_kernel import BLOCK_BYTES, DiskGuest
from tests.support.host_tools import run
from tests.support.hostel import Hostel

MIB = 1 << 20
ROOM_BLOCKS = 4
OK, IOERR = "0", "1"  # VIRTIO 1.2, 5.2.6


@pytest.fixture
def full(directory: Path) -> Iterator[Path]:
    """A sparse file of 1 MiB in a file system that has room for ROOM_BLOCKS blocks of it."""
    mount = directory / "small"
    mount.mkdir()
    size = f"size={ROOM_BLOCKS * BLOCK_BYTES}"
    run("mount", "-t", "tmpfs", "-o", size, "none", str(mount))
    path = mount / "disk.raw"
    path.touch()
    os.truncate(path, MIB)
    yield path
    run("umount", "-l", str(mount))


@pytest.fixture
def device(directory: Path) -> Iterator[tuple[Path, Path]]:
    """A block device, and the file below it: without that, the device has errors."""
    path = directory / "below.raw"
    path.write_bytes(bytes(MIB))
    device = run("losetup", "--find", "--show", str(path))
    yield Path(device), path
    run("losetup", "--detach", device)


@pytest.fixture
def network_disk(directory: Path) -> Iterator[tuple[str, Path]]:
    """The address of a network block device, and the file whose presence makes it fail."""
    if shutil.which("nbdkit") is None:
        pytest.skip("nbdkit is not installed")
    sock, switch = directory / "nbd.sock", directory / "errors"
    command = ["setpriv", "--pdeathsig", "KILL", "nbdkit", "-f", "-U", str(sock)]
    command += ["--filter=error", "memory", "1M"]
    command += ["error=EIO", "error-rate=100%", f"error-file={switch}"]
    with subprocess.Popen(command) as nbdkit:
        deadline = time.monotonic() + 30
        while not sock.exists():
            assert nbdkit.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield f"nbd+unix:///?socket={sock}", switch
        nbdkit.kill()


def statuses(answers: list[str]) -> str:
    return "".join(answer[0] for answer in answers)


def wait_events(guest: DiskGuest, count: int) -> list[dict[str, object]]:
    deadline = time.monotonic() + 10
    while len(events := guest.events("vm.disk_error")) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return events


@pytest.mark.parametrize("io_engine", ["auto", "threads"])
def test_a_full_host_file_system_is_told_and_the_guest_lives_on(
    own_hostel: Hostel, full: Path, io_engine: str
) -> None:
    guest = DiskGuest(own_hostel, full, io_engine=io_engine)
    assert statuses(guest.ask("ABCDEFGHab")) == OK * ROOM_BLOCKS + IOERR * 4 + OK * 2
    told = wait_events(guest, 1)
    assert told == [{"disk": "root", "error": "ENOSPC", "count": 1}]
    # Others are counted, and told a minute later; a guest cannot flood the operator.
    assert statuses(guest.ask("HHHHa")) == IOERR * 4 + OK
    assert guest.events("vm.disk_error") == told
    stats = own_hostel.api.get(f"/v1/vms/{guest.name}/stats")["disks"]["root"]
    assert (stats["host_errors"], stats["errors"]) == (8, 8)
    assert own_hostel.api.vm(guest.name)["state"] == "running"
    # Nor by resetting itself.
    guest.act("reset")
    assert statuses(guest.ask("Ha")) == IOERR + OK
    assert guest.events("vm.disk_error") == told
    guest.delete()


def test_a_device_that_fails_is_told_by_the_name_of_its_error(
    own_hostel: Hostel, device: tuple[Path, Path]
) -> None:
    path, below = device
    guest = DiskGuest(own_hostel, path, cache="none")
    assert statuses(guest.ask("Aa")) == OK * 2
    os.truncate(below, BLOCK_BYTES)
    assert statuses(guest.ask("ab")) == OK + IOERR
    assert wait_events(guest, 1) == [{"disk": "root", "error": "EIO", "count": 1}]
    os.truncate(below, MIB)
    assert statuses(guest.ask("b")) == OK
    guest.delete()


def test_errors_of_a_network_disk_are_the_guests_alone(
    own_hostel: Hostel, network_disk: tuple[str, Path]
) -> None:
    address, switch = network_disk
    guest = DiskGuest(own_hostel, nbd=address)
    assert statuses(guest.ask("Aa")) == OK * 2
    switch.touch()
    assert statuses(guest.ask("AaBb")) == IOERR * 4
    switch.unlink()
    assert guest.ask("a") == [OK + "w1"]
    assert guest.events("vm.backend_lost") == []
    assert own_hostel.api.vm(guest.name)["reason"] is None
    guest.delete()


def test_errors_are_told_once_by_a_hosteld_that_was_away_and_anew_after_a_restart(
    own_hostel: Hostel, full: Path
) -> None:
    guest = DiskGuest(own_hostel, full)
    guest.ask("ABCD")
    own_hostel.daemon.kill()
    own_hostel.daemon.start()
    guest.follow()
    assert guest.events("vm.disk_error") == []
    assert statuses(guest.ask("H")) == IOERR
    assert len(wait_events(guest, 1)) == 1
    own_hostel.restart()
    guest.follow()
    assert len(guest.events("vm.disk_error")) == 1
    guest.act("kill", "start")
    assert statuses(guest.ask("H")) == IOERR
    assert len(wait_events(guest, 2)) == 2
    guest.delete()
