# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Disks that fail under a running Linux guest, and one whose file is swapped under it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.guests import Guest
from lab.rest import Json
from tests.support.hostel import Hostel, is_locked
from tests.support.linux import LinuxGuest

MIB = 1 << 20
# The guest is told by an interrupt and goes on in a work queue of its own.
UNTIL = "for i in $(seq 300); do {claim} && break; sleep 0.1; done; {claim} && echo done"


SECTORS = 16 * MIB // 512
GOOD_SECTORS = MIB // 512


def run(*command: str, given: str = "") -> str:
    return subprocess.run(
        command, input=given, check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


@pytest.fixture(scope="module")
def small(hostel: Hostel) -> Iterator[Path]:
    """A sparse file of 16 MiB in a file system that has room for 1 MiB of it."""
    mount = hostel.directory / "small"
    mount.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount))
    path = mount / "disk.raw"
    path.touch()
    os.truncate(path, 16 * MIB)
    yield path
    run("umount", "-l", str(mount))


class FailingDevice:
    """A device of 16 MiB by device-mapper, of which only the first MiB works."""

    NAME = "hostel-failing"

    def __init__(self, directory: Path) -> None:
        below = directory / "below.raw"
        below.write_bytes(bytes(16 * MIB))
        self._loop = run("losetup", "--find", "--show", str(below))
        run("modprobe", "dm-mod")
        self._dmsetup("create", GOOD_SECTORS)
        info = ("info", "-c", "--noheadings", "-o", "blkdevname", self.NAME)
        self.path = Path("/dev", run("dmsetup", *info))

    def _dmsetup(self, command: str, good: int) -> None:
        table = f"0 {good} linear {self._loop} 0\n"
        if good < SECTORS:
            table += f"{good} {SECTORS - good} error\n"
        run("dmsetup", command, self.NAME, "--noudevrules", "--noudevsync", given=table)

    def heal(self) -> None:
        """Make all of it work."""
        self._dmsetup("load", SECTORS)
        run("dmsetup", "resume", self.NAME, "--noudevrules", "--noudevsync")

    def remove(self) -> None:
        run("dmsetup", "remove", self.NAME, "--noudevrules", "--noudevsync")
        run("losetup", "--detach", self._loop)


@pytest.fixture(scope="module")
def failing(hostel: Hostel) -> Iterator[FailingDevice]:
    device = FailingDevice(hostel.directory)
    yield device
    device.remove()


@pytest.fixture(scope="module")
def old(hostel: Hostel) -> Path:
    path = hostel.directory / "old.raw"
    path.write_bytes(b"old ".ljust(512) * (2 * 8 * 1024))
    return path


@pytest.fixture(scope="module")
def linux(
    hostel: Hostel, guest: Guest, small: Path, failing: FailingDevice, old: Path
) -> Iterator[LinuxGuest]:
    """Its disks are vda, vdb and vdc."""
    hostel.api.post(
        "/v1/vms?wait=60",
        {
            "name": "disks",
            "kernel": "debian",
            "initrd": "initrd",
            # No root disk: a shell in the initramfs is there sooner.
            "cmdline": "console=ttyS0 quiet reboot=k panic=-1",
            "disks": [
                {"id": "small", "path": str(small), "rate_group": "both"},
                {"id": "failing", "path": str(failing.path), "cache": "none"},
                {"id": "data", "path": str(old), "rate_group": "both"},
            ],
            "rate_groups": [{"id": "both"}],
        },
    )
    linux = LinuxGuest(hostel, guest, "disks")
    with linux.running("a shell in the initramfs"):
        yield linux


def wait_error(linux: LinuxGuest, disk: str) -> Json:
    deadline = time.monotonic() + 30
    while True:
        events = linux.hostel.api.get("/v1/events?limit=1000")["items"]
        for event in events:
            if event["type"] == "vm.disk_error" and event["data"]["disk"] == disk:
                return dict(event["data"])
        assert time.monotonic() < deadline
        time.sleep(0.2)


def write(count_mib: int) -> str:
    return f"dd if=/dev/zero of=/dev/vda bs=64k count={16 * count_mib} oflag=direct 2>&1"


def test_a_full_host_is_an_io_error_for_the_guest_and_an_event_for_the_operator(
    linux: LinuxGuest, small: Path
) -> None:
    assert "Input/output error" in linux.sh(write(4)).text
    assert "I/O error, dev vda" in linux.ask("dmesg")
    told = wait_error(linux, "small")
    assert told["error"] == "ENOSPC"
    assert told["count"] >= 1
    # With room it goes on, as if nothing had been.
    run("mount", "-o", "remount,size=32m", str(small.parent))
    assert "64+0 records out" in linux.ask(write(4))
    assert linux.vm["state"] == "running"


def read_at(mib: int) -> str:
    return f"dd if=/dev/vdb of=/dev/null bs=64k skip={16 * mib} count=1 iflag=direct 2>&1"


def test_a_failing_device_is_told_by_its_error_and_no_other_disk_suffers(
    linux: LinuxGuest, failing: FailingDevice
) -> None:
    assert "Input/output error" in linux.sh(read_at(4)).text
    assert "1+0 records out" in linux.ask(read_at(0))
    assert wait_error(linux, "failing")["error"] == "EIO"
    assert "1+0 records out" in linux.ask(read_at(0).replace("vdb", "vdc"))
    failing.heal()
    assert "1+0 records out" in linux.ask(read_at(4))
    assert linux.vm["reason"] is None


def read_both(count: int) -> str:
    """Read from both disks of the group at the same time, request by request."""
    read = f"dd of=/dev/null bs=4k count={count} iflag=direct"
    return f"({read} if=/dev/vda & {read} if=/dev/vdc & wait)"


def requests(linux: LinuxGuest) -> list[int]:
    disks = linux.hostel.api.get("/v1/vms/disks/stats")["disks"]
    return [disks["small"]["reads"], disks["data"]["reads"]]


def test_two_disks_of_a_rate_group_have_its_limit_in_sum_until_it_is_lifted(
    linux: LinuxGuest,
) -> None:
    group = "/v1/vms/disks/rate-groups/both"
    before = requests(linux)
    began = time.monotonic()
    limit = {"ops_per_s": 100, "ops_burst": 10}
    linux.hostel.api.call("PATCH", group, {"rate_limit": limit})
    assert linux.ask(f"{read_both(150)} 2>&1").count("150+0 records out") == 2
    after = requests(linux)
    served = [now - then for now, then in zip(after, before, strict=True)]
    assert min(served) >= 150
    assert sum(served) <= 10 + 100 * (time.monotonic() - began)
    # Now what would take minutes; it waits in the rings, and goes with the new limit.
    linux.hostel.api.call("PATCH", group, {"rate_limit": {"ops_per_s": 5}})
    linux.ask(f"({read_both(600)}; touch /let-go) >/dev/null 2>&1 &")
    linux.ask("sleep 2")
    assert sum(requests(linux)) - sum(after) < 2 * 600
    linux.hostel.api.call("PATCH", group, {"rate_limit": None})
    assert linux.ask(UNTIL.format(claim="[ -e /let-go ]")) == "done"
    assert linux.hostel.api.get("/v1/vms/disks/stats")["disks"]["data"]["throttled"] > 0


def test_a_disk_has_another_file_and_the_guest_its_size_without_a_rescan(
    linux: LinuxGuest, old: Path
) -> None:
    new = linux.hostel.directory / "new.raw"
    new.write_bytes(b"new ".ljust(512) * (2 * 24 * 1024))
    assert linux.ask("cat /sys/block/vdc/size") == str(8 * MIB // 512)
    # Under load: what is written all the while goes to one file or to the other, without an error.
    load = "for i in $(seq 60); do dd if=/dev/zero of=/dev/vdc bs=4k seek=64 count=16 oflag=direct"
    linux.ask(f"({load} || touch /failed; done; touch /ended) >/dev/null 2>&1 &")
    wanted = {"path": str(new)}
    vm = linux.hostel.api.call("PATCH", "/v1/vms/disks/disks/data", wanted)
    assert vm["disks"][2]["path"] == str(new)
    assert linux.ask(UNTIL.format(claim=f"[ $(cat /sys/block/vdc/size) = {24 * MIB // 512} ]"))
    assert linux.ask("dd if=/dev/vdc bs=512 count=1 iflag=direct 2>/dev/null") == "new"
    assert (is_locked(old), is_locked(new)) == (False, True)
    assert linux.ask(UNTIL.format(claim="[ -e /ended ]")) == "done"
    assert linux.ask("ls /failed 2>/dev/null; true") == ""
    assert linux.ask("dmesg | grep -c 'I/O error, dev vdc' || true") == "0"
    linux.ask("echo from the guest | dd of=/dev/vdc bs=512 seek=3 conv=sync,fsync")
    assert new.read_bytes()[3 * 512 :].startswith(b"from the guest")
    assert old.read_bytes()[3 * 512 :].startswith(b"old ")
