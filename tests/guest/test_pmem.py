# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Files of the host as /dev/pmem of a Debian guest, with file systems on them that use DAX."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.guests import Guest
from tests.support.hostel import Hostel
from tests.support.linux import LinuxGuest

DATA_MIB, FIXED_MIB = 64, 16


@dataclass(frozen=True)
class Rig:
    """The guest, and the files behind /dev/pmem0 and /dev/pmem1."""

    guest: LinuxGuest
    data: Path
    fixed: Path


def make_file_system(path: Path, size_mib: int, content: Path | None = None) -> Path:
    with path.open("wb") as file:
        file.truncate(size_mib << 20)
    # DAX wants blocks that are pages.
    argv = ["mke2fs", "-q", "-t", "ext4", "-b", "4096"]
    argv += [] if content is None else ["-d", str(content)]
    subprocess.run([*argv, str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def rig(hostel: Hostel, guest: Guest) -> Iterator[Rig]:
    content = hostel.directory / "content"
    content.mkdir()
    (content / "greeting").write_text("hello from the host\n")
    data = make_file_system(hostel.directory / "data.pmem", DATA_MIB)
    fixed = make_file_system(hostel.directory / "fixed.pmem", FIXED_MIB, content)
    hostel.api.post(
        "/v1/vms?wait=60",
        {
            "name": "pmem",
            "memory_mib": 256,
            "kernel": "debian",
            "initrd": "initrd",
            "cmdline": guest.cmdline,
            "disks": [{"id": "root", "image": "root"}],
            "pmem": [
                {"id": "data", "path": str(data)},
                {"id": "fixed", "path": str(fixed), "read_only": True},
            ],
        },
    )
    linux = LinuxGuest(hostel, guest, "pmem")
    with linux.running():
        yield Rig(linux, data, fixed)


def test_guest_finds_both_and_mounts_them_with_dax(rig: Rig) -> None:
    guest = rig.guest
    sizes = guest.ask("cat /sys/block/pmem0/size /sys/block/pmem1/size").split()
    assert sizes == [str(DATA_MIB << 11), str(FIXED_MIB << 11)]
    guest.ask("mkdir -p /data /fixed && mount -t ext4 -o dax /dev/pmem0 /data")
    guest.ask("mount -t ext4 -o ro,dax /dev/pmem1 /fixed")
    mounts = guest.ask("cat /proc/mounts")
    assert "/dev/pmem0 /data ext4 rw,relatime,dax=always" in mounts
    assert "/dev/pmem1 /fixed ext4 ro,relatime,dax=always" in mounts
    assert guest.ask("cat /fixed/greeting") == "hello from the host"


def test_what_is_flushed_is_in_the_host_s_file(rig: Rig) -> None:
    guest = rig.guest
    guest.ask("head -c 4194304 /dev/urandom > /tmp/random")
    before = guest.hostel.api.get("/v1/vms/pmem/stats")["pmem"]["data"]["syncs"]
    guest.ask("dd if=/tmp/random of=/data/random bs=64k conv=fsync && umount /data")
    after = guest.hostel.api.get("/v1/vms/pmem/stats")["pmem"]["data"]
    assert after["syncs"] > before
    assert after["errors"] == 0
    command = ["debugfs", "-R", "cat /random", str(rig.data)]
    found = subprocess.run(command, check=True, capture_output=True).stdout
    assert guest.ask("sha256sum < /tmp/random").split()[0] == hashlib.sha256(found).hexdigest()


def test_read_only_file_is_not_changed_and_the_guest_learns_that(rig: Rig) -> None:
    guest, before = rig.guest, rig.fixed.read_bytes()
    guest.ask("umount /fixed")
    written = "dd if=/tmp/random of=/dev/pmem1 bs=4096 count=1 conv=notrunc,fsync"
    assert "Input/output error" in guest.sh(written).text  # busybox's dd ends with 0 even so
    assert rig.fixed.read_bytes() == before
    assert guest.hostel.api.get("/v1/vms/pmem/stats")["pmem"]["fixed"]["errors"] > 0
    assert guest.vm["state"] == "running"


def test_it_outlives_a_pause_and_a_reset_of_the_guest(rig: Rig) -> None:
    guest = rig.guest
    guest.hostel.api.act("pmem", "pause")
    guest.hostel.api.act("pmem", "resume")
    guest.ask("mount -t ext4 -o dax /dev/pmem0 /data")
    guest.ask("cp /tmp/random /data/again && sync")
    wanted = guest.ask("sha256sum < /tmp/random")
    offset = guest.log_end()
    guest.hostel.api.act("pmem", "reset")
    guest.attach(offset)
    guest.log_in()
    guest.ask("mkdir -p /data && mount -t ext4 -o dax /dev/pmem0 /data")
    assert guest.ask("sha256sum < /data/again") == wanted
