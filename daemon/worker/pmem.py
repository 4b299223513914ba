# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Guest memory that is files: where it lies, and its memslots."""

from __future__ import annotations

import contextlib

from kvm_ffi.memory import GuestMemory, ReadOnlyMapping
from kvm_ffi.types import Gpa
from kvm_ffi.vm import Vm

from ..protocol import MachineSpec
from . import layout
from .device_makers import MachineFds


def add_memory(
    vm: Vm, memory: GuestMemory, spec: MachineSpec, fds: MachineFds, stack: contextlib.ExitStack
) -> None:
    """Give a VM its RAM and its persistent memory.

    A file that may be written is guest memory like any other, for devices too: a guest hands them
    addresses in it when it reads a disk into a mapped file. One that may not is for vCPUs alone.

    Raises:
        KvmError, OSError, ValueError: the host cannot.
    """
    gpas = layout.pmem_gpas(spec.memory_bytes, [pmem.size_bytes for pmem in spec.pmem])
    places = list(zip(gpas, spec.pmem, strict=True))
    for gpa, pmem in places:
        if not pmem.read_only:
            memory.add_file(Gpa(gpa), pmem.size_bytes, fds[pmem.fd])
    vm.add_guest_memory(memory)
    for gpa, pmem in places:
        if pmem.read_only:
            mapping = ReadOnlyMapping(fds[pmem.fd], pmem.size_bytes)
            stack.callback(mapping.close)
            slot_id = len(memory.regions) + spec.pmem.index(pmem)
            vm.set_memslot(slot_id, Gpa(gpa), pmem.size_bytes, mapping.hva, read_only=True)
