# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Streams over vsock: ours by vhost-vsock and over Unix sockets, against QEMU's by vhost-vsock.

Three guests with the same kernel and user space run at the same time, and are loaded one after the
other, round after round, by the same code of the host: only the socket that it connects to differs.
On a host that cannot run stock kernels this takes a run of the lab: its one CPU does the work of
guest, VMM and load, so that a figure says what all of them cost.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from bench import rig
from bench.common import Goal, Row, interleave, medians, parser, progress, row
from bench.qemu import Peer
from lab.guests import Guest
from lab.rest import Console
from tests.support.hostel import Hostel
from tests.support.vsock_stream import connect, connect_by_vhost

ROUNDS: Final = 5
STREAM_MIB: Final = 8
PINGS: Final = 200
MEMORY_MIB: Final = 128
ECHO, DISCARD, FLOOD = 52, 53, 54
PEER_CID: Final = 501
OUR_CIDS: Final = {"vhost": 502, "unix": 503}
PEER_NAME: Final = "qemu vhost"
READY: Final = "vsock-load: ready"
BOOT_LIMIT_S: Final = 240.0
CMDLINE: Final = "console=ttyS0 quiet reboot=k panic=-1"
# The root disk has the driver and guest/vsock.c, and is only read.
INIT: Final = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /disk
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module"; done < /modules/order
until [ -b /dev/vda ]; do sleep 0.1; done
mount -t ext4 -o ro /dev/vda /disk
mount -t proc proc /disk/proc
chroot /disk modprobe vmw_vsock_virtio_transport
for server in 'echo {ECHO}' 'discard {DISCARD}' 'flood {FLOOD}'; do
    chroot /disk vsock $server > "/listening-${{server% *}}" &
done
until [ "$(cat /listening-* | wc -l)" = 3 ]; do sleep 0.1; done
echo '{READY}'
wait
"""

Dial = Callable[[int], socket.socket]
Samples = dict[str, list[float]]


def main() -> int:
    """Measure here or in the lab, and print the result."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    return rig.run("vsock", arguments, measure, result)


def measure(guest: Guest, options: argparse.Namespace) -> Samples:
    """Load every guest with every case once a round, on this host."""
    directory = Path(tempfile.mkdtemp(prefix="hb-"))
    try:
        initrd = directory / "initrd.img"
        initrd.write_bytes(rig.initrd_with(guest, {"init": INIT.encode()}))
        with ExitStack() as stack:
            hostel = stack.enter_context(rig.hosteld(directory / "hostel", guest, initrd))
            dials = {f"hostel {name}": _ours(hostel, guest, name) for name in OUR_CIDS}
            dials[PEER_NAME] = stack.enter_context(_peer(guest, initrd))
            cases: dict[str, Callable[[], float]] = {
                f"{name}/{case}": partial(load, dial)
                for case, (_, _, load) in CASES.items()
                for name, dial in dials.items()
            }
            return interleave(cases, options.rounds)
    finally:
        shutil.rmtree(directory)


# --- guests


def _ours(hostel: Hostel, guest: Guest, backend: str) -> Dial:
    """Start one of our guests; return how to connect to its ports."""
    vm = {
        "name": backend,
        "memory_mib": MEMORY_MIB,
        "kernel": "debian",
        "initrd": "load",
        "cmdline": CMDLINE,
        "disks": [{"id": "root", "path": str(guest.disk), "read_only": True}],
        "vsock": {"cid": OUR_CIDS[backend], "backend": backend},
        "rng": False,
        "start": True,
    }
    hostel.api.post("/v1/vms?wait=60", vm)
    Console(hostel.api, backend).wait_for(READY, limit_s=BOOT_LIMIT_S)
    progress(f"hostel {backend} is up")
    path = hostel.api.vm(backend)["vsock"]["path"]
    if path is None:
        return partial(connect_by_vhost, OUR_CIDS[backend])
    return partial(connect, Path(path))


@contextmanager
def _peer(guest: Guest, initrd: Path) -> Iterator[Dial]:
    """Run QEMU's guest; yield how to connect to its ports."""
    devices = (
        # Without QEMU's own lock, which would have nobody else read what our guests hold locked.
        *("-drive", f"if=none,id=d,format=raw,readonly=on,file={guest.disk},file.locking=off"),
        *("-device", "virtio-blk-pci,drive=d"),
        *("-device", f"vhost-vsock-pci,guest-cid={PEER_CID}"),
    )
    peer = Peer("microvm-pci", guest.kernel, initrd, CMDLINE, MEMORY_MIB, devices=devices)
    with peer.running(READY.encode(), BOOT_LIMIT_S):
        progress(f"{PEER_NAME} is up")
        yield partial(connect_by_vhost, PEER_CID)


# --- loads


def _to_guest(dial: Dial) -> float:
    """Send until the guest says that it has all of it; return MB/s."""
    data = bytes(1 << 20)
    with dial(DISCARD) as stream:
        began = time.monotonic()
        for _ in range(STREAM_MIB):
            stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)
        got = int(stream.recv(100))
        took_s = time.monotonic() - began
    if got != len(data) * STREAM_MIB:
        raise ValueError(f"the guest got {got} of {len(data) * STREAM_MIB} bytes")
    return got / took_s / 1e6


def _from_guest(dial: Dial) -> float:
    """Receive from a guest that sends without end; return MB/s."""
    buffer = bytearray(1 << 18)
    with dial(FLOOD) as stream:
        stream.recv_into(buffer)  # it has begun
        began, got = time.monotonic(), 0
        while got < STREAM_MIB << 20:
            count = stream.recv_into(buffer)
            if not count:
                raise ConnectionError(f"the guest ended after {got} bytes")
            got += count
        return got / (time.monotonic() - began) / 1e6


def _round_trip(dial: Dial) -> float:
    """Send a byte and wait for it to come back, again and again; return microseconds."""
    with dial(ECHO) as stream:
        began = time.monotonic()
        for _ in range(PINGS):
            stream.sendall(b"x")
            if not stream.recv(1):
                raise ConnectionError("the guest ended")
        return (time.monotonic() - began) / PINGS * 1e6


# name -> title, unit, load; what is in MB/s is better the more it is
CASES: Final = {
    "in": ("stream to the guest", "MB/s", _to_guest),
    "out": ("stream from the guest", "MB/s", _from_guest),
    "rtt": ("round trip of a byte", "us", _round_trip),
}


def result(samples: Samples) -> list[Row]:
    """Compare the medians of both our back ends with QEMU's."""
    middle = medians(samples)
    return [
        row(
            f"{title}, {backend}",
            unit,
            middle[f"hostel {backend}/{case}"],
            (PEER_NAME, middle[f"{PEER_NAME}/{case}"]),
            (Goal.RATIO_AT_LEAST if unit == "MB/s" else Goal.RATIO_AT_MOST, 1.0),
        )
        for case, (title, unit, _) in CASES.items()
        for backend in OUR_CIDS
    ]


if __name__ == "__main__":
    sys.exit(main())
