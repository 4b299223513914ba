# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Disks and network interfaces that come to a running Linux guest, and go."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.guests import Guest
from tests.support.hostel import Hostel, has_tap, is_locked
from tests.support.linux import LinuxGuest

MIB = 1 << 20
TAP = "hg-plug"
HOST, ADDRESS = "10.77.9.1", "10.77.9.2"
# The guest is told by an interrupt and goes on in a work queue of its own.
UNTIL = "for i in $(seq 300); do {claim} && break; sleep 0.1; done; {claim} && echo done"


@pytest.fixture(scope="module")
def plug(hostel: Hostel, guest: Guest) -> Iterator[LinuxGuest]:
    hostel.api.post(
        "/v1/vms?wait=60",
        {
            "name": "plug",
            "kernel": "debian",
            "initrd": "initrd",
            # No root disk: a shell in the initramfs is there sooner.
            "cmdline": "console=ttyS0 quiet reboot=k panic=-1",
        },
    )
    plug = LinuxGuest(hostel, guest, "plug")
    with plug.running("a shell in the initramfs"):
        yield plug


@pytest.fixture
def disk(hostel: Hostel) -> Path:
    path = hostel.directory / "plugged.raw"
    path.write_bytes(b"from the host".ljust(512) + bytes(8 * MIB - 512))
    return path


def until(plug: LinuxGuest, claim: str) -> None:
    assert plug.ask(UNTIL.format(claim=claim)) == "done"


def attach_disk(plug: LinuxGuest, disk: Path) -> None:
    body = {"id": "data", "path": str(disk)}
    vm = plug.hostel.api.post("/v1/vms/plug/disks?wait=60", body)
    assert [found["id"] for found in vm["disks"]] == ["data"]
    until(plug, "[ -b /dev/vda ]")


def detach(plug: LinuxGuest, what: str, query: str = "") -> None:
    plug.hostel.api.call("DELETE", f"/v1/vms/plug/{what}?wait=60&timeout_s=50{query}")


def test_a_disk_comes_is_written_and_goes(plug: LinuxGuest, disk: Path) -> None:
    attach_disk(plug, disk)
    assert plug.ask("cat /sys/block/vda/size") == str(8 * MIB // 512)
    assert plug.ask("cat /sys/block/vda/serial") == "data"
    assert plug.ask("head -c 13 /dev/vda") == "from the host"
    plug.ask("echo from the guest | dd of=/dev/vda bs=512 seek=1 conv=sync,fsync")
    assert disk.read_bytes()[512:526] == b"from the guest"
    assert is_locked(disk)

    detach(plug, "disks/data")
    assert plug.ask("ls /sys/block") == ""
    assert plug.vm["disks"] == []
    assert not is_locked(disk)


def test_a_disk_comes_again_into_the_slot_that_it_left(plug: LinuxGuest, disk: Path) -> None:
    attach_disk(plug, disk)
    where = plug.ask("readlink -f /sys/block/vda/device")
    assert "/0000:00:01.0/virtio" in where
    detach(plug, "disks/data")
    attach_disk(plug, disk)
    assert plug.ask("head -c 13 /dev/vda") == "from the host"
    detach(plug, "disks/data")
    assert plug.ask("ls /sys/block") == ""


def test_a_disk_that_is_pulled_out_is_gone_and_the_guest_runs_on(
    plug: LinuxGuest, disk: Path
) -> None:
    attach_disk(plug, disk)
    detach(plug, "disks/data", "&force=true")
    until(plug, "[ ! -e /sys/block/vda ]")
    assert not is_locked(disk)
    # Another one in its slot is found, also by a guest that has not come to drop the first.
    attach_disk(plug, disk)
    detach(plug, "disks/data", "&force=true")
    plug.hostel.api.post("/v1/vms/plug/disks?wait=60", {"id": "data", "path": str(disk)})
    until(plug, "[ \"$(head -c 13 /dev/vd? 2>&1)\" = 'from the host' ]")
    detach(plug, "disks/data")
    assert plug.ask("ls /sys/block") == ""


def test_a_network_interface_comes_carries_packets_and_goes(plug: LinuxGuest) -> None:
    body = {"id": "net0", "tap": TAP, "mac": "02:00:00:00:09:01"}
    plug.hostel.api.post("/v1/vms/plug/nics?wait=60", body)
    for words in (f"addr add {HOST}/24 dev {TAP}", f"link set {TAP} up"):
        subprocess.run(["ip", *words.split()], check=True)
    until(plug, "[ -e /sys/class/net/eth0 ]")
    assert plug.ask("cat /sys/class/net/eth0/address") == "02:00:00:00:09:01"
    plug.ask(f"ip addr add {ADDRESS}/24 dev eth0; ip link set eth0 up")
    assert " 0% packet loss" in plug.ask(f"ping -c 3 -W 10 {HOST}")

    detach(plug, "nics/net0")
    assert plug.ask("ls /sys/class/net") == "lo"
    assert plug.vm["nics"] == []
    assert not has_tap(TAP)


def test_the_guest_has_nothing_to_complain_of(plug: LinuxGuest) -> None:
    # "WARNING:" is also what a kernel that was too slow says of itself; these are not.
    words = ("ACPI Error", "ACPI BIOS Error", "can't assign", "failed to assign", "BUG:")
    log = plug.ask("dmesg").splitlines()
    assert [line for line in log if any(word in line for word in words)] == []
