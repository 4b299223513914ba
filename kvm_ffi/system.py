# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""/dev/kvm: what the host offers, and where VMs come from."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from ._kvm import lib
from .capabilities import Capabilities
from .errors import HostError, KvmError
from .ioctl import ioctl_int, ioctl_ptr, new_array
from .vm import Vm
from .x86_state import CpuidEntry, cpuid_from_c

if TYPE_CHECKING:
    from types import TracebackType

_MAX_CPUID_ENTRIES: Final = 256  # KVM_MAX_CPUID_ENTRIES, which is not in the UAPI headers


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What /dev/kvm says about host and kernel, the same for every VM."""

    capabilities: Capabilities
    supported_cpuid: tuple[CpuidEntry, ...]


class Kvm:
    """The system descriptor.

    Args:
        fd: an open /dev/kvm; this object closes it.
        facts: what an earlier one found on this host, so as not to ask again; None asks.

    Raises:
        KvmError: the descriptor is not a KVM device.
        HostError: its API is not the one that this was built for.

    Threads: any.

    Source: Linux Documentation/virt/kvm/api.rst 4.1-4.5, 4.46.
    """

    def __init__(self, fd: int, facts: HostFacts | None = None) -> None:
        self.fd = fd
        self._facts = facts
        self.capabilities = Capabilities.probe(fd) if facts is None else facts.capabilities
        if self.capabilities.api_version != lib.KVM_API_VERSION:
            raise HostError(
                f"KVM API version {self.capabilities.api_version}: must be {lib.KVM_API_VERSION}"
            )

    @classmethod
    def open(cls, path: str = "/dev/kvm") -> Self:
        """Open the device; for programs that may, which a worker may not.

        Raises:
            OSError: there is no such device, or no permission for it.
        """
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    def create_vm(self) -> Vm:
        """Create a VM with no memory, no vCPUs and no interrupt controllers.

        Raises:
            KvmError: the host refused.
        """
        # KVM makes the descriptor close-on-exec.
        vm_fd = ioctl_int(self.fd, "KVM_CREATE_VM")
        try:
            run_size_bytes = ioctl_int(self.fd, "KVM_GET_VCPU_MMAP_SIZE")
        except BaseException:
            os.close(vm_fd)
            raise
        return Vm(vm_fd, self.capabilities, run_size_bytes)

    def supported_cpuid(self) -> list[CpuidEntry]:
        """The CPUID leaves that host and KVM can give to a guest; see x86_64.vcpu_cpuid().

        Raises:
            KvmError: the host refused.
        """
        if self._facts is not None:
            return list(self._facts.supported_cpuid)
        _memory, header, entries = new_array(
            "struct kvm_cpuid2", "struct kvm_cpuid_entry2", _MAX_CPUID_ENTRIES
        )
        header.nent = _MAX_CPUID_ENTRIES
        ioctl_ptr(self.fd, "KVM_GET_SUPPORTED_CPUID", header)
        return [cpuid_from_c(entries[i]) for i in range(header.nent)]

    def facts(self) -> HostFacts:
        """What a later Kvm of this host need not ask again.

        Raises:
            KvmError: the host refused.
        """
        return HostFacts(self.capabilities, tuple(self.supported_cpuid()))

    def msr_index_list(self) -> list[int]:
        """The MSRs that make up a vCPU's state: what a snapshot saves.

        Raises:
            KvmError: the host refused.
        """
        count = self._msr_count()
        _memory, header, indices = new_array("struct kvm_msr_list", "uint32_t", count)
        header.nmsrs = count
        ioctl_ptr(self.fd, "KVM_GET_MSR_INDEX_LIST", header)
        return [indices[i] for i in range(header.nmsrs)]

    def _msr_count(self) -> int:
        """How many there are: KVM says so when it refuses a list that is too short."""
        _memory, header, _ = new_array("struct kvm_msr_list", "uint32_t", 0)
        try:
            ioctl_ptr(self.fd, "KVM_GET_MSR_INDEX_LIST", header)
        except KvmError as err:
            if err.errno != errno.E2BIG:
                raise
        return int(header.nmsrs)

    def close(self) -> None:
        """Close the descriptor; VMs made by it live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
