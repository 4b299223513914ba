# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a guest's disk delivers, and what that costs the host, against QEMU with its best settings.

A block device that is done at once (null_blk), past the page cache, so that the hypervisor is what
is measured: ours with its defaults and cache=none, QEMU's q35 and microvm with virtio-blk on PCI,
cache=none, aio=io_uring and an iothread. How is in bench/disk_load.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from bench import disk_load
from bench.common import Goal, Row
from bench.common import row as make_row
from bench.disk_load import MEMORY_MIB, OURS, Results, Samples
from bench.qemu import Peer
from lab.guests import Guest
from tests.support.hostel import Hostel

DEVICE: Final = Path("/dev/nullb0")
CASES: Final = (
    "randread,4096,1,1",
    "randwrite,4096,1,1",
    "randread,4096,32,1",
    "randwrite,4096,32,1",
    "randread,4096,32,2",
    "randwrite,4096,32,2",
    "read,1048576,8,1",
    "write,1048576,8,1",
)
VCPUS: Final = 2  # and so many queues
CLEARLY: Final = 1.15
PEERS: Final = ("q35", "microvm-pci")
PEER_DISK: Final = (
    *("-object", "iothread,id=io"),
    *("-device", f"virtio-blk-pci,drive=d,iothread=io,num-queues={VCPUS}"),
    *("-drive", f"if=none,id=d,format=raw,file={DEVICE},cache=none,aio=io_uring"),
)


def measure(guest: Guest, rounds: int, ms: int) -> Samples:
    """Measure every side once a round, on this host."""
    directory = Path(tempfile.mkdtemp(prefix="hb-"))
    hostel = Hostel(directory)
    words = disk_load.cmdline(CASES, ms)
    try:
        subprocess.run(["modprobe", "null_blk", "nr_devices=1", "gb=4"], check=True)
        hostel.start()
        disk_load.prepare(hostel, guest, words, {"path": str(DEVICE), "cache": "none"}, vcpus=VCPUS)
        sides: dict[str, Callable[[], Results]] = {OURS: partial(disk_load.run_ours, hostel)}
        for machine in PEERS:
            peer = Peer(
                machine, guest.kernel, guest.load, words, MEMORY_MIB, devices=PEER_DISK, cpus=VCPUS
            )
            sides[machine] = partial(disk_load.run_peer, peer)
        return disk_load.run_rounds(sides, rounds)
    finally:
        hostel.end()
        shutil.rmtree(directory)


def result(samples: Samples) -> list[Row]:
    """Compare with each peer, and count in how many rows we serve clearly more requests."""
    rows = disk_load.rows(samples, PEERS)
    requests = [row for row in rows if row.unit == "/s"]
    count = sum((row.ratio or 0) > CLEARLY for row in requests)
    return [
        *rows,
        make_row(
            f"rows of requests above {CLEARLY} of QEMU's",
            f"of {len(requests)}",
            count,
            goal=(Goal.AT_LEAST, len(requests) / 2),
        ),
    ]


if __name__ == "__main__":
    sys.exit(disk_load.run("blk", __doc__, measure, result))
