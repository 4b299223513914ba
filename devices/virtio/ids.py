# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Numbers of the virtio specification, each with the section that defines it.

Bit masks, not bit numbers. Source: VIRTIO 1.2; names as in <linux/virtio_*.h>.
"""

from __future__ import annotations

from typing import Final

PCI_VENDOR_VIRTIO: Final = 0x1AF4  # 4.1.2
PCI_DEVICE_ID_BASE: Final = 0x1040  # 4.1.2.1, plus the device id
PCI_SUBSYSTEM_ID_BASE: Final = 0x1100  # 4.1.2.1: 0x40 or higher

# Section 5, device ids.
VIRTIO_ID_NET: Final = 1
VIRTIO_ID_BLOCK: Final = 2
VIRTIO_ID_CONSOLE: Final = 3
VIRTIO_ID_RNG: Final = 4
VIRTIO_ID_VSOCK: Final = 19
VIRTIO_ID_FS: Final = 26
VIRTIO_ID_PMEM: Final = 27

# 2.1 Device Status Field.
STATUS_ACKNOWLEDGE: Final = 0x01
STATUS_DRIVER: Final = 0x02
STATUS_DRIVER_OK: Final = 0x04
STATUS_FEATURES_OK: Final = 0x08
STATUS_NEEDS_RESET: Final = 0x40
STATUS_FAILED: Final = 0x80

# Section 6, reserved feature bits. RING_RESET and NOTIFICATION_DATA are not offered.
VIRTIO_F_INDIRECT_DESC: Final = 1 << 28
VIRTIO_F_EVENT_IDX: Final = 1 << 29
VIRTIO_F_VERSION_1: Final = 1 << 32

# 4.1.4.5 ISR status.
ISR_CONFIG: Final = 0x2

# 4.1.5.1.2 MSI-X vector configuration.
NO_VECTOR: Final = 0xFFFF

# 5.2.3 block device.
VIRTIO_BLK_F_SIZE_MAX: Final = 1 << 1
VIRTIO_BLK_F_SEG_MAX: Final = 1 << 2
VIRTIO_BLK_F_RO: Final = 1 << 5
VIRTIO_BLK_F_BLK_SIZE: Final = 1 << 6
VIRTIO_BLK_F_FLUSH: Final = 1 << 9
VIRTIO_BLK_F_TOPOLOGY: Final = 1 << 10
VIRTIO_BLK_F_CONFIG_WCE: Final = 1 << 11
VIRTIO_BLK_F_MQ: Final = 1 << 12
VIRTIO_BLK_F_DISCARD: Final = 1 << 13
VIRTIO_BLK_F_WRITE_ZEROES: Final = 1 << 14

# 5.3.3 console device.
VIRTIO_CONSOLE_F_MULTIPORT: Final = 1 << 1

# 5.1.3 network device.
VIRTIO_NET_F_CSUM: Final = 1 << 0
VIRTIO_NET_F_GUEST_CSUM: Final = 1 << 1
VIRTIO_NET_F_MTU: Final = 1 << 3
VIRTIO_NET_F_MAC: Final = 1 << 5
VIRTIO_NET_F_GUEST_TSO4: Final = 1 << 7
VIRTIO_NET_F_GUEST_TSO6: Final = 1 << 8
VIRTIO_NET_F_GUEST_ECN: Final = 1 << 9
VIRTIO_NET_F_HOST_TSO4: Final = 1 << 11
VIRTIO_NET_F_HOST_TSO6: Final = 1 << 12
VIRTIO_NET_F_HOST_ECN: Final = 1 << 13
VIRTIO_NET_F_MRG_RXBUF: Final = 1 << 15
VIRTIO_NET_F_STATUS: Final = 1 << 16
VIRTIO_NET_F_CTRL_VQ: Final = 1 << 17
VIRTIO_NET_F_CTRL_RX: Final = 1 << 18
VIRTIO_NET_F_CTRL_VLAN: Final = 1 << 19
VIRTIO_NET_F_CTRL_RX_EXTRA: Final = 1 << 20
VIRTIO_NET_F_GUEST_ANNOUNCE: Final = 1 << 21
VIRTIO_NET_F_MQ: Final = 1 << 22
VIRTIO_NET_F_CTRL_MAC_ADDR: Final = 1 << 23
VIRTIO_NET_S_LINK_UP: Final = 1  # 5.1.4
VIRTIO_NET_S_ANNOUNCE: Final = 2
# What is about packets alone, and needs no control queue.
VIRTIO_NET_OFFLOADS: Final = (
    VIRTIO_NET_F_CSUM
    | VIRTIO_NET_F_GUEST_CSUM
    | VIRTIO_NET_F_GUEST_TSO4
    | VIRTIO_NET_F_GUEST_TSO6
    | VIRTIO_NET_F_GUEST_ECN
    | VIRTIO_NET_F_HOST_TSO4
    | VIRTIO_NET_F_HOST_TSO6
    | VIRTIO_NET_F_HOST_ECN
    | VIRTIO_NET_F_MRG_RXBUF
)
