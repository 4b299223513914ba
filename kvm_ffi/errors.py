# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Errors of the KVM layer.

HostError                     the host could not do what was asked
 +- KvmError (also OSError)   an ioctl failed: .request, .errno
 +- CapabilityMissing         the kernel or its headers lack a feature: .name
GuestError                    the guest broke a rule; stops at the device that serves it
 +- BadGuestAddress           an address range leaves guest memory: .gpa, .length
 +- BadDescriptorChain        a virtqueue or a chain in it is malformed
"""

from __future__ import annotations

import errno as _errno
import os


class HostError(Exception):
    """The host could not do what was asked."""


class KvmError(HostError, OSError):
    """A KVM ioctl failed; ``request`` is its UAPI name."""

    def __init__(self, request: str, errno: int) -> None:
        OSError.__init__(self, errno, f"{request}: {os.strerror(errno)}")
        self.request = request

    @property
    def is_missing(self) -> bool:
        """Whether the host kernel does not know the ioctl."""
        return self.errno in (_errno.ENOTTY, _errno.ENOSYS)


class CapabilityMissing(HostError):
    """The running kernel, or the headers this was built with, lack a KVM feature."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is not available on this host")
        self.name = name


class GuestError(Exception):
    """The guest driver broke a rule of the specification."""


class BadGuestAddress(GuestError):
    """A guest-physical range is not wholly inside one region of guest memory."""

    def __init__(self, gpa: int, length: int) -> None:
        super().__init__(f"gpa={gpa:#x} length={length:#x} leaves guest memory")
        self.gpa = gpa
        self.length = length


class BadDescriptorChain(GuestError):
    """A virtqueue or a descriptor chain is malformed, loops, or leaves guest memory."""
