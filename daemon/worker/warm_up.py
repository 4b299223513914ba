# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What the zygote does once, so that no worker has to: ask the host, and run a launch's code.

CPython fills caches and rewrites its bytecode as code runs for the first times. Done before the
fork, that memory stays shared and its time is spent only once.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import struct
from contextlib import ExitStack
from typing import Final

from kvm_ffi.errors import HostError
from kvm_ffi.system import HostFacts, Kvm
from kvm_ffi.vcpu import install_kick_signal

from .. import protocol
from ..errors import ProtocolError, WorkerError
from ..protocol import DiskSpec, MachineSpec
from .control import ControlServer
from .layout import KERNEL_MIN_GPA, MIB
from .main import Worker

log = logging.getLogger(__name__)

# CPython rewrites a function's bytecode for what it is used with, from the eighth call on.
ROUNDS: Final = 10


def warm_up(rounds: int = ROUNDS, kvm_device: str = "/dev/kvm") -> HostFacts | None:
    """Be a worker from launch to quit, a few times; return what is known of the host.

    None where the host has no KVM for this user: hosteld says so when it is asked for a VM.

    Threads: leaves none behind, so that the zygote may fork.
    """
    # Nobody is to read of these machines in a log.
    logging.disable(logging.ERROR)
    try:
        with ExitStack() as stack:
            fds = [os.open(kvm_device, os.O_RDWR | os.O_CLOEXEC)]
            stack.callback(os.close, fds[0])
            facts = Kvm(fds[0]).facts()
            for content in (_halting_kernel(), bytes(4096), b"", b""):
                fds.append(os.memfd_create("hostel-warm-up", os.MFD_CLOEXEC))
                stack.callback(os.close, fds[-1])
                os.write(fds[-1], content)
            install_kick_signal()
            for _ in range(rounds):
                _live(fds, facts)
    except (OSError, HostError, WorkerError, ProtocolError) as err:
        logging.disable(logging.NOTSET)
        log.info("no warm-up: %s", err)
        return None
    logging.disable(logging.NOTSET)
    return facts


def _live(fds: list[int], facts: HostFacts) -> None:
    """Run a worker through its life: all that it will be asked waits in its socket already."""
    *machine_fds, console_fd, last_words_fd = fds
    # Without a name that anybody could connect to: this runs in the zygote, with its privileges.
    peer, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with selectors.DefaultSelector() as selector, peer:
        launch = {"id": 0, "op": "launch", "args": _SPEC.encode()}
        protocol.send(peer, launch, tuple(machine_fds))
        for number, op in enumerate(("pause", "resume", "status", "stats", "quit"), 1):
            protocol.send(peer, {"id": number, "op": op, "args": {}})
        worker = Worker("warm-up", selector, console_fd, last_words_fd, facts, None)
        control = ControlServer(None, selector, worker.handle)
        control.adopt(theirs)
        worker.serve(control)
        control.close()
        _check(peer)


def _check(peer: socket.socket) -> None:
    """Look for an answer that is an error.

    Raises:
        WorkerError: the worker could not do what it was asked.
    """
    while (message := protocol.receive(peer)) is not None:
        error = message.body.get("error")
        if error is not None:
            raise WorkerError(error["code"], error["message"])


def _halting_kernel() -> bytes:
    """Return a small ELF64 file that is a kernel: it tells the boot timer, prints, and halts."""
    # mov dx, 0x5b0; mov al, 123; out dx, al; mov dx, 0x3f8; out dx, al; hlt; jmp back to hlt
    code = bytes.fromhex("66ba b005 b0 7b ee 66ba f803 ee f4 eb fd")
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
