# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What the running kernel's KVM can do, probed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Self

from ._kvm import lib
from .errors import CapabilityMissing
from .ioctl import ioctl_int

# The C side gives a capability that the build's headers lack the number -1.
_NOT_BUILT_IN: Final = -1


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The answers to KVM_CHECK_EXTENSION for every capability that Hostel knows.

    Attributes:
        api_version: 12 on every kernel since 2.6.22.
        values: UAPI name to answer; 0 means that the host does not have it.

    Source: Linux Documentation/virt/kvm/api.rst 4.4.
    """

    api_version: int
    values: Mapping[str, int]

    @classmethod
    def probe(cls, kvm_fd: int) -> Self:
        """Ask an open /dev/kvm.

        Raises:
            KvmError: it is not a KVM device.
        """
        api_version = ioctl_int(kvm_fd, "KVM_GET_API_VERSION")
        names = [name for name in dir(lib) if name.startswith("KVM_CAP_")]
        values = {name: _probe_one(kvm_fd, getattr(lib, name)) for name in names}
        return cls(api_version, MappingProxyType(values))

    def value(self, name: str) -> int:
        """The answer for one capability, by its UAPI name; 0 if the host lacks it."""
        return self.values.get(name, 0)

    def has(self, name: str) -> bool:
        """Whether the host has a capability."""
        return self.value(name) > 0

    def require(self, *names: str) -> None:
        """Insist on capabilities.

        Raises:
            CapabilityMissing: the host lacks one; the error names the first.
        """
        for name in names:
            if not self.has(name):
                raise CapabilityMissing(name)

    @property
    def max_vcpus(self) -> int:
        """The most vCPUs that one VM may have."""
        # api.rst 4.4: absent KVM_CAP_MAX_VCPUS means KVM_CAP_NR_VCPUS, and absent that, 4.
        return self.value("KVM_CAP_MAX_VCPUS") or self.value("KVM_CAP_NR_VCPUS") or 4

    @property
    def max_memslots(self) -> int:
        """The most memslots that one VM may have."""
        return self.value("KVM_CAP_NR_MEMSLOTS") or 32

    @property
    def max_gsi_routes(self) -> int:
        """The most entries that a GSI routing table may have; 0 without routing."""
        return self.value("KVM_CAP_IRQ_ROUTING")


def _probe_one(kvm_fd: int, capability: int) -> int:
    if capability == _NOT_BUILT_IN:
        return 0
    return ioctl_int(kvm_fd, "KVM_CHECK_EXTENSION", capability)
