# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a worker sets on a tap that it was given.

Source: Linux include/uapi/linux/if_tun.h and Documentation/networking/tuntap.rst.
"""

from __future__ import annotations

from ._kvm import lib
from .engine import check


def configure_tap(tap_fd: int, features: int) -> None:
    """Make a tap speak 12-byte headers and leave to the guest what it can do itself.

    Args:
        tap_fd: a tap of this VM, any of its queues; the setting lasts until the next call, so a
            device reset should come with features 0.
        features: negotiated virtio-net feature bits; GUEST_CSUM, GUEST_TSO4, GUEST_TSO6,
            GUEST_ECN and GUEST_UFO count.

    Raises:
        OSError: EINVAL when the tap was opened without IFF_VNET_HDR, EBADFD when it is gone.
    """
    check(lib.net_tap_configure(tap_fd, features))
