# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A worker as a process: what it does before it knows its VM, and what is around its main loop."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket

from kvm_ffi.heap_image import HeapImage, unshare
from kvm_ffi.host_process import drop_privileges, name_thread
from kvm_ffi.system import HostFacts
from kvm_ffi.vcpu import install_kick_signal

from .console import WorkerLog
from .control import ControlServer
from .main import Worker

log = logging.getLogger(__name__)


def prepare(image: HeapImage | None, learned: bytes) -> HeapImage | None:
    """Do what a worker does before it knows its VM; return the image, if it can be used.

    Nothing here may fail: there is no log yet that its VM's operator would look into.

    Args:
        image: of the zygote's memory, or None.
        learned: which of its pages a launch writes to.
    """
    with contextlib.suppress(OSError):  # then page faults do it, as before Linux 5.14
        unshare(learned)
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        if image is not None:
            image.attach()
    except OSError as err:
        log.warning("memory will not be shared again: %s", err)
        image = None
    name_thread("vm-spare")
    return image


def run(vm_id: str, fds: tuple[int, ...], facts: HostFacts | None, image: HeapImage | None) -> int:
    """Be a worker until its VM ends; returns the process's exit status.

    Args:
        fds: listener, console, log and last_words, as protocol.py says; owned from here on.
        facts: what the zygote found out about this host, or None.
        image: of the zygote's memory, or None.
    """
    listener_fd, console_fd, log_fd, last_words_fd = fds
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    os.close(log_fd)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=WorkerLog(2),
        force=True,
    )
    drop_privileges()
    install_kick_signal()
    name_thread(f"vm-{vm_id}")
    with selectors.DefaultSelector() as selector:
        worker = Worker(vm_id, selector, console_fd, last_words_fd, facts, image)
        control = ControlServer(socket.socket(fileno=listener_fd), selector, worker.handle)
        worker.serve(control)
        control.close()
    return 0
