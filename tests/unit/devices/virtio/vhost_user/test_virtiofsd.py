# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A directory behind the real virtiofsd, mounted through our front end."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devices.virtio.vhost_user.device import VhostUserFs
from devices.virtio.vhost_user.link import Link
from tests.support.storage_daemon import DEADLINE_S

if TYPE_CHECKING:
    from tests.unit.devices.virtio.conftest import Machine, MachineFactory

PROGRAM = Path("/usr/lib/qemu/virtiofsd")
DATA_GPA = 0x40000
REQUESTS = 1  # queue 0 is for urgent ones
FUSE_INIT = 26
# struct fuse_in_header, then fuse_init_in of protocol 7.31: Linux include/uapi/linux/fuse.h.
INIT = struct.pack("<IIQQIIII", 104, FUSE_INIT, 2, 0, 0, 0, 0, 0) + struct.pack(
    "<IIII48x", 7, 31, 65536, 0
)
ANSWER_BYTES = 80

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not PROGRAM.exists(), reason="QEMU's virtiofsd, and root for it"
)


@pytest.fixture
def share(tmp_path: Path, make_machine: MachineFactory) -> Iterator[tuple[Machine, Link]]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(1)
        argv = [PROGRAM, f"--fd={listener.fileno()}", "-o", f"source={tmp_path}"]
        process = subprocess.Popen(argv, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL)
    try:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(tmp_path / "socket"))
        link = Link("fs", sock, config_bytes=0, is_libvhost=True)
        machine = make_machine(VhostUserFs("fs", link, tag="src"))
        link.watch(machine.loop)
        yield machine, link
        link.watch(None)
        machine.close()
        link.close()
    finally:
        process.kill()
        process.wait()


def mount(machine: Machine) -> bytes:
    """Send FUSE_INIT, as mounting does, and return the answer."""
    machine.memory.write(DATA_GPA, INIT)
    machine.memory.write(DATA_GPA + 0x1000, bytes(ANSWER_BYTES))
    buffers = [(DATA_GPA, len(INIT), False), (DATA_GPA + 0x1000, ANSWER_BYTES, True)]
    machine.post(REQUESTS, buffers)
    machine.transport._kicks[REQUESTS].signal()
    due = time.monotonic() + DEADLINE_S
    while not machine.used(REQUESTS):
        assert time.monotonic() < due
        time.sleep(0.001)
    return machine.memory.read(DATA_GPA + 0x1000, ANSWER_BYTES)


def test_tag_is_in_the_config_space(share: tuple[Machine, Link]) -> None:
    machine, _ = share
    machine.enable_memory()
    raw = b"".join(machine.read(0x2000 + at, 4).to_bytes(4, "little") for at in range(0, 40, 4))
    assert raw == b"src".ljust(36, b"\0") + struct.pack("<I", 1)


def test_file_system_answers_and_does_so_again_after_a_reset(share: tuple[Machine, Link]) -> None:
    machine, link = share
    for _ in range(2):
        machine.start(1 << 32)
        length, error, unique, major = struct.unpack_from("<IiQI", mount(machine))
        assert (length, error, unique, major) == (ANSWER_BYTES, 0, 2, 7)
    assert link.lost is None
