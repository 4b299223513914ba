# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The engine and an obvious model of one stream, through the same random steps.

The model is two byte strings and the specification's counters; whatever the steps, no byte is lost,
doubled or out of order, and neither side sends more than the other has room for.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_ffi._kvm import ffi, lib
from tests.support.vsock_driver import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    REQUEST,
    RESPONSE,
    RING_SIZE,
    RW,
    Packet,
    Vsock,
)

GUEST_PORT, HOST_PORT = 5000, 52
WRAP = 1 << 32
PATTERN = os.urandom(1 << 20)

sizes = st.sampled_from((1, 43, 44, 4052, 4053, 65536, 200000)) | st.integers(1, 70000)
kinds = st.sampled_from(
    ["guest_sends"] * 3 + ["host_sends"] * 3 + ["host_reads"] * 2
    + ["guest_reads"] * 2 + ["offer"] * 2 + ["guest_asks", "nothing"]
)  # fmt: skip
steps = st.lists(st.tuples(kinds, sizes), max_size=40)


class Stream:
    """One connection, seen from both of its ends."""

    def __init__(self, vsock: Vsock, room: int) -> None:
        self.vsock = vsock
        self.room = room  # the guest's buffer
        self.from_guest = bytearray()
        self.from_host = bytearray()
        self.host_got = self.guest_got = 0
        self.guest_read = 0  # of what it got
        self.buf_alloc = self.fwd_cnt = 0  # as the engine told last
        self.offered = 0
        vsock.offer_rx(1)
        listener = vsock.listen(HOST_PORT)
        vsock.send(self.packet(REQUEST))
        assert vsock.serve() == 0
        (answer,) = vsock.received()
        assert answer.op == RESPONSE
        self.take_credit(answer)
        self.host = vsock.accept(listener)
        listener.close()
        (vsock.directory / "v.sock_52").unlink()

    def packet(self, op: int, data: bytes = b"") -> Packet:
        fwd_cnt = self.guest_read % WRAP
        return Packet(op, GUEST_PORT, HOST_PORT, data, buf_alloc=self.room, fwd_cnt=fwd_cnt)

    def take_credit(self, packet: Packet) -> None:
        self.buf_alloc, self.fwd_cnt = packet.buf_alloc, packet.fwd_cnt
        # It cannot have forwarded what was not sent, nor go back.
        assert self.host_got <= self.fwd_cnt <= len(self.from_guest)

    # --- steps

    def guest_sends(self, size: int) -> None:
        size = min(size, 65536, self.buf_alloc - (len(self.from_guest) - self.fwd_cnt))
        data = PATTERN[len(self.from_guest) % 1000 :][:size]
        self.from_guest += data
        self.vsock.send(self.packet(RW, data))

    def host_sends(self, size: int) -> None:
        try:
            sent = self.host.send(PATTERN[len(self.from_host) % 999 :][:size])
        except BlockingIOError:
            return
        self.from_host += PATTERN[len(self.from_host) % 999 :][:sent]

    def host_reads(self, size: int) -> None:
        try:
            data = self.host.recv(size)
        except BlockingIOError:
            return
        assert data == self.from_guest[self.host_got :][: len(data)]
        self.host_got += len(data)

    def guest_reads(self, size: int) -> None:
        self.guest_read = min(self.guest_read + size, self.guest_got)
        self.vsock.send(self.packet(CREDIT_UPDATE))

    def guest_asks(self, _size: int) -> None:
        self.vsock.send(self.packet(CREDIT_REQUEST))

    def offer(self, size: int) -> None:
        count = min(size % 40, RING_SIZE - self.offered)
        self.offered += count
        self.vsock.offer_rx(count)

    def nothing(self, _size: int) -> None:
        pass

    # --- what must hold

    def check(self) -> None:
        assert self.vsock.serve() == 0
        for packet in self.vsock.received():
            self.offered -= 1
            assert packet.op in (RW, CREDIT_UPDATE, CREDIT_REQUEST)
            self.take_credit(packet)
            assert packet.data == self.from_host[self.guest_got :][: len(packet.data)]
            self.guest_got += len(packet.data)
        assert self.guest_got - self.guest_read <= self.room

    def finish(self) -> None:
        """Let both sides read all: nothing may be stuck anywhere."""
        self.room = 1 << 18  # a small one would take long
        for _ in range(1000):
            if (self.host_got, self.guest_got) == (len(self.from_guest), len(self.from_host)):
                return
            for step in (self.host_reads, self.guest_reads, self.offer):
                step(39 + (1 << 20) // 40 * 40)
                self.check()
        raise AssertionError(f"stuck at {self.host_got}, {self.guest_got}")


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hv-") as path:
        monkeypatch.chdir(path)
        yield Path(path)
        monkeypatch.undo()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps, room=st.sampled_from((1, 100, 5000, 65536, 262144)), event_idx=st.booleans())
def test_every_byte_arrives_once_and_in_order(
    directory: Path, steps: list[tuple[str, int]], room: int, event_idx: bool
) -> None:
    (directory / "v.sock").unlink(missing_ok=True)
    vsock = Vsock(directory, event_idx=event_idx)
    try:
        stream = Stream(vsock, room)
        for kind, size in steps:
            getattr(stream, kind)(size)
            stream.check()
        stream.finish()
    finally:
        vsock.close()


def model_greeting(text: bytes) -> int | None:
    """The port that a greeting names: None when it is none, -1 when it is not whole."""
    whole = re.fullmatch(rb"CONNECT ([0-9]{1,10})\n.*", text, re.DOTALL)
    if whole:
        return int(whole[1]) if int(whole[1]) < WRAP else None
    begun = re.fullmatch(rb"CONNECT ([0-9]*)", text)
    is_short = begun is not None and len(text) < 19 and int(begun[1] or b"0") < WRAP
    return -1 if is_short or b"CONNECT ".startswith(text) else None


greetings = st.binary(min_size=1, max_size=19) | st.builds(
    lambda head, port, tail: (head + b"%d" % port + tail)[:19],
    st.sampled_from((b"CONNECT ", b"CONNECT", b"connect ", b"CONNECT 0", b"CONNECT +", b"")),
    st.integers(0, 1 << 34) | st.sampled_from((WRAP - 1, WRAP)),
    st.sampled_from((b"\n", b"", b"\r\n", b" \n", b"\nmore", b"x\n")),
)


@settings(max_examples=300)
@given(text=greetings, cut=st.integers(1, 19))
def test_a_greeting_is_read_as_the_model_reads_it(text: bytes, cut: int) -> None:
    text = text[:cut]
    port, used = ffi.new("uint32_t *"), ffi.new("size_t *")
    ret = lib.vsock_parse_greeting(ffi.from_buffer(text), len(text), port, used)
    wanted = model_greeting(text)
    if wanted is None:
        assert ret < 0
    elif wanted < 0:
        assert ret == 0
    else:
        assert (ret, port[0], text[used[0] - 1 : used[0]]) == (1, wanted, b"\n")
