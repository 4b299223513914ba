# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""One Debian guest with a qcow2 disk and shared directories, and back ends that are killed."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.guests import Guest
from lab.rest import Json
from tests.support.hostel import Hostel, kill
from tests.support.linux import LinuxGuest
from tests.support.processes import back_ends
from tests.support.storage_daemon import make_image
from tests.support.vhost_user_hub import Hub

MIB = 1 << 20
DISK_MIB = 64
LIMIT_S = 120.0


@dataclass(frozen=True)
class Rig:
    """The guest, and what of the host it uses."""

    guest: LinuxGuest
    image: Path
    shared: Path

    def events(self, kind: str) -> list[Json]:
        items: list[Json] = self.guest.hostel.api.get("/v1/events?limit=1000")["items"]
        return [event for event in items if event["type"] == kind]

    def kill_back_end(self, device: str) -> None:
        """Kill a device's back end, in the middle of whatever it does."""
        for pid in back_ends(self.guest.hostel, device):
            kill(pid)

    def wait_recovered(self, count: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        while len(self.events("vm.backend_recovered")) < count:
            assert time.monotonic() < deadline, self.events("vm.backend_failed")
            time.sleep(0.2)


@pytest.fixture(scope="module")
def rig(hostel: Hostel, guest: Guest) -> Iterator[Rig]:
    image = make_image(hostel.directory / "data.qcow2", DISK_MIB * MIB)
    shared = hostel.directory / "shared"
    shared.mkdir()
    (shared / "greeting").write_text("hello from the host\n")
    hub = Hub(hostel.directory / "hub.sock")
    hostel.api.post(
        "/v1/vms?wait=60",
        {
            "name": "backed",
            "memory_mib": 256,
            "kernel": "debian",
            "initrd": "initrd",
            "cmdline": guest.cmdline,
            "disks": [
                {"id": "root", "image": "root"},
                {"id": "data", "path": str(image), "format": "qcow2"},
            ],
            "shares": [
                {"tag": "src", "path": str(shared)},
                {"tag": "fixed", "path": str(shared), "read_only": True},
            ],
            "nics": [{"id": f"lan{n}", "socket": str(hub.path)} for n in (0, 1)],
        },
    )
    backed = LinuxGuest(hostel, guest, "backed")
    with backed.running():
        yield Rig(backed, image, shared)
    hub.close()
    assert back_ends(hostel) == set()


def test_what_is_written_to_a_qcow2_disk_is_read_again(rig: Rig) -> None:
    guest = rig.guest
    assert guest.ask("cat /sys/block/vdb/size") == str(DISK_MIB * MIB // 512)
    guest.ask("dd if=/dev/urandom of=/tmp/random bs=64k count=32 2> /dev/null")
    guest.ask("dd if=/tmp/random of=/dev/vdb bs=64k seek=16 conv=notrunc,fsync")
    written = guest.ask("sha256sum < /tmp/random")
    read = "dd if=/dev/vdb bs=64k skip=16 count=32 iflag=direct 2> /dev/null | sha256sum"
    assert guest.ask(read) == written
    assert rig.image.stat().st_size < DISK_MIB * MIB


def test_file_system_on_it_survives_a_killed_daemon(rig: Rig) -> None:
    guest = rig.guest
    guest.ask("mke2fs -q /dev/vdb && mkdir -p /data && mount -t ext2 /dev/vdb /data")
    guest.type("(for n in 1 2 3 4 5 6 7 8; do dd if=/tmp/random of=/data/$n bs=64k conv=fsync")
    guest.type("done; echo copied > /tmp/done) 2> /dev/null &")
    for count in (1, 2):
        rig.kill_back_end("data")
        rig.wait_recovered(count)
    guest.ask("while [ ! -e /tmp/done ]; do sleep 0.2; done")
    guest.ask("umount /data && mount -t ext2 /dev/vdb /data")
    wanted = guest.ask("sha256sum < /tmp/random")
    for number in range(1, 9):
        assert guest.ask(f"sha256sum < /data/{number}") == wanted
    assert guest.ask("dmesg | grep -c 'I/O error' || true") == "0"
    assert [lost["data"]["device"] for lost in rig.events("vm.backend_lost")] == ["data"] * 2


def test_frames_of_one_interface_reach_the_other_through_the_switch(rig: Rig) -> None:
    guest = rig.guest
    for n in (0, 1):
        guest.ask(f"ip addr add 10.9.{n}.1/24 dev eth{n} && ip link set eth{n} up")
    received = "cat /sys/class/net/eth1/statistics/rx_packets"
    before = int(guest.ask(received))
    # Requests from an address of its own are ones that a host takes and does not answer.
    guest.sh("arping -c 5 -I eth0 -s 10.9.0.1 10.9.1.1")
    assert int(guest.ask(received)) >= before + 5


def test_host_s_directory_is_read_and_written(rig: Rig) -> None:
    guest = rig.guest
    guest.ask("modprobe virtiofs && mkdir -p /src && mount -t virtiofs src /src")
    assert guest.ask("cat /src/greeting") == "hello from the host"
    guest.ask("cp /tmp/random /src/random && sync")
    digest = hashlib.sha256((rig.shared / "random").read_bytes()).hexdigest()
    assert guest.ask("sha256sum < /tmp/random").split()[0] == digest


def test_read_only_share_takes_no_write(rig: Rig) -> None:
    guest = rig.guest
    guest.ask("mkdir -p /fixed && mount -t virtiofs fixed /fixed")
    assert guest.ask("cat /fixed/greeting") == "hello from the host"
    assert "Read-only file system" in guest.sh("touch /fixed/new").text
    assert sorted(os.listdir(rig.shared)) == ["greeting", "random"]  # noqa: PTH208


def test_share_can_be_mounted_again_after_its_server_was_killed(rig: Rig) -> None:
    guest = rig.guest
    before = len(rig.events("vm.backend_recovered"))
    rig.kill_back_end("share:src")
    rig.wait_recovered(before + 1)
    guest.sh("cat /src/greeting")  # its session is gone, but it is answered
    guest.ask("umount /src && mount -t virtiofs src /src")
    assert guest.ask("cat /src/greeting") == "hello from the host"


def test_pause_and_reset_keep_disk_and_shares(rig: Rig) -> None:
    guest = rig.guest
    guest.hostel.api.act("backed", "pause")
    guest.hostel.api.act("backed", "resume")
    wanted = guest.ask("sha256sum < /tmp/random")
    offset = guest.log_end()
    guest.hostel.api.act("backed", "reset")
    guest.attach(offset)
    guest.log_in()
    guest.ask("mkdir -p /data /src && modprobe virtiofs && mount -t virtiofs src /src")
    guest.ask("mount -t ext2 /dev/vdb /data")
    assert guest.ask("sha256sum < /data/8") == wanted
    assert guest.ask("cat /src/greeting") == "hello from the host"
