# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Ways into a Linux kernel, and ways out of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.guests import Guest
from lab.hosteld import is_running
from lab.rest import ApiFailure, Console, Json
from tests.support.hostel import Hostel
from tests.support.linux import BOOT_LIMIT_S, LinuxGuest

ENTRY_AT = 24  # e_entry of an ELF64 header
CMDLINE = "console=ttyS0 quiet reboot=k panic=-1"


def create(hostel: Hostel, name: str, **options: object) -> str:
    body = {
        "name": name,
        "memory_mib": 128,
        "kernel": "debian",
        "initrd": "instant",
        "cmdline": CMDLINE,
        **options,
    }
    hostel.api.post("/v1/vms?wait=60", body)
    return name


def run_to_end(hostel: Hostel, name: str) -> Json:
    hostel.api.act(name, "start")
    vm = hostel.api.wait_state(name, "stopped", limit_s=BOOT_LIMIT_S)
    hostel.delete(name)
    return vm


def test_a_bzimage_is_unpacked_at_import(hostel: Hostel) -> None:
    kernel = hostel.api.get("/v1/kernels/debian")
    assert kernel["format"] == "bzImage"
    assert kernel["compression"] is not None
    assert "6." in kernel["banner"]


def test_an_elf_is_entered_by_pvh(hostel: Hostel) -> None:
    kernels = hostel.daemon.state_dir.glob("kernels/**/*")
    elf = next(p for p in kernels if p.is_file() and p.read_bytes()[:4] == b"\x7fELF")
    # Linux is entered at its 64-bit entry; without one, by the note.
    image = elf.read_bytes()
    copy = hostel.directory / "vmlinux"
    copy.write_bytes(image[:ENTRY_AT] + bytes(8) + image[ENTRY_AT + 8 :])
    hostel.api.post("/v1/kernels?wait=60", {"name": "vmlinux", "path": str(copy)})
    assert hostel.api.get("/v1/kernels/vmlinux")["entry"] == "pvh"
    cmdline = f"{CMDLINE} hostel.end=poweroff"
    vm = run_to_end(hostel, create(hostel, "pvh", kernel="vmlinux", cmdline=cmdline))
    assert vm["reason"]["code"] == "guest_poweroff"
    assert vm["boot_time_us"] is not None


@pytest.fixture(scope="module")
def wide(hostel: Hostel, guest: Guest) -> Iterator[LinuxGuest]:
    # From the root disk, which has the driver that reports a panic.
    options = {"vcpus": 4, "memory_mib": 256, "initrd": "initrd", "on_panic": "stop"}
    disks = [{"id": "root", "image": "root"}]
    create(hostel, "wide", cmdline=guest.cmdline, disks=disks, **options)
    wide = LinuxGuest(hostel, guest, "wide")
    with wide.running():
        yield wide


def test_sixteen_vcpus_come_up(hostel: Hostel) -> None:
    # Not to a shell: on an emulated host, sixteen that all have work to do take minutes.
    cmdline = "console=ttyS0 reboot=k panic=-1 hostel.end=poweroff"
    name = create(hostel, "sixteen", vcpus=16, memory_mib=256, cmdline=cmdline)
    hostel.api.act(name, "start")
    hostel.api.wait_state(name, "stopped", limit_s=2 * BOOT_LIMIT_S)
    assert "smp: Brought up 1 node, 16 CPUs" in hostel.console(name)
    hostel.delete(name)


def test_every_vcpu_is_online(wide: LinuxGuest) -> None:
    assert wide.ask("nproc") == "4"
    assert wide.ask("cat /sys/devices/system/cpu/online") == "0-3"


def test_a_panic_is_told(wide: LinuxGuest) -> None:
    wide.type("echo c > /proc/sysrq-trigger")
    vm = wide.wait_ended("guest_panic")
    assert vm["pid"] is None
    assert "Kernel panic" in wide.hostel.console("wide")


def test_a_killed_worker_is_told_at_once(wide: LinuxGuest) -> None:
    wide.hostel.api.act("wide", "start")
    Console(wide.hostel.api, "wide", wide.log_end())
    pid = wide.vm["pid"]
    os.kill(pid, signal.SIGKILL)
    vm = wide.hostel.api.wait_state("wide", "crashed", limit_s=30)
    assert vm["reason"]["code"] == "worker_killed"
    assert not is_running(pid)


def test_what_is_not_whole_is_refused(hostel: Hostel, guest: Guest) -> None:
    whole = guest.kernel.read_bytes()
    middle = len(whole) // 2
    corrupt = whole[:middle] + bytes(b ^ 0xFF for b in whole[middle : middle + 64])
    for name, data in (
        ("half", whole[:middle]),
        ("corrupt", corrupt + whole[middle + 64 :]),
    ):
        path = Path(hostel.directory, name)
        path.write_bytes(data)
        with pytest.raises(ApiFailure) as failure:
            hostel.api.post("/v1/kernels?wait=60", {"name": name, "path": str(path)})
        assert failure.value.status == 422
