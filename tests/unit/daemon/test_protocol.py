# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What crosses the control sockets, and what does not get through."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon import protocol
from daemon.errors import ProtocolError
from daemon.protocol import (
    DiskSpec,
    MachineSpec,
    NicSpec,
    NicWishes,
    PmemSpec,
    PortSpec,
    Status,
    VsockSpec,
)

Pair = tuple[socket.socket, socket.socket]

WISHES = NicWishes(True, {"ops_per_s": 5}, {})
SPEC = MachineSpec(
    vm_id="0f0f0f0f-0000-4000-8000-000000000000",
    vcpus=2,
    memory_bytes=256 << 20,
    cmdline="console=ttyS0",
    entry="linux64",
    setup_header="",
    kvm_fd=0,
    kernel_fd=1,
    initrd_fd=None,
    disks=(DiskSpec("root", 2, False),),
    nics=(NicSpec("net0", (3,), (4,), "02:00:00:00:00:01", None, WISHES),),
    rng=True,
    on_reboot="reset",
    on_panic="keep",
    requested_ns=1,
    vsock=VsockSpec(1000, (4, 5), "v.sock"),
    watchdog="reset",
    ports=(PortSpec("tty", True, 6),),
    pmem=(PmemSpec("data", 7, 2 << 20, False),),
)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two ends of a SEQPACKET socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def open_fds() -> int:
    """Count this process's descriptors."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_message_brings_its_descriptors(pair: Pair) -> None:
    read_end, write_end = os.pipe()
    protocol.send(pair[0], {"id": 1}, (write_end,))
    message = protocol.receive(pair[1])
    assert message is not None
    assert message.body == {"id": 1}
    os.write(message.fds[0], b"x")
    assert os.read(read_end, 1) == b"x"
    assert not os.get_inheritable(message.fds[0])
    protocol.close_all((*message.fds, read_end, write_end))


def test_closed_peer_reads_as_none(pair: Pair) -> None:
    pair[0].close()
    assert protocol.receive(pair[1]) is None


@pytest.mark.parametrize("junk", [b"[]", b"{", b"\xff\xfe", b"3", b'"x"'])
def test_junk_is_refused_and_its_descriptors_closed(pair: Pair, junk: bytes) -> None:
    read_end, write_end = os.pipe()
    socket.send_fds(pair[0], [junk], [write_end])
    before = open_fds()
    with pytest.raises(ProtocolError):
        protocol.receive(pair[1])
    assert open_fds() == before
    protocol.close_all((read_end, write_end))


def test_message_too_large_is_refused_before_it_is_sent(pair: Pair) -> None:
    with pytest.raises(ProtocolError, match="too large"):
        protocol.send(pair[0], {"x": "y" * protocol.MAX_MESSAGE_BYTES})


def test_spec_survives_the_wire(pair: Pair) -> None:
    protocol.send(pair[0], SPEC.encode())
    message = protocol.receive(pair[1])
    assert message is not None
    assert MachineSpec.decode(message.body) == SPEC


@given(name=st.sampled_from(sorted(SPEC.encode())))
def test_spec_without_a_field_is_refused(name: str) -> None:
    fields = SPEC.encode()
    del fields[name]
    with pytest.raises(ProtocolError):
        MachineSpec.decode(fields)


def test_spec_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(ProtocolError, match="colour"):
        MachineSpec.decode({**SPEC.encode(), "colour": "red"})


def test_status_survives_the_wire() -> None:
    why = {"code": "x", "message": "y", "detail": {}}
    status = Status(state="running", vm_id="a", pid=7, boot_time_us=5)
    assert Status.decode(status.encode()) == status
    assert Status.decode(replace(status, reason=why).encode()).reason == why


@pytest.mark.parametrize(
    "change",
    [
        {"state": 1},
        {"pid": "7"},
        {"boot_time_us": "soon"},
        {"reason": "because"},
        {"reason": {"code": 1, "message": "", "detail": {}}},
        {"colour": "red"},
    ],
)
def test_misshapen_status_is_refused(change: dict[str, object]) -> None:
    status = Status(state="running", vm_id="a", pid=7).encode()
    with pytest.raises(ProtocolError):
        Status.decode({**status, **change})


def test_deeply_nested_message_is_refused(pair: Pair) -> None:
    pair[0].send(b"[" * 60_000)
    with pytest.raises(ProtocolError):
        protocol.receive(pair[1])
