# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a guest's disk delivers, and what that costs the host, against QEMU with its best settings.

The same Debian kernel and the same load (guest/blkload.c) on a block device that is done at once
(null_blk), past the page cache, so that the hypervisor is what is measured: ours with its defaults
and cache=none, QEMU's q35 and microvm with virtio-blk on PCI, cache=none, aio=io_uring and an
iothread. The CPU is that of the whole process, guest included, for each request. Rounds are
interleaved; the figures are ratios of medians.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench.common import Goal, Row, document, parser, progress, row, show
from bench.qemu import Peer
from lab.guests import Guest, find_guest
from lab.hosteld import ROOT
from lab.rest import Console
from lab.where import in_lab, lab_command, why_not_here
from tests.support.hostel import Hostel

ROUNDS: Final = 3
LAB_RUN_LIMIT_S: Final = 1800
BOOT_LIMIT_S: Final = 240.0
PEER_LIMIT_S: Final = 600.0
MEMORY_MIB: Final = 256
DEVICE: Final = Path("/dev/nullb0")
MS: Final = 2000
CASES: Final = (
    "randread,4096,1,1",
    "randwrite,4096,1,1",
    "randread,4096,32,1",
    "randwrite,4096,32,1",
    "read,1048576,8,1",
    "write,1048576,8,1",
)
OURS: Final = "hostel"
PEERS: Final = ("q35", "microvm-pci")
PEER_DISK: Final = (
    *("-object", "iothread,id=io", "-device", "virtio-blk-pci,drive=d,iothread=io"),
    *("-drive", f"if=none,id=d,format=raw,file={DEVICE},cache=none,aio=io_uring"),
)
GOAL_RATIO: Final = 1.0
LINE: Final = re.compile(r"^load (\S+): (\d+) requests in (\d+) ns$", re.MULTILINE)

# case -> metric -> values, one a round
Samples = dict[str, dict[str, list[float]]]


@dataclass
class Meter:
    """Reads a guest's console: requests a second, and the CPU that its process used meanwhile."""

    pid: int
    began: float = 0.0
    results: dict[str, tuple[float, float]] = field(default_factory=dict)

    def line(self, text: str) -> None:
        """Take one line of the console."""
        if text.startswith("begin "):
            self.began = cpu_s(self.pid)
        elif found := LINE.match(text):
            case, count, took_ns = found[1].rsplit(",", 1)[0], int(found[2]), int(found[3])
            cpu_us = (cpu_s(self.pid) - self.began) * 1e6
            self.results[case] = (count / took_ns * 1e9, cpu_us / max(count, 1))


def cpu_s(pid: int) -> float:
    """Seconds of CPU that all threads of a process have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def cmdline(ms: int) -> str:
    """Return the kernel's command line, which has the cases."""
    loads = " ".join(f"hostel.load={case},{ms}" for case in CASES)
    return f"console=ttyS0 quiet reboot=k panic=-1 {loads}"


def run_peer(peer: Peer) -> dict[str, tuple[float, float]]:
    """Run all cases in one QEMU guest.

    Raises:
        TimeoutError: it ended before its cases did, or was ended since it took too long.
    """
    with subprocess.Popen(
        peer.command(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        meter = Meter(process.pid)
        assert process.stdout is not None
        deadline = threading.Timer(PEER_LIMIT_S, process.kill)
        deadline.start()
        try:
            for text in process.stdout:
                meter.line(text.strip())
                if text.strip() == "load over":
                    return meter.results
        finally:
            deadline.cancel()
            process.kill()
    raise TimeoutError(f"{peer.machine}: only {', '.join(meter.results)} in {PEER_LIMIT_S:g} s")


def run_ours(hostel: Hostel) -> dict[str, tuple[float, float]]:
    """Run all cases in one guest of ours."""
    api = hostel.api
    path = "/v1/vms/bench/console/log?limit=1"
    offset = int(api.request("GET", path).headers["console-end-offset"])
    meter = Meter(api.act("bench", "start")["pid"])
    console = Console(api, "bench", offset)
    try:
        for text in follow(console):
            meter.line(text)
            if text == "load over":
                break
    finally:
        console.close()
    details = api.get("/v1/vms/bench/stats")["disk_details"]["data"]
    progress(f"{OURS} ran on {details['io_engine']}")
    api.act("bench", "kill")
    return meter.results


def follow(console: Console) -> Iterator[str]:
    """Yield a console's lines as they come.

    Raises:
        TimeoutError: nothing came for long.
    """
    at = 0
    while True:
        end = console.wait_for("\n", after=at, limit_s=BOOT_LIMIT_S)
        yield console.text[at : end - 1]
        at = end


def measure(guest: Guest, rounds: int, ms: int) -> Samples:
    """Measure every side once a round, on this host."""
    directory = Path(tempfile.mkdtemp(prefix="hb-"))
    hostel = Hostel(directory)
    samples: Samples = {}
    try:
        subprocess.run(["modprobe", "null_blk", "nr_devices=1", "gb=4"], check=True)
        hostel.start()
        prepare(hostel, guest, ms)
        sides: dict[str, Callable[[], dict[str, tuple[float, float]]]] = {
            OURS: partial(run_ours, hostel)
        }
        for machine in PEERS:
            peer = Peer(
                machine, guest.kernel, guest.load, cmdline(ms), MEMORY_MIB, devices=PEER_DISK
            )
            sides[machine] = partial(run_peer, peer)
        for number in range(rounds):
            for name, run in sides.items():
                began = time.monotonic()
                for case, (per_s, cpu_us) in run().items():
                    progress(f"round {number + 1} {name} {case}: {per_s:.6g}/s, {cpu_us:.4g} us")
                    kept = samples.setdefault(case, {})
                    kept.setdefault(f"{name} per_s", []).append(per_s)
                    kept.setdefault(f"{name} cpu_us", []).append(cpu_us)
                progress(f"round {number + 1} {name}: {time.monotonic() - began:.0f} s in all")
    finally:
        hostel.end()
        shutil.rmtree(directory)
    return samples


def prepare(hostel: Hostel, guest: Guest, ms: int) -> None:
    """Import the files and create the VM that is started again and again."""
    api = hostel.api
    api.post("/v1/kernels?wait=60", {"name": "debian", "path": str(guest.kernel)})
    image = {"name": "load", "kind": "initrd", "path": str(guest.load)}
    api.post("/v1/images?wait=60", image)
    vm = {
        "name": "bench",
        "memory_mib": MEMORY_MIB,
        "kernel": "debian",
        "initrd": "load",
        "cmdline": cmdline(ms),
        "rng": False,
        "disks": [{"id": "data", "path": str(DEVICE), "cache": "none"}],
    }
    api.post("/v1/vms?wait=60", vm)


def rows(samples: Samples) -> list[Row]:
    """Compare our medians with those of each peer: requests a second, then CPU for each."""
    metrics = (
        ("per_s", "requests", "/s", Goal.RATIO_AT_LEAST),
        ("cpu_us", "CPU a request", "us", Goal.RATIO_AT_MOST),
    )
    return [
        row(
            f"{case} {title}",
            unit,
            median(kept[f"{OURS} {metric}"]),
            (f"qemu {machine}", median(kept[f"{machine} {metric}"])),
            (goal, GOAL_RATIO),
        )
        for case, kept in samples.items()
        for metric, title, unit, goal in metrics
        for machine in PEERS
    ]


def main() -> int:
    """Measure here or in the lab, and print the result."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    arguments.add_argument("--ms", type=int, default=MS, help="length of each case")
    arguments.add_argument("--samples", action="store_true", help="print raw samples as JSON")
    options = arguments.parse_args()
    guest = find_guest()
    if options.samples:
        print(json.dumps(measure(guest, options.rounds, options.ms)))
        return 0
    if (reason := why_not_here()) is None:
        samples, tier = measure(guest, options.rounds, options.ms), "lab" if in_lab() else "full"
    else:
        progress(f"not on this machine itself: {reason}; so in the lab")
        samples, tier = measure_in_lab(options.rounds, options.ms), "lab"
    show(result(samples, tier), as_json=options.json)
    return 0


def measure_in_lab(rounds: int, ms: int) -> Samples:
    """Measure in one run of the lab."""
    inside = [sys.executable, "-m", "bench.blk", "--samples"]
    inside += ["--rounds", str(rounds), "--ms", str(ms)]
    command = lab_command(inside, ["-c", "1"])
    run = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, timeout=LAB_RUN_LIMIT_S, check=True
    )
    samples: Samples = json.loads(run.stdout)
    return samples


def result(samples: Samples, tier: str) -> dict[str, Any]:
    """Return the document."""
    return document("blk", tier, rows(samples))


if __name__ == "__main__":
    sys.exit(main())
