# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The control queue's commands, VIRTIO 1.2, 5.1.6.5: what is answered how, and that garbage is."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.virtio.net_control import (
    MAX_COMMAND_BYTES,
    Accepted,
    Announced,
    BadCommand,
    SetMac,
    SetPairs,
    parse,
)

CTRL_RX, VLAN, RX_EXTRA, ANNOUNCE, MQ, CTRL_MAC = (1 << bit for bit in (18, 19, 20, 21, 22, 23))
ALL = CTRL_RX | VLAN | RX_EXTRA | ANNOUNCE | MQ | CTRL_MAC
ADDRESS = bytes.fromhex("020000000007")


def tables(unicast: int, multicast: int) -> bytes:
    """Both address tables of MAC_TABLE_SET."""
    return b"".join(struct.pack("<I", n) + ADDRESS * n for n in (unicast, multicast))


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"\0\0\1", Accepted()),
        (b"\0\5\0", Accepted()),
        (b"\1\0" + tables(0, 0), Accepted()),
        (b"\1\0" + tables(3, 200), Accepted()),
        (b"\1\1" + ADDRESS, SetMac(ADDRESS)),
        (b"\2\0\xfe\x0f", Accepted()),
        (b"\2\1\0\0", Accepted()),
        (b"\3\0", Announced()),
        (b"\4\0\2\1", SetPairs(0x102)),
    ],
)
def test_a_command_is_understood(data: bytes, wanted: object) -> None:
    assert parse(data, ALL) == wanted


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\0\0",  # no value
        b"\0\0\2",
        b"\0\0\1\1",
        b"\0\6\1",  # no such mode
        b"\1\0",
        b"\1\0" + tables(1, 0)[:-4],  # one table
        b"\1\0" + tables(1, 1)[:-1],
        b"\1\0" + tables(1, 1) + b"\0",
        b"\1\0" + struct.pack("<I", 0xFFFFFFFF) + ADDRESS,
        b"\1\1" + ADDRESS[:5],
        b"\1\1\1" + ADDRESS[1:],  # multicast
        b"\1\1" + bytes(6),
        b"\2\0\xff\x0f",
        b"\2\2\1\0",
        b"\3\0\0",
        b"\4\0\1",
        b"\4\1" + bytes(40),  # RSS, not offered
        b"\5\0" + bytes(8),
        b"\xff\xff",
        b"\1\0" + tables(1400, 0),  # more than is read
    ],
)
def test_what_is_no_command_is_refused(data: bytes) -> None:
    with pytest.raises(BadCommand):
        parse(data, ALL)


@pytest.mark.parametrize(
    ("data", "feature"),
    [
        (b"\0\0\1", CTRL_RX),
        (b"\0\3\1", RX_EXTRA),
        (b"\1\0" + tables(1, 1), CTRL_RX),
        (b"\1\1" + ADDRESS, CTRL_MAC),
        (b"\2\0\1\0", VLAN),
        (b"\3\0", ANNOUNCE),
        (b"\4\0\1\0", MQ),
    ],
)
def test_what_was_not_negotiated_is_refused(data: bytes, feature: int) -> None:
    parse(data, feature)
    with pytest.raises(BadCommand, match="not negotiated"):
        parse(data, ALL & ~feature)


@given(
    st.one_of(
        st.binary(max_size=64),
        st.builds(
            lambda kind, rest: bytes(kind) + rest,
            st.tuples(st.integers(0, 5), st.integers(0, 6)),
            st.binary(max_size=64),
        ),
        st.builds(
            lambda counts, data: b"\1\0" + struct.pack("<I", counts) + data,
            st.integers(0, 0xFFFFFFFF),
            st.binary(max_size=MAX_COMMAND_BYTES + 8),
        ),
    ),
    st.integers(0, (1 << 64) - 1),
)
def test_garbage_is_a_command_or_a_bad_one(data: bytes, features: int) -> None:
    try:
        command = parse(data, features)
    except BadCommand:
        return
    assert features & ALL
    match command:
        case SetMac(mac):
            assert len(mac) == 6
            assert not mac[0] & 1
        case SetPairs(count):
            assert 0 <= count <= 0xFFFF
