# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What the zygote does once, so that no worker has to: ask the host, and run a launch's code.

CPython fills caches and rewrites its bytecode as code runs for the first times. Done before the
fork, that memory stays shared and its time is spent only once.
"""

from __future__ import annotations

import logging
import os
import struct
from contextlib import ExitStack
from typing import Final

from kvm_ffi.errors import HostError
from kvm_ffi.system import HostFacts, Kvm
from kvm_ffi.vcpu import install_kick_signal

from ..protocol import DiskSpec, MachineSpec
from .layout import KERNEL_MIN_GPA, MIB
from .machine import Machine, MachineFds

log = logging.getLogger(__name__)

# After two rounds a third changes nothing more that was measurable.
ROUNDS: Final = 2


def warm_up(kvm_device: str = "/dev/kvm") -> HostFacts | None:
    """Build a machine and take it down again; return what is known of the host.

    None where the host has no KVM for this user: hosteld says so when it is asked for a VM.

    Threads: leaves none behind, so that the zygote may fork.
    """
    try:
        with ExitStack() as stack:
            fds = [os.open(kvm_device, os.O_RDWR | os.O_CLOEXEC)]
            stack.callback(os.close, fds[0])
            facts = Kvm(fds[0]).facts()
            for content in (_halting_kernel(), bytes(4096)):
                fds.append(os.memfd_create("hostel-warm-up", os.MFD_CLOEXEC))
                stack.callback(os.close, fds[-1])
                os.write(fds[-1], content)
            install_kick_signal()
            for _ in range(ROUNDS):
                Machine(_SPEC, MachineFds(tuple(fds)), lambda _: None, facts).close()
    except (OSError, HostError) as err:
        log.info("no warm-up: %s", err)
        return None
    return facts


def _halting_kernel() -> bytes:
    """Return the least ELF64 file that is a kernel: one segment with hlt; jmp back to it."""
    code = b"\xf4\xeb\xfd"
    offset = 64 + 56
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01", 2, 62, 1, KERNEL_MIN_GPA, 64, 0, 0, 64, 56, 1, 0, 0, 0),
    )
    sizes = (len(code), len(code), 1)
    segment = struct.pack("<IIQQQQQQ", 1, 5, offset, KERNEL_MIN_GPA, KERNEL_MIN_GPA, *sizes)
    return header + segment + code


_SPEC: Final = MachineSpec(
    vm_id="warm-up",
    vcpus=1,
    memory_bytes=16 * MIB,
    cmdline="",
    entry="linux64",
    setup_header="",
    kvm_fd=0,
    kernel_fd=1,
    initrd_fd=None,
    disks=(DiskSpec("root", 2, read_only=False),),
    nics=(),
    rng=True,
    on_reboot="stop",
    on_panic="keep",
    requested_ns=0,
)
