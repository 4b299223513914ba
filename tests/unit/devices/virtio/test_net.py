# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import errno
import os
import select
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

import devices.virtio.net
from devices.errors import BackendError
from devices.virtio.net import VirtioNet
from kvm_ffi.net_engine import NetEngine
from kvm_ffi.rate_limiter import UNLIMITED, RateLimit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from devices.virtio.device import VirtioDevice
    from kvm_ffi.net_tap import Tap
    from tests.unit.devices.virtio.conftest import Machine

VERSION_1 = 1 << 32
F_EVENT_IDX = 1 << 29
F_CSUM, F_GUEST_CSUM, F_MTU, F_MAC, F_GUEST_TSO4 = 1 << 0, 1 << 1, 1 << 3, 1 << 5, 1 << 7
F_GUEST_ECN, F_HOST_TSO4, F_MRG_RXBUF, F_STATUS = 1 << 9, 1 << 11, 1 << 15, 1 << 16
F_CTRL_VQ, F_CTRL_RX, F_GUEST_ANNOUNCE, F_MQ, F_CTRL_MAC = (
    1 << 17,
    1 << 18,
    1 << 21,
    1 << 22,
    1 << 23,
)
MAC = bytes.fromhex("52540000beef")
FEATURES_OK, NEEDS_RESET = 8, 64
DATA, CONTROL, ACK = 0x40000, 0x42000, 0x46000
HEADER_BYTES = 12


class Wire:
    """Socket pairs instead of a tap: they keep packets apart just the same.

    What a tap can be told besides is kept: what was configured, which queues are attached.
    """

    def __init__(self, n_queues: int = 1) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(n_queues)]
        self.fars = [far for far, _ in pairs]
        self.far = self.fars[0]
        self.fds = tuple(near.detach() for _, near in pairs)
        for far in self.fars:
            far.settimeout(10)
        self.configured: list[int] = []
        self.attached = [True] * n_queues
        self.carrier: bool | None = None
        self.error: int | None = None

    def _check(self) -> None:
        if self.error is not None:
            raise OSError(self.error, "refused")

    def configure(self, features: int) -> None:
        self._check()
        self.configured.append(features)

    def attach(self, index: int) -> None:
        self._check()
        self.attached[index] = True

    def detach(self, index: int) -> None:
        self._check()
        self.attached[index] = False

    def set_carrier(self, is_up: bool) -> None:
        self._check()
        self.carrier = is_up

    def close(self) -> None:
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)

    def end(self) -> None:
        """Close both sides."""
        self.close()
        for far in self.fars:
            far.close()


def as_tap(wire: Wire) -> Tap:
    return cast("Tap", wire)


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.end()


@pytest.fixture
def wide() -> Iterator[Wire]:
    wide = Wire(3)
    yield wide
    wide.end()


@pytest.fixture
def machine(wire: Wire, make_machine: Callable[[VirtioDevice], Machine]) -> Machine:
    machine = make_machine(VirtioNet("net0", as_tap(wire), path="tap0", mac=MAC, mtu=1400))
    machine.enable_memory()
    return machine


@pytest.fixture
def multi(wide: Wire, make_machine: Callable[[VirtioDevice], Machine]) -> Machine:
    """Three pairs of queues; the rings of seven queues fit because their pages are close."""
    machine = make_machine(VirtioNet("net0", as_tap(wide), path="tap0", mac=MAC))
    machine.enable_memory()
    return machine


def net(machine: Machine) -> VirtioNet:
    assert isinstance(machine.device, VirtioNet)
    return machine.device


def engine_threads() -> int:
    return sum(thread.name == "net0" for thread in threading.enumerate())


def command(machine: Machine, queue: int, data: bytes) -> int | None:
    """Send a control command, its ack in a buffer of its own; None when it was not answered."""
    machine.memory.write(CONTROL, data)
    machine.memory.write(ACK, b"\xee")
    machine.post(queue, [(CONTROL, len(data), False), (ACK, 1, True)])
    machine.kick(queue)
    machine.loop.dispatch()
    return machine.memory.read(ACK, 1)[0] if machine.used(queue) else None


def wait_for_interrupt(machine: Machine, vector: int) -> None:
    eventfd = machine.transport._msix.eventfd(vector)
    assert eventfd is not None
    assert select.select([eventfd.fd], [], [], 10)[0]
    eventfd.drain()


def test_config_space_tells_mac_link_and_mtu(machine: Machine) -> None:
    assert machine.read(0x2000, 4) | machine.read(0x2004, 2) << 32 == int.from_bytes(MAC, "little")
    assert machine.read(0x2006, 2) == 1
    assert machine.read(0x200A, 2) == 1400


def test_offered_features(machine: Machine) -> None:
    wanted = F_CSUM | F_GUEST_CSUM | F_MTU | F_MAC | F_GUEST_TSO4 | F_HOST_TSO4
    wanted |= F_GUEST_ECN | F_MRG_RXBUF | F_STATUS
    assert machine.offered() & wanted == wanted


def test_tap_is_configured_for_what_was_negotiated_and_back(machine: Machine, wire: Wire) -> None:
    machine.start(VERSION_1 | F_GUEST_CSUM)
    machine.set_status(0)
    assert wire.configured == [0, VERSION_1 | F_GUEST_CSUM, 0]


@pytest.mark.parametrize(
    "features",
    [F_GUEST_TSO4, F_HOST_TSO4, F_GUEST_CSUM | F_GUEST_ECN, F_CTRL_RX, F_CTRL_MAC],
    ids=hex,
)
def test_offload_without_what_it_builds_on_is_refused(machine: Machine, features: int) -> None:
    machine.accept(VERSION_1 | features)
    machine.set_status(FEATURES_OK)
    assert machine.status == 0


def test_packet_from_the_guest_reaches_the_wire(machine: Machine, wire: Wire) -> None:
    machine.start(VERSION_1)
    machine.memory.write(DATA, bytes(HEADER_BYTES) + b"hello, wire")
    machine.post(1, [(DATA, HEADER_BYTES + 11, False)])
    machine.kick(1)
    assert wire.far.recv(2048)[HEADER_BYTES:] == b"hello, wire"
    wait_for_interrupt(machine, 2)
    assert machine.used(1) == [(0, 0)]


def test_packet_from_the_wire_reaches_the_guest(machine: Machine, wire: Wire) -> None:
    machine.start(VERSION_1 | F_MRG_RXBUF)
    machine.post(0, [(DATA, 2048, True)])
    machine.kick(0)
    wire.far.send(bytes(HEADER_BYTES) + b"hello, guest")
    wait_for_interrupt(machine, 1)
    assert machine.used(0) == [(0, HEADER_BYTES + 12)]
    assert machine.memory.read(DATA + HEADER_BYTES, 12) == b"hello, guest"
    assert machine.device.stats()["rx_packets"] == 1


@pytest.mark.parametrize("queues", [(), (0,), (1,), (2,)])
def test_interface_without_both_queues_needs_reset(
    machine: Machine, queues: tuple[int, ...]
) -> None:
    machine.start(queues=queues)
    assert machine.status & NEEDS_RESET
    machine.start()
    assert not machine.status & NEEDS_RESET


def test_tap_that_refuses_at_activation_needs_reset(machine: Machine, wire: Wire) -> None:
    wire.error = errno.EBADFD
    machine.start()
    assert machine.status & NEEDS_RESET


def test_pulling_the_cable_tells_the_driver_once(machine: Machine) -> None:
    machine.start()
    machine.interrupts(0)
    net(machine).set_link(False)
    net(machine).set_link(False)
    assert machine.read(0x2006, 2) == 0
    assert machine.interrupts(0) == 1


def test_nothing_passes_a_cable_that_is_out(machine: Machine, wire: Wire) -> None:
    machine.start()
    net(machine).set_link(False)
    net(machine).quiesce()
    net(machine).resume()  # a pause does not plug it in
    assert wire.carrier is False
    machine.memory.write(DATA, bytes(HEADER_BYTES) + b"hello")
    machine.post(1, [(DATA, HEADER_BYTES + 5, False)])
    machine.kick(1)
    wire.far.settimeout(0.1)
    with pytest.raises(TimeoutError):
        wire.far.recv(2048)
    net(machine).set_link(True)
    wire.far.settimeout(10)
    assert wire.far.recv(2048)[HEADER_BYTES:] == b"hello"
    assert wire.carrier is True


def test_a_command_changes_the_address_until_the_reset(machine: Machine) -> None:
    machine.start(VERSION_1 | F_CTRL_VQ | F_CTRL_MAC)
    assert command(machine, 2, b"\1\1\2\0\0\0\0\x07") == 0
    assert machine.read(0x2000, 4) | machine.read(0x2004, 2) << 32 == 0x0700_0000_0002
    control = net(machine).details()["queues"]["control"]
    assert control == {"kicks": 1, "requests": 1, "errors": 0, "interrupts": 1}
    machine.set_status(0)
    assert machine.read(0x2000, 4) | machine.read(0x2004, 2) << 32 == int.from_bytes(MAC, "little")


def test_a_command_that_is_wrong_gets_an_error_and_the_next_is_served(machine: Machine) -> None:
    machine.start(VERSION_1 | F_CTRL_VQ | F_CTRL_RX)
    assert command(machine, 2, b"\4\0\1\0") == 1
    assert command(machine, 2, b"\0\0\1") == 0
    assert not machine.status & NEEDS_RESET


def test_a_command_without_room_for_its_ack_needs_a_reset(machine: Machine) -> None:
    machine.start(VERSION_1 | F_CTRL_VQ)
    machine.post(2, [(CONTROL, 3, False)])
    machine.kick(2)
    machine.loop.dispatch()
    machine.loop.dispatch()
    assert machine.status & NEEDS_RESET


def test_a_command_waits_while_the_machine_is_paused(machine: Machine) -> None:
    machine.start(VERSION_1 | F_CTRL_VQ | F_CTRL_RX)
    machine.device.quiesce()
    assert command(machine, 2, b"\0\0\1") is None
    machine.device.resume()
    machine.loop.dispatch()
    assert machine.used(2) == [(0, 1)]


def test_a_resumed_guest_announces_itself_once(machine: Machine) -> None:
    machine.start(VERSION_1 | F_CTRL_VQ | F_STATUS | F_GUEST_ANNOUNCE)
    machine.interrupts(0)
    machine.device.quiesce()
    machine.device.resume()
    assert machine.read(0x2006, 2) == 3
    assert machine.interrupts(0) == 1
    machine.loop.dispatch()
    assert command(machine, 2, b"\3\0") == 0
    assert machine.read(0x2006, 2) == 1


def test_pairs_are_served_as_the_driver_asks_for_them(multi: Machine, wide: Wire) -> None:
    assert multi.read(0x2008, 2) == 3
    multi.start(VERSION_1 | F_CTRL_VQ | F_MQ)
    assert wide.attached == [True, False, False]
    assert engine_threads() == 1
    assert command(multi, 6, b"\4\0\3\0") == 0
    assert (wide.attached, engine_threads()) == ([True] * 3, 3)
    assert net(multi).details()["active_pairs"] == 3
    multi.memory.write(DATA, bytes(HEADER_BYTES) + b"third")
    multi.post(5, [(DATA, HEADER_BYTES + 5, False)])
    multi.kick(5)
    assert wide.fars[2].recv(2048)[HEADER_BYTES:] == b"third"
    wait_for_interrupt(multi, 6)
    assert net(multi).details()["queues"]["tx2"]["packets"] == 1
    assert net(multi).details()["queues"]["tx0"]["packets"] == 0
    assert command(multi, 6, b"\4\0\1\0") == 0
    assert (wide.attached, engine_threads()) == ([True, False, False], 1)
    assert multi.device.stats()["tx_packets"] == 1
    multi.set_status(0)
    assert engine_threads() == 0


@pytest.mark.parametrize("count", [0, 4, 0xFFFF])
def test_a_number_of_pairs_that_is_not_there_is_refused(multi: Machine, count: int) -> None:
    multi.start(VERSION_1 | F_CTRL_VQ | F_MQ)
    assert command(multi, 6, b"\4\0" + count.to_bytes(2, "little")) == 1
    assert engine_threads() == 1


def test_pairs_that_were_not_enabled_are_refused(multi: Machine, wide: Wire) -> None:
    multi.start(VERSION_1 | F_CTRL_VQ | F_MQ, queues=(0, 1, 2, 3, 4, 6))
    assert command(multi, 6, b"\4\0\3\0") == 1
    assert wide.attached[2] is False
    assert not multi.status & NEEDS_RESET


def test_a_tap_that_does_not_attach_is_an_error_to_the_driver(multi: Machine, wide: Wire) -> None:
    multi.start(VERSION_1 | F_CTRL_VQ | F_MQ)
    wide.error = errno.EBADFD
    assert command(multi, 6, b"\4\0\2\0") == 1
    assert engine_threads() == 1


def test_a_driver_without_mq_has_the_control_queue_behind_the_first_pair(multi: Machine) -> None:
    multi.start(VERSION_1 | F_CTRL_VQ | F_CTRL_RX, queues=(0, 1, 2))
    assert command(multi, 2, b"\0\0\1") == 0


def test_what_vhost_cannot_do_is_not_offered(
    wire: Wire, make_machine: Callable[[VirtioDevice], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices.virtio.net.VhostDevice, "features", lambda _: VERSION_1 | 1 << 24)
    vhost_fd = os.open(os.devnull, os.O_RDWR)
    device = VirtioNet("net0", as_tap(wire), path="tap0", mac=MAC, vhost_fds=[vhost_fd])
    machine = make_machine(device)
    machine.enable_memory()
    assert not machine.offered() & (F_MRG_RXBUF | F_EVENT_IDX)
    assert machine.offered() & VERSION_1
    assert machine.offered() & F_GUEST_TSO4


@pytest.mark.parametrize("features", [0, None], ids=["virtio 0.9", "no vhost"])
def test_vhost_that_cannot_be_used_is_a_backend_error(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, features: int | None
) -> None:
    if features is not None:
        monkeypatch.setattr(devices.virtio.net.VhostDevice, "features", lambda _: features)
    with Path(os.devnull).open("rb") as null, pytest.raises(BackendError, match=r"tap0: .*vhost"):
        VirtioNet("net0", as_tap(wire), path="tap0", mac=MAC, vhost_fds=[null.fileno()])


def test_descriptor_that_is_no_tap_is_a_backend_error(wire: Wire) -> None:
    wire.error = errno.ENOTTY
    with pytest.raises(BackendError, match="tap0: not a tap"):
        VirtioNet("net0", as_tap(wire), path="tap0", mac=MAC)


@pytest.mark.parametrize("mac", [b"", MAC + b"\0", b"\x01\0\0\0\0\0"])
def test_bad_mac_is_refused(wire: Wire, mac: bytes) -> None:
    with pytest.raises(ValueError, match="six bytes"):
        VirtioNet("net0", as_tap(wire), path="tap0", mac=mac)


@pytest.mark.parametrize("mtu", [0, 67, 65536])
def test_bad_mtu_is_refused(wire: Wire, mtu: int) -> None:
    with pytest.raises(ValueError, match=r"68\.\.65535"):
        VirtioNet("net0", as_tap(wire), path="tap0", mac=MAC, mtu=mtu)


def test_a_limit_holds_back_and_lets_go(machine: Machine, wire: Wire) -> None:
    frame = b"hello" * 100
    # Minutes until the second one fits.
    net(machine).set_limits(UNLIMITED, RateLimit(bytes_per_s=1, bytes_burst=len(frame) + 100))
    machine.start(VERSION_1)
    machine.memory.write(DATA, bytes(HEADER_BYTES) + frame)
    for head in range(2):
        machine.post(1, [(DATA, HEADER_BYTES + len(frame), False)], head=head)
    machine.kick(1)
    assert wire.far.recv(2048)[HEADER_BYTES:] == frame
    wait_for_interrupt(machine, 2)
    assert len(machine.used(1)) == 1
    net(machine).set_limits(UNLIMITED, UNLIMITED)
    assert wire.far.recv(2048)[HEADER_BYTES:] == frame


def test_vhost_refuses_a_limit(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.virtio.net.VhostDevice, "features", lambda _: VERSION_1)
    device = VirtioNet("net0", as_tap(wire), path="tap0", mac=MAC, vhost_fds=[-1])
    device.set_limits(UNLIMITED, UNLIMITED)
    with pytest.raises(BackendError, match="knows no limits"):
        device.set_limits(UNLIMITED, RateLimit(ops_per_s=1))


def test_a_command_during_a_reset_starts_nothing(
    multi: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    multi.start(VERSION_1 | F_CTRL_VQ | F_MQ)
    multi.memory.write(CONTROL, b"\4\0\3\0")
    multi.post(6, [(CONTROL, 4, False), (ACK, 1, True)])
    commands: list[threading.Thread] = []
    stop = NetEngine.stop

    def stop_while_a_command_comes(engine: NetEngine) -> None:
        stop(engine)
        # It waits for the device's lock, which the reset holds now and lets go soon.
        commands.append(threading.Thread(target=net(multi)._on_control_kick))
        commands[-1].start()

    monkeypatch.setattr(NetEngine, "stop", stop_while_a_command_comes)
    multi.set_status(0)
    for thread in commands:
        thread.join()
    assert engine_threads() == 0
