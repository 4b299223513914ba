# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A qcow2 disk that a storage daemon serves over vhost-user: under us and under QEMU.

The same qemu-storage-daemon with the same options, on an image in memory of each side's own, so
that the front end is what is measured: ours, and the vhost-user-blk-pci of QEMU's q35 and microvm.
The daemon's CPU counts for its guest. How the rest goes is in bench/disk_load.py.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from bench import disk_load
from bench.disk_load import MEMORY_MIB, OURS, Results, Samples
from bench.qemu import Peer
from daemon.supervisor.backend_tools import storage_daemon
from daemon.supervisor.records import DiskRecord
from lab.guests import Guest
from tests.support.hostel import Hostel, children_of, name_of
from tests.support.storage_daemon import make_image

CASES: Final = (
    "randread,4096,1,1",
    "randread,4096,32,1",
    "randwrite,4096,32,1",
    "read,1048576,8,1",
)
PEERS: Final = ("q35", "microvm-pci")
IMAGE_BYTES: Final = 64 << 20
IN_MEMORY: Final = "/dev/shm"
DAEMON_NAME: Final = "qemu-storage-daemon"[:15]  # as the kernel keeps it


@contextmanager
def serving(image: Path, socket_path: Path) -> Iterator[int]:
    """Run the daemon as hosteld does; yield its process id."""
    disk = DiskRecord("data", str(image), None, False, False, IMAGE_BYTES, format="qcow2")
    disk_fd = os.open(image, os.O_RDWR)
    ours, qmp = socket.socketpair()
    socket_path.unlink(missing_ok=True)
    with ours, qmp, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path))
        listener.listen()
        command = storage_daemon(disk, disk_fd, qmp.fileno(), listener.fileno())
        with subprocess.Popen(command.argv, pass_fds=command.fds) as process:
            os.close(disk_fd)
            try:
                yield process.pid
            finally:
                process.kill()


def run_peer(machine: str, guest: Guest, words: str, directory: Path) -> Results:
    """Run all cases in one QEMU guest, and a daemon for it."""
    image, socket_path = directory / f"{machine}.qcow2", directory / "vhost-user.sock"
    devices = (
        *("-chardev", f"socket,id=disk,path={socket_path}"),
        *("-device", "vhost-user-blk-pci,chardev=disk,num-queues=1"),
    )
    peer = Peer(
        machine,
        guest.kernel,
        guest.load,
        words,
        MEMORY_MIB,
        has_named_ram=True,  # which the daemon maps
        devices=devices,
    )
    with serving(image, socket_path) as pid:
        return disk_load.run_peer(peer, pid)


def daemons(hostel: Hostel) -> list[int]:
    """Return the storage daemons of a hosteld."""
    assert hostel.daemon.process is not None
    children = children_of(hostel.daemon.process.pid)
    return [pid for pid in children if name_of(pid) == DAEMON_NAME]


def measure(guest: Guest, rounds: int, ms: int) -> Samples:
    """Measure every side once a round, on this host."""
    directory = Path(tempfile.mkdtemp(prefix="hb-", dir=IN_MEMORY))
    hostel = Hostel(directory)
    words = disk_load.cmdline(CASES, ms)
    try:
        for name in (OURS, *PEERS):
            make_image(directory / f"{name}.qcow2", IMAGE_BYTES)
        hostel.start()
        disk = {"path": str(directory / f"{OURS}.qcow2"), "format": "qcow2"}
        disk_load.prepare(hostel, guest, words, disk)
        ours = partial(disk_load.run_ours, hostel, partial(daemons, hostel))
        sides: dict[str, Callable[[], Results]] = {OURS: ours}
        for machine in PEERS:
            sides[machine] = partial(run_peer, machine, guest, words, directory)
        return disk_load.run_rounds(sides, rounds)
    finally:
        hostel.end()
        shutil.rmtree(directory)


if __name__ == "__main__":
    sys.exit(disk_load.run("vhost_user", __doc__, measure, partial(disk_load.rows, peers=PEERS)))
