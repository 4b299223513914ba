# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A tap as the worker that was given it sees it.

Source: Linux include/uapi/linux/if_tun.h and Documentation/networking/tuntap.rst.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ._kvm import lib
from .engine import check


class Tap:
    """A tap, with a descriptor for each of its queues.

    Args:
        fds: opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, several with IFF_MULTI_QUEUE too;
            owned from now on.

    Every method but close() raises OSError when the kernel refuses: EINVAL for a tap without
    IFF_VNET_HDR, EBADFD when it is gone.

    Threads: any, one at a time.
    """

    def __init__(self, fds: Sequence[int]) -> None:
        self.fds = tuple(fds)

    def configure(self, features: int) -> None:
        """Speak 12-byte headers and leave to the guest what it can do itself.

        Args:
            features: negotiated virtio-net feature bits; GUEST_CSUM, GUEST_TSO4, GUEST_TSO6,
                GUEST_ECN and GUEST_UFO count. They last until the next call, so a device reset
                should come with 0.
        """
        check(lib.net_tap_configure(self.fds[0], features))

    def attach(self, index: int) -> None:
        """Let the host steer packets to a queue; one that it does already is left alone."""
        check(lib.net_tap_set_queue(self.fds[index], True))

    def detach(self, index: int) -> None:
        """Let the host steer no packets to a queue of several; what lies in it is dropped."""
        check(lib.net_tap_set_queue(self.fds[index], False))

    def set_carrier(self, is_up: bool) -> None:
        """Plug or unplug the cable, as the host sees it."""
        check(lib.net_tap_set_carrier(self.fds[0], is_up))

    def close(self) -> None:
        """Close it; a second call does nothing."""
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)
