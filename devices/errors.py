# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Errors of the device models.

HostError (kvm_ffi)           the host could not do what was asked
 +- BackendError              a disk, tap or socket behind a device failed: .path
GuestError (kvm_ffi)          the guest broke a rule; stops at the device, never reaches the API
 +- BadQueueConfig            a virtqueue was set up in a way that cannot be served
 +- BadRegisterAccess         a register has no such offset, width or value
"""

from __future__ import annotations

from kvm_ffi.errors import GuestError, HostError


class BackendError(HostError):
    """What stands behind a device cannot be used; ``path`` names it for the operator."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


class BadQueueConfig(GuestError):
    """A virtqueue was enabled with a size, address or set of queues that cannot be served."""


class BadRegisterAccess(GuestError):
    """A register was accessed at an offset, in a width or with a value that it does not have."""
