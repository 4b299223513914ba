# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A guest that writes garbage into every register that a virtio-pci device has.

Whatever it does: no exception leaves the buses, irqfds and ioeventfds stay balanced, and after a
reset the device can be initialised and serves a right request.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices.virtio.blk import VirtioBlk
from devices.virtio.console import VirtioConsole
from devices.virtio.console_port import PortConfig
from devices.virtio.net import VirtioNet
from devices.virtio.pmem import VirtioPmem
from devices.virtio.rng import VirtioRng
from devices.virtio.vsock import UnixVirtioVsock
from kvm_ffi.types import Gpa
from tests.support.vsock_driver import RST, Packet

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.virtio.device import VirtioDevice
    from kvm_ffi.net_tap import Tap
    from tests.unit.devices.conftest import FakeRouter, FakeVm
    from tests.unit.devices.virtio.conftest import Machine

DATA_GPA, BAR0, RINGS_GPA = 0x40000, 0xC0000000, 0x10000
DRIVER_OK, NEEDS_RESET = 4, 64
CID = 1234
DEADLINE_S = 20.0

COMMON_REGISTERS = [
    *[(offset, 4) for offset in (0x00, 0x08, 0x0C, 0x20, 0x24, 0x28, 0x2C, 0x30, 0x34)],
    *[(offset, 2) for offset in (0x10, 0x16, 0x18, 0x1A, 0x1C)],
    (0x14, 1),
]
VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 7, 8, 15, 0x40, 0x8000, 0xC000, 0xFFFF, 0xFFFFFFFF, BAR0]),
    st.integers(0, 2**64 - 1),
)
WIDTHS = st.sampled_from([1, 2, 4, 8])

bar_write = st.tuples(st.just("write"), st.integers(0, 0x7FFF), WIDTHS, VALUES)
bar_read = st.tuples(st.just("read"), st.integers(0, 0x7FFF), WIDTHS, st.just(0))
common_write = st.builds(
    lambda register, value: ("write", *register, value), st.sampled_from(COMMON_REGISTERS), VALUES
)
config_write = st.tuples(st.just("config"), st.integers(0, 0xFFF), WIDTHS, VALUES)
config_read = st.tuples(st.just("config read"), st.integers(0, 0xFFF), WIDTHS, st.just(0))
command_write = st.tuples(
    st.just("config"), st.sampled_from([0x04, 0x10, 0x42]), st.just(4), VALUES
)
# Those of the first three queues: descriptors, available ring, used ring.
ring_write = st.builds(
    lambda queue, ring, word, value: ("ring", 0x4000 * queue + 0x1000 * ring + 4 * word, 8, value),
    *(st.integers(0, 2), st.integers(0, 2), st.integers(0, 32)),
    VALUES,
)
proper = st.tuples(
    st.sampled_from(["start", "post", "kick", "dispatch", "config change"]),
    st.integers(0, 2),
    st.just(0),
    st.just(0),
)
steps = st.lists(
    st.one_of(
        bar_write,
        bar_read,
        common_write,
        common_write,
        config_write,
        config_read,
        command_write,
        ring_write,
        proper,
        proper,
    ),
    max_size=60,
)
Step = tuple[str, int, int, int]


def perform(machine: Machine, step: Step) -> None:
    what, offset, length, value = step
    value &= (1 << 8 * length) - 1
    if what == "write":
        machine.write(offset, length, value)
    elif what == "read":
        assert 0 <= machine.read(offset, length) < 1 << (8 * length)
    elif what == "config":
        machine.config_write(offset, min(length, 4), value & 0xFFFFFFFF)
    elif what == "config read":
        machine.config_read(offset, min(length, 4))
    elif what == "ring":
        machine.memory.write(RINGS_GPA + offset, struct.pack("<Q", value))
    elif what == "start":
        machine.start()
    elif what == "post":
        queue = offset % len(machine.avail_idx)
        machine.post(queue, [(DATA_GPA, 64, queue == 0)])
        machine.kick(queue)
    elif what == "kick":
        machine.kick(offset % len(machine.avail_idx))
    elif what == "dispatch":
        machine.loop.dispatch()
    else:
        machine.transport.config_changed()


def check_balance(machine: Machine, vm: FakeVm) -> None:
    assert vm.assigned_count - vm.deassigned_count == len(vm.irqfds)
    mapped = machine.transport.mapped_at(0)
    if mapped is None:
        assert vm.ioeventfds == {}
    for gpa, _length in vm.ioeventfds:
        assert mapped is not None
        assert mapped + 0x3000 <= gpa < mapped + 0x4000


def put_back(machine: Machine) -> None:
    """Give the BAR its address again, as a fresh kernel would."""
    machine.config_write(0x04, 2, 0)
    machine.config_write(0x10, 4, BAR0)
    machine.start()


class SocketTap:
    """One end of a socket pair instead of a tap: it keeps frames apart just the same."""

    def __init__(self) -> None:
        self.wire, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.wire.settimeout(DEADLINE_S)
        self.fds: tuple[int, ...] = (near.detach(),)

    def configure(self, features: int) -> None:
        """Take what was negotiated."""

    def attach(self, index: int) -> None:
        """Use a queue."""

    def detach(self, index: int) -> None:
        """Use it no more."""

    def set_carrier(self, is_up: bool) -> None:
        """Plug the cable, or pull it."""

    def close(self) -> None:
        """Close both ends."""
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)
        self.wire.close()


class Subject:
    """A device under attack, and a right request to it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.device = self.make()

    def make(self) -> VirtioDevice:
        raise NotImplementedError

    def ask(self, machine: Machine) -> None:
        """Make a request of a device that has just been started, and check its answer."""
        raise NotImplementedError


def wait_used(machine: Machine, queue: int) -> list[tuple[int, int]]:
    """Wait for what an engine or the event loop answers in a queue."""
    due = time.monotonic() + DEADLINE_S
    while not (used := machine.used(queue)):
        assert time.monotonic() < due, f"queue {queue} is not served"
        machine.loop.dispatch()
        time.sleep(0.0005)
    return used


class Rng(Subject):
    def make(self) -> VirtioDevice:
        return VirtioRng()

    def ask(self, machine: Machine) -> None:
        machine.post(0, [(DATA_GPA, 32, True)])
        machine.kick(0)
        assert wait_used(machine, 0) == [(0, 32)]


class Blk(Subject):
    def make(self) -> VirtioDevice:
        image = self.directory / "disk.raw"
        image.write_bytes(b"d" * 64 * 512)
        return VirtioBlk("blk0", os.open(image, os.O_RDWR), path=str(image))

    def ask(self, machine: Machine) -> None:
        machine.memory.write(Gpa(DATA_GPA), struct.pack("<IIQ", 0, 0, 1) + b"\xff")
        data = DATA_GPA + 4096
        machine.post(0, [(DATA_GPA, 16, False), (data, 512, True), (DATA_GPA + 16, 1, True)])
        machine.kick(0)
        assert wait_used(machine, 0) == [(0, 513)]
        assert machine.memory.read(Gpa(DATA_GPA + 16), 1) == b"\0"
        assert machine.memory.read(Gpa(data), 512) == b"d" * 512


class Net(Subject):
    def make(self) -> VirtioDevice:
        self.tap = SocketTap()
        return VirtioNet("net0", cast("Tap", self.tap), path="tap0", mac=b"\x02\0\0\0\0\1")

    def ask(self, machine: Machine) -> None:
        frame = bytes(12) + b"a right frame".ljust(60)
        machine.memory.write(Gpa(DATA_GPA), frame)
        machine.post(1, [(DATA_GPA, len(frame), False)])
        machine.kick(1)
        wait_used(machine, 1)
        while self.tap.wire.recv(1 << 16) != frame:
            continue
        machine.post(0, [(DATA_GPA + 4096, 2048, True)])
        machine.kick(0)
        self.tap.wire.send(frame)
        assert wait_used(machine, 0) == [(0, len(frame))]


class Vsock(Subject):
    def make(self) -> VirtioDevice:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")  # a name of the kernel's choice
        listener.listen()
        directory_fd = os.open(self.directory, os.O_PATH)
        return UnixVirtioVsock("vsock0", CID, listener.detach(), directory_fd, socket_name="v.sock")

    def ask(self, machine: Machine) -> None:
        # Nobody listens at that port: the answer is a reset.
        request = Packet(1, 5000, 52, src_cid=CID).pack()
        machine.memory.write(Gpa(DATA_GPA), request)
        machine.post(0, [(DATA_GPA + 4096, 4096, True)])
        machine.kick(0)
        machine.post(1, [(DATA_GPA, len(request), False)])
        machine.kick(1)
        ((_, written),) = wait_used(machine, 0)
        answer = Packet.unpack(machine.memory.read(Gpa(DATA_GPA + 4096), written))
        assert (answer.op, answer.dst_port) == (RST, 5000)


class Console(Subject):
    def make(self) -> VirtioDevice:
        listeners = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        for listener in listeners:
            listener.bind("")
            listener.listen(1)
        self.address = listeners[0].getsockname()
        ports = [PortConfig("tty", True), PortConfig("agent", False)]
        return VirtioConsole(ports, [listener.detach() for listener in listeners])

    def ask(self, machine: Machine) -> None:
        with socket.socket(socket.AF_UNIX) as program:
            program.settimeout(DEADLINE_S)
            program.connect(self.address)
            while machine.loop.dispatch():
                continue
            machine.memory.write(Gpa(DATA_GPA), b"hello, host")
            machine.post(1, [(DATA_GPA, 11, False)])
            machine.kick(1)
            assert wait_used(machine, 1) == [(0, 0)]
            assert program.recv(100) == b"hello, host"


class Pmem(Subject):
    def make(self) -> VirtioDevice:
        fd = os.open(self.directory / "file", os.O_RDWR | os.O_CREAT)
        return VirtioPmem("data", fd, gpa=1 << 32, size_bytes=2 << 20, is_read_only=False)

    def ask(self, machine: Machine) -> None:
        machine.memory.write(Gpa(DATA_GPA), struct.pack("<II", 0, 0xFFFF_FFFF))
        machine.post(0, [(DATA_GPA, 4, False), (DATA_GPA + 4, 4, True)])
        machine.kick(0)
        assert wait_used(machine, 0) == [(0, 4)]
        assert machine.memory.read(Gpa(DATA_GPA + 4), 4) == bytes(4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(log=steps)
@pytest.mark.parametrize("make_subject", [Rng, Blk, Net, Vsock, Console, Pmem])
def test_garbage_leaves_a_device_that_serves_after_a_reset(
    make_machine: Callable[[VirtioDevice], Machine],
    make_subject: Callable[[Path], Subject],
    vm: FakeVm,
    router: FakeRouter,
    log: list[Step],
) -> None:
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as directory:
        subject = make_subject(Path(directory))
        machine = make_machine(subject.device)
        try:
            for step in log:
                perform(machine, step)
                check_balance(machine, vm)
            put_back(machine)
            assert machine.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
            subject.ask(machine)
        finally:
            logging.disable(logging.NOTSET)
            machine.close()
    assert (vm.irqfds, vm.ioeventfds, router.allocated) == (set(), {}, set())


def test_garbage_cannot_flood_the_log(
    make_machine: Callable[[VirtioDevice], Machine], caplog: pytest.LogCaptureFixture
) -> None:
    machine = make_machine(VirtioRng())
    machine.enable_memory()
    for offset in range(0x4000):
        machine.write(offset, 1, 0xFF)
        machine.config_write(offset & 0xFFF, 1, 0x55)
    assert len(caplog.records) < 60
