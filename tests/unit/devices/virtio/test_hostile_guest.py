# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A guest that writes garbage into every register that a virtio-pci device has.

Whatever it does: no exception leaves the buses, irqfds and ioeventfds stay balanced, and after a
reset the device can be initialised and serves requests.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices.virtio.blk import VirtioBlk
from devices.virtio.console import PortConfig, VirtioConsole
from devices.virtio.pmem import VirtioPmem
from devices.virtio.rng import VirtioRng

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from devices.virtio.device import VirtioDevice
    from tests.unit.devices.conftest import FakeRouter, FakeVm
    from tests.unit.devices.virtio.conftest import Machine

DATA_GPA, BAR0, RINGS_GPA = 0x40000, 0xC0000000, 0x10000
DRIVER_OK, NEEDS_RESET = 4, 64

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
ring_write = st.tuples(st.just("ring"), st.integers(0, 0x3000), st.just(8), VALUES)
proper = st.tuples(
    st.sampled_from(["start", "post", "dispatch", "config change"]),
    st.just(0),
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
        machine.post(0, [(DATA_GPA, 64, True)])
        machine.kick(0)
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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_garbage_leaves_an_rng_that_can_be_started_again(
    make_machine: Callable[[VirtioDevice], Machine],
    vm: FakeVm,
    router: FakeRouter,
    log: list[Step],
) -> None:
    logging.disable(logging.CRITICAL)
    machine = make_machine(VirtioRng())
    try:
        for step in log:
            perform(machine, step)
            check_balance(machine, vm)
        put_back(machine)
        assert machine.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
        machine.post(0, [(DATA_GPA, 32, True)])
        machine.kick(0)
        machine.loop.dispatch()
        assert machine.used(0) == [(0, 32)]
    finally:
        logging.disable(logging.NOTSET)
        machine.close()
    assert (vm.irqfds, vm.ioeventfds, router.allocated) == (set(), {}, set())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(steps)
def test_garbage_leaves_a_disk_whose_engine_starts_again(
    make_machine: Callable[[VirtioDevice], Machine],
    tmp_path: Path,
    vm: FakeVm,
    router: FakeRouter,
    log: list[Step],
) -> None:
    logging.disable(logging.CRITICAL)
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(64 * 512))
    machine = make_machine(VirtioBlk("blk0", os.open(image, os.O_RDWR), path=str(image)))
    try:
        for step in log:
            perform(machine, step)
            check_balance(machine, vm)
        put_back(machine)
        assert machine.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
        machine.set_status(0)
    finally:
        logging.disable(logging.NOTSET)
        machine.close()
    assert (vm.irqfds, vm.ioeventfds, router.allocated) == (set(), {}, set())


def a_console(_: Path) -> VirtioDevice:
    listeners = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for listener in listeners:
        listener.bind("")  # a name of the kernel's choice
        listener.listen(1)
    ports = [PortConfig("tty", True), PortConfig("agent", False)]
    return VirtioConsole(ports, [listener.detach() for listener in listeners])


def some_pmem(directory: Path) -> VirtioDevice:
    fd = os.open(directory / "file", os.O_RDWR | os.O_CREAT)
    return VirtioPmem("data", fd, gpa=1 << 32, size_bytes=2 << 20, is_read_only=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(log=steps)
@pytest.mark.parametrize("make_device", [a_console, some_pmem])
def test_garbage_leaves_a_device_that_starts_again(
    make_machine: Callable[[VirtioDevice], Machine],
    make_device: Callable[[Path], VirtioDevice],
    tmp_path: Path,
    vm: FakeVm,
    router: FakeRouter,
    log: list[Step],
) -> None:
    logging.disable(logging.CRITICAL)
    machine = make_machine(make_device(tmp_path))
    try:
        for step in log:
            perform(machine, step)
            check_balance(machine, vm)
        put_back(machine)
        assert machine.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
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
