# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a driver asks of a network device on its control queue.

A tap passes on whatever reaches it, so the device behaves as one in promiscuous mode: filters are
checked and accepted, as the specification allows, and change nothing.

Source: VIRTIO 1.2, 5.1.6.5 "Control Virtqueue".
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvm_ffi.errors import GuestError

from .ids import (
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_MQ,
)

ACK_OK: Final = b"\0"
ACK_ERROR: Final = b"\1"
# More than the tables of some 1,300 addresses; a driver sizes what the host reads.
MAX_COMMAND_BYTES: Final = 8192
MAC_BYTES: Final = 6
MAX_VLAN_ID: Final = 4094  # IEEE 802.1Q; 4095 is reserved


class BadCommand(GuestError):
    """A command that is unknown, was not negotiated or is misshapen; the driver gets an error."""


@dataclass(frozen=True, slots=True)
class SetMac:
    """Take another address."""

    mac: bytes


@dataclass(frozen=True, slots=True)
class SetPairs:
    """Use so many pairs of queues, from the first one on."""

    count: int


@dataclass(frozen=True, slots=True)
class Announced:
    """The guest has announced itself."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """Valid, and nothing to be done."""


Command = SetMac | SetPairs | Announced | Accepted


def parse(data: bytes, features: int) -> Command:
    """Read one command.

    Args:
        data: class, command and what belongs to it, without the ack (guest-controlled).
        features: what was negotiated.

    Raises:
        BadCommand: it is to be answered with an error.
    """
    if not 2 <= len(data) <= MAX_COMMAND_BYTES:
        raise BadCommand(f"control command of {len(data)} bytes: must be 2..{MAX_COMMAND_BYTES}")
    kind = (data[0], data[1])
    feature, read = _COMMANDS.get(kind, (0, _nothing))
    if not features & feature:
        raise BadCommand(f"control command {kind} was not negotiated")
    return read(data[2:])


def _nothing(_: bytes) -> Command:
    return Accepted()


def _switch(data: bytes) -> Command:
    if data not in (b"\0", b"\1"):
        raise BadCommand(f"receive mode {data[:8].hex()}: must be 00 or 01")
    return Accepted()


def _mac_tables(data: bytes) -> Command:
    # Unicast, then multicast: le32 entries, then six bytes for each.
    for _ in range(2):
        if len(data) < 4:
            raise BadCommand("MAC table without a count")
        (entries,) = struct.unpack_from("<I", data)
        size = 4 + entries * MAC_BYTES
        if size > len(data):
            raise BadCommand(f"MAC table of {entries} entries in {len(data)} bytes")
        data = data[size:]
    if data:
        raise BadCommand(f"{len(data)} bytes after the MAC tables")
    return Accepted()


def _mac(data: bytes) -> Command:
    if len(data) != MAC_BYTES or data[0] & 1 or not any(data):
        raise BadCommand(f"address {data[:8].hex(':')}: must be six bytes of a unicast one")
    return SetMac(data)


def _vlan(data: bytes) -> Command:
    if (vlan_id := _u16(data)) > MAX_VLAN_ID:
        raise BadCommand(f"VLAN {vlan_id}: must be 0..{MAX_VLAN_ID}")
    return Accepted()


def _pairs(data: bytes) -> Command:
    return SetPairs(_u16(data))


def _announced(data: bytes) -> Command:
    if data:
        raise BadCommand(f"{len(data)} bytes after an announcement's acknowledgement")
    return Announced()


def _u16(data: bytes) -> int:
    if len(data) != 2:
        raise BadCommand(f"{len(data)} bytes: must be 2")
    return int.from_bytes(data, "little")


# (class, command) -> the feature that it needs, and its reader.
_COMMANDS: Final[dict[tuple[int, int], tuple[int, Callable[[bytes], Command]]]] = {
    (0, 0): (VIRTIO_NET_F_CTRL_RX, _switch),  # PROMISC
    (0, 1): (VIRTIO_NET_F_CTRL_RX, _switch),  # ALLMULTI
    (0, 2): (VIRTIO_NET_F_CTRL_RX_EXTRA, _switch),  # ALLUNI
    (0, 3): (VIRTIO_NET_F_CTRL_RX_EXTRA, _switch),  # NOMULTI
    (0, 4): (VIRTIO_NET_F_CTRL_RX_EXTRA, _switch),  # NOUNI
    (0, 5): (VIRTIO_NET_F_CTRL_RX_EXTRA, _switch),  # NOBCAST
    (1, 0): (VIRTIO_NET_F_CTRL_RX, _mac_tables),  # MAC_TABLE_SET
    (1, 1): (VIRTIO_NET_F_CTRL_MAC_ADDR, _mac),  # MAC_ADDR_SET
    (2, 0): (VIRTIO_NET_F_CTRL_VLAN, _vlan),  # ADD
    (2, 1): (VIRTIO_NET_F_CTRL_VLAN, _vlan),  # DEL
    (3, 0): (VIRTIO_NET_F_GUEST_ANNOUNCE, _announced),  # ACK
    (4, 0): (VIRTIO_NET_F_MQ, _pairs),  # VQ_PAIRS_SET
}
