# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A Linux guest's network against QEMU microvm's: by vhost-net on both sides, and by tap on both.

Four guests with the same kernel and user space run at the same time, and are loaded one after the
other, round after round. guest/net_load.c is what loads them: it is one static file, so the guest
needs no libraries, and the same on both ends. On a host that cannot run stock kernels this takes a
run of the lab: its one CPU does the work of guest, VMM and load, so that a figure says what all of
them cost. There it is as noisy as the machine is busy; counting instructions instead of time, as
bench.boot does, is too slow for four guests at once.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from bench import rig
from bench.common import Goal, Row, interleave, medians, parser, progress, row
from bench.qemu import Peer
from lab.guests import Guest
from lab.hosteld import ROOT
from lab.rest import Console
from tests.support.hostel import Hostel

ROUNDS: Final = 5
LOAD_MS: Final = 1000
MEMORY_MIB: Final = 128
READY: Final = "net-load: ready"
BOOT_LIMIT_S: Final = 240.0
LOAD_LIMIT_S: Final = 60.0
CMDLINE: Final = "console=ttyS0 quiet reboot=k panic=-1"
# The address of the guest comes as a word of its command line.
INIT: Final = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /proc /sys
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do insmod "/modules/$module"; done < /modules/order
for word in $(cat /proc/cmdline); do
    case $word in load=*) ip addr add "${word#load=}/24" dev eth0 ;; esac
done
ip link set lo up
ip link set eth0 up
exec /bin/net-load serve
"""
# name -> unit, and whether more is better
CASES: Final = {
    "in": ("TCP to the guest", "MB/s", 1e-6, True),
    "out": ("TCP from the guest", "MB/s", 1e-6, True),
    "udp-in": ("UDP to the guest", "kpps", 1e-3, True),
    "udp-out": ("UDP from the guest", "kpps", 1e-3, True),
    "rtt": ("round trip", "us", 1.0, False),
}
BACKENDS: Final = ("vhost", "tap")

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Side:
    """One guest and the tap that leads to it; the last word of a name tells its back end."""

    name: str
    index: int

    @property
    def tap(self) -> str:
        """Its tap on the host."""
        return f"hbn{self.index}"

    @property
    def guest(self) -> str:
        """The guest's address."""
        return f"10.78.{self.index}.2"

    @property
    def host(self) -> str:
        """The host's."""
        return f"10.78.{self.index}.1"

    @property
    def backend(self) -> str:
        """Who moves its packets: vhost or tap."""
        return self.name.split()[-1]


def main() -> int:
    """Measure here or in the lab, and print the result."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    return rig.run("net", arguments, measure, result)


def measure(guest: Guest, options: argparse.Namespace) -> Samples:
    """Load every guest with every case once a round, on this host."""
    directory = Path(tempfile.mkdtemp(prefix="hb-"))
    try:
        program = directory / "net-load"
        source = ROOT / "guest" / "net_load.c"
        subprocess.run(["gcc", "-O2", "-static", "-o", program, source], check=True)
        initrd = directory / "initrd.img"
        files = {"init": INIT.encode(), "bin/net-load": program.read_bytes()}
        initrd.write_bytes(rig.initrd_with(guest, files))
        sides = [
            Side(f"{vmm} {backend}", number)
            for number, (vmm, backend) in enumerate(
                (vmm, backend) for backend in BACKENDS for vmm in ("hostel", "qemu")
            )
        ]
        with ExitStack() as stack:
            hostel = stack.enter_context(rig.hosteld(directory / "hostel", guest, initrd))
            for side in sides:
                start = _ours if side.name.startswith("hostel") else _peer
                stack.enter_context(start(hostel, side, guest, initrd))
                progress(f"{side.name} is up")
            cases: dict[str, Callable[[], float]] = {
                f"{side.name}/{case}": partial(_load, program, side, case)
                for case in CASES
                for side in sides
            }
            return interleave(cases, options.rounds)
    finally:
        shutil.rmtree(directory)


@contextmanager
def _ours(hostel: Hostel, side: Side, _guest: Guest, _initrd: Path) -> Iterator[None]:
    name = side.name.replace(" ", "-")
    vm = {
        "name": name,
        "memory_mib": MEMORY_MIB,
        "kernel": "debian",
        "initrd": "load",
        "cmdline": f"{CMDLINE} load={side.guest}",
        "nics": [{"id": "net0", "tap": side.tap, "backend": side.backend}],
        "rng": False,
        "start": True,
    }
    hostel.api.post("/v1/vms?wait=60", vm)
    Console(hostel.api, name).wait_for(READY, limit_s=BOOT_LIMIT_S)
    _address(side)
    yield


@contextmanager
def _peer(_hostel: Hostel, side: Side, guest: Guest, initrd: Path) -> Iterator[None]:
    vhost = "on" if side.backend == "vhost" else "off"
    devices = (
        *("-netdev", f"tap,id=n,ifname={side.tap},script=no,downscript=no,vhost={vhost}"),
        *("-device", f"virtio-net-pci,netdev=n,mac=02:00:00:00:78:{side.index:02x}"),
    )
    cmdline = f"{CMDLINE} load={side.guest}"
    peer = Peer("microvm-pci", guest.kernel, initrd, cmdline, MEMORY_MIB, devices=devices)
    with peer.running(READY.encode(), BOOT_LIMIT_S):
        _address(side)
        yield


def _address(side: Side) -> None:
    for words in (f"addr add {side.host}/24 dev {side.tap}", f"link set {side.tap} up"):
        subprocess.run(["ip", *words.split()], check=True)


def _load(program: Path, side: Side, case: str) -> float:
    argv = [program, case, side.guest, str(LOAD_MS)]
    run = subprocess.run(argv, stdout=subprocess.PIPE, timeout=LOAD_LIMIT_S, check=True)
    return float(run.stdout) * CASES[case][2]


def result(samples: Samples) -> list[Row]:
    """Compare each of our medians with QEMU's for the same back end."""
    middle = medians(samples)
    return [
        row(
            f"{title}, {backend}",
            unit,
            middle[f"hostel {backend}/{case}"],
            (f"qemu {backend}", middle[f"qemu {backend}/{case}"]),
            (Goal.RATIO_AT_LEAST if is_more_better else Goal.RATIO_AT_MOST, 1.0),
        )
        for case, (title, unit, _, is_more_better) in CASES.items()
        for backend in BACKENDS
    ]


if __name__ == "__main__":
    sys.exit(main())
