# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Number types that must not be mixed, and the shapes the layer takes from others."""

from __future__ import annotations

from typing import NewType, Protocol

Gpa = NewType("Gpa", int)
"""A guest-physical address."""

Hva = NewType("Hva", int)
"""A host-virtual address inside this process."""

Gsi = NewType("Gsi", int)
"""A global system interrupt: an index into a VM's interrupt routing table."""


class SupportsFd(Protocol):
    """Owns a file descriptor; an EventFd as the engines see it."""

    @property
    def fd(self) -> int:
        """The open descriptor; the owner closes it."""
        ...
