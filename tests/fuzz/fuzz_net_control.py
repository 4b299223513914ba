# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""libFuzzer on the commands of a network device's control queue: features, then a command."""

from __future__ import annotations

import struct
import sys

import atheris

with atheris.instrument_imports(include=["devices.virtio.net_control"]):
    from devices.virtio.net_control import (
        MAX_COMMAND_BYTES,
        MAX_VLAN_ID,
        Announced,
        BadCommand,
        SetMac,
        SetPairs,
        parse,
    )

CTRL_RX, VLAN, RX_EXTRA, ANNOUNCE, MQ, CTRL_MAC = (1 << bit for bit in (18, 19, 20, 21, 22, 23))
# What a command that was taken must have been: its class, and the feature for its number.
NEEDED = {0: (CTRL_RX, CTRL_RX, *[RX_EXTRA] * 4), 1: (CTRL_RX, CTRL_MAC), 2: (VLAN, VLAN),
          3: (ANNOUNCE,), 4: (MQ,)}  # fmt: skip


def attack(data: bytes) -> None:
    """Guest-controlled: everything."""
    if len(data) < 8:
        return
    (features,) = struct.unpack_from("<Q", data)
    command = data[8:]
    try:
        taken = parse(command, features)
    except BadCommand:
        return
    assert 2 <= len(command) <= MAX_COMMAND_BYTES
    assert features & NEEDED[command[0]][command[1]]
    assert isinstance(taken, SetMac) == (command[:2] == b"\1\1")
    assert isinstance(taken, Announced) == (command == b"\3\0")
    match taken:
        case SetMac(mac):
            assert mac == command[2:]
            assert len(mac) == 6
            assert not mac[0] & 1
            assert any(mac)
        case SetPairs(count):
            assert command == b"\4\0" + struct.pack("<H", count)
    match command[0]:
        case 0:
            assert command[2:] in (b"\0", b"\1")
        case 2:
            assert struct.unpack("<H", command[2:])[0] <= MAX_VLAN_ID
        case 1 if command[1] == 0:
            (unicast,) = struct.unpack_from("<I", command, 2)
            (multicast,) = struct.unpack_from("<I", command, 6 + 6 * unicast)
            assert len(command) == 10 + 6 * (unicast + multicast)


if __name__ == "__main__":
    atheris.Setup(sys.argv, attack)
    atheris.Fuzz()
