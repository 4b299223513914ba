# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Devices that come to a running guest of a few bytes, and go."""

from __future__ import annotations

import struct
import threading
from pathlib import Path

import pytest

from devices.acpi.pci_hotplug import DOWN_OFFSET, EJECT_OFFSET, PCI_HOTPLUG_PORT, UP_OFFSET
from lab.rest import ApiFailure, Console
from tests.support import tiny_kernel as tiny
from tests.support.hostel import Hostel, has_tap, is_locked

CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
SLOT_1 = 0x8000_0800


def port(number: int) -> bytes:
    return b"\x66\xba" + struct.pack("<H", number)  # mov dx, number


def unless_zero(register: int, body: bytes) -> bytes:
    """Read a hotplug register; do ``body`` when it is not zero, with what it was in eax."""
    # in eax, dx; test eax, eax; jz over the body
    return port(PCI_HOTPLUG_PORT + register) + b"\xed\x85\xc0\x74" + bytes([len(body)]) + body


# mov eax, SLOT_1; out; in eax; cmp ax, virtio's vendor; jne over the letter
LOOK = port(CONFIG_ADDRESS) + b"\xb8" + struct.pack("<I", SLOT_1) + b"\xef"
LOOK += port(CONFIG_DATA) + b"\xed\x66\x3d\xf4\x1a\x75\x07" + tiny.say("V")
EJECT = port(PCI_HOTPLUG_PORT + EJECT_OFFSET) + b"\xef"
COME = unless_zero(UP_OFFSET, tiny.say("+") + LOOK)
GO = unless_zero(DOWN_OFFSET, EJECT + tiny.say("-") + LOOK)
# What an operating system does by its ACPI interpreter.
PLUGGING = tiny.forever(COME + GO)
LAZY = tiny.forever(COME)


@pytest.fixture
def disk(hostel: Hostel) -> Path:
    path = hostel.directory / "data.raw"
    path.write_bytes(bytes(4096))
    return path


def attach(hostel: Hostel, name: str, disk: Path) -> None:
    hostel.api.post(f"/v1/vms/{name}/disks?wait=60", {"id": "data", "path": str(disk)})


def detach(hostel: Hostel, name: str, what: str = "disks/data", query: str = "") -> None:
    hostel.api.call("DELETE", f"/v1/vms/{name}/{what}?wait=60{query}")


def disks(hostel: Hostel, name: str) -> list[str]:
    """Return the disks that the worker has."""
    return list(hostel.api.get(f"/v1/vms/{name}/stats")["disks"])


def test_a_disk_comes_and_goes_again_and_again(hostel: Hostel, disk: Path) -> None:
    name = hostel.run(PLUGGING)
    console = Console(hostel.api, name)
    seen = 0
    for _ in range(3):
        attach(hostel, name, disk)
        seen = console.wait_for("+V", after=seen)
        assert disks(hostel, name) == ["data"]
        assert is_locked(disk)
        detach(hostel, name)
        seen = console.wait_for("-", after=seen)
        assert (disks(hostel, name), hostel.api.vm(name)["disks"]) == ([], [])
        assert not is_locked(disk)
    # When the guest has let go, the slot is empty at once: it never found the vendor again.
    assert "-V" not in hostel.console(name)
    console.close()
    hostel.delete(name)


def test_a_disk_of_the_launch_goes_too(hostel: Hostel, disk: Path) -> None:
    name = hostel.run(PLUGGING, disks=[{"id": "data", "path": str(disk)}])
    detach(hostel, name)
    assert (disks(hostel, name), is_locked(disk)) == ([], False)
    hostel.delete(name)


def test_a_network_interface_comes_and_goes_with_its_tap(hostel: Hostel) -> None:
    name, tap = hostel.run(PLUGGING), hostel.tap("plug")
    hostel.api.post(f"/v1/vms/{name}/nics?wait=60", {"id": "net0", "tap": tap})
    assert has_tap(tap)
    assert list(hostel.api.get(f"/v1/vms/{name}/stats")["nics"]) == ["net0"]
    detach(hostel, name, "nics/net0")
    assert not has_tap(tap)
    hostel.delete(name)


def test_a_guest_that_does_not_answer_keeps_its_disk_until_it_is_pulled_out(
    hostel: Hostel, disk: Path
) -> None:
    name = hostel.run(LAZY)
    console = Console(hostel.api, name)
    attach(hostel, name, disk)
    seen = console.wait_for("+V")
    with pytest.raises(ApiFailure, match="pull the disk out with force") as caught:
        detach(hostel, name, query="&timeout_s=0.2")
    assert (caught.value.status, caught.value.code) == (409, "guest_keeps_device")
    assert disks(hostel, name) == ["data"]
    detach(hostel, name, query="&force=true")
    assert (disks(hostel, name), is_locked(disk)) == ([], False)
    # It is told to look again, and finds nothing.
    console.wait_for("+", after=seen)
    assert hostel.console(name).count("V") == 1
    console.close()
    hostel.delete(name)


def test_what_was_attached_survives_a_reset_a_new_hosteld_and_a_restart(
    own_hostel: Hostel, directory: Path
) -> None:
    disk = directory / "data.raw"
    disk.write_bytes(bytes(4096))
    name = own_hostel.run(PLUGGING)
    attach(own_hostel, name, disk)
    own_hostel.api.act(name, "reset")
    assert disks(own_hostel, name) == ["data"]
    own_hostel.restart()
    assert disks(own_hostel, name) == ["data"]
    detach(own_hostel, name)
    attach(own_hostel, name, disk)
    own_hostel.api.act(name, "kill")
    assert not is_locked(disk)
    own_hostel.api.act(name, "start")
    assert (disks(own_hostel, name), is_locked(disk)) == (["data"], True)


def test_a_hosteld_that_is_killed_over_a_detach_learns_of_its_end(
    own_hostel: Hostel, directory: Path
) -> None:
    disk = directory / "data.raw"
    disk.write_bytes(bytes(4096))
    # Slow, so that hosteld dies before the guest answers.
    answer = tiny.say("?") + tiny.delay(500_000) + b"\xb8\x02\0\0\0" + EJECT
    slow = tiny.forever(unless_zero(DOWN_OFFSET, answer))
    name = own_hostel.run(slow, disks=[{"id": "data", "path": str(disk)}])

    def ask() -> None:
        with pytest.raises((OSError, ApiFailure)):
            detach(own_hostel, name, query="&timeout_s=60")

    asking = threading.Thread(target=ask)
    asking.start()
    console = Console(own_hostel.api, name)
    console.wait_for("?")
    console.close()
    own_hostel.restart()
    asking.join()
    own_hostel.api.wait_vm(name, lambda vm: not vm["disks"], "without its disk")
    assert (disks(own_hostel, name), is_locked(disk)) == ([], False)


def test_hostile_writes_to_the_registers_eject_nothing(hostel: Hostel, disk: Path) -> None:
    # mov eax, ~0; out to B0EJ, then to the registers before it, in every width.
    ports = [port(PCI_HOTPLUG_PORT + offset) for offset in (8, 9, 0, 4)]
    body = b"\xb8\xff\xff\xff\xff" + b"".join(p + b"\xef\xee\x66\xef" for p in ports)
    name = hostel.run(body + tiny.say("done") + tiny.HALT, disks=[{"id": "a", "path": str(disk)}])
    console = Console(hostel.api, name)
    console.wait_for("done")
    assert disks(hostel, name) == ["a"]
    console.close()
    hostel.delete(name)
