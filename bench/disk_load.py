# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What the disk benchmarks share: one load in a guest of ours and in QEMU's, and what it costs.

The same Debian kernel and the same load (guest/blkload.c) on each side. The CPU is that of all
processes that serve the guest, the guest included, for each request. Rounds are interleaved; the
figures are ratios of medians.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

from bench import rig
from bench.common import Goal, Row, parser, progress, row
from bench.qemu import Peer
from lab.guests import Guest
from lab.rest import Console, Json
from tests.support.hostel import Hostel

ROUNDS: Final = 3
BOOT_LIMIT_S: Final = 240.0
PEER_LIMIT_S: Final = 600.0
MEMORY_MIB: Final = 256
MS: Final = 2000
OURS: Final = "hostel"
NAME: Final = "bench"  # of our VM
DISK: Final = "data"  # and its disk
GOAL_RATIO: Final = 1.0
LINE: Final = re.compile(r"^load (\S+): (\d+) requests in (\d+) ns$", re.MULTILINE)

# case -> (requests a second, microseconds of CPU for each)
Results = dict[str, tuple[float, float]]
# case -> metric -> values, one a round
Samples = dict[str, dict[str, list[float]]]


@dataclass
class Meter:
    """Reads a guest's console: requests a second, and the CPU that its processes used meanwhile."""

    pids: Sequence[int]
    began: float = 0.0
    results: Results = field(default_factory=dict)

    def line(self, text: str) -> None:
        """Take one line of the console."""
        if text.startswith("begin "):
            self.began = self._cpu_s()
        elif found := LINE.match(text):
            case, count, took_ns = found[1].rsplit(",", 1)[0], int(found[2]), int(found[3])
            cpu_us = (self._cpu_s() - self.began) * 1e6
            self.results[case] = (count / took_ns * 1e9, cpu_us / max(count, 1))

    def _cpu_s(self) -> float:
        return sum(cpu_s(pid) for pid in self.pids)


def cpu_s(pid: int) -> float:
    """Seconds of CPU that all threads of a process have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def cmdline(cases: Sequence[str], ms: int) -> str:
    """Return the kernel's command line, which has the cases."""
    loads = " ".join(f"hostel.load={case},{ms}" for case in cases)
    return f"console=ttyS0 quiet reboot=k panic=-1 {loads}"


def run_peer(peer: Peer, *others: int) -> Results:
    """Run all cases in one QEMU guest; ``others`` are processes that serve it besides.

    Raises:
        TimeoutError: it ended before its cases did, or was ended since it took too long.
    """
    with subprocess.Popen(
        peer.command(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        meter = Meter((process.pid, *others))
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


def run_ours(hostel: Hostel, others: Callable[[], Sequence[int]] = tuple) -> Results:
    """Run all cases in one guest of ours; ``others`` finds processes that serve it besides."""
    api = hostel.api
    path = f"/v1/vms/{NAME}/console/log?limit=1"
    offset = int(api.request("GET", path).headers["console-end-offset"])
    pid = api.act(NAME, "start")["pid"]
    meter = Meter((pid, *others()))
    console = Console(api, NAME, offset)
    try:
        for text in _follow(console):
            meter.line(text)
            if text == "load over":
                break
    finally:
        console.close()
    details = api.get(f"/v1/vms/{NAME}/stats")["disk_details"].get(DISK)
    if details is not None:
        progress(f"{OURS} ran on {details['io_engine']}")
    api.act(NAME, "kill")
    return meter.results


def _follow(console: Console) -> Iterator[str]:
    """Yield a console's lines as they come.

    Raises:
        TimeoutError: nothing came for long.
    """
    at = 0
    while True:
        end = console.wait_for("\n", after=at, limit_s=BOOT_LIMIT_S)
        yield console.text[at : end - 1]
        at = end


def prepare(hostel: Hostel, guest: Guest, words: str, disk: Json, *, vcpus: int = 1) -> None:
    """Import the files and create the VM that is started again and again."""
    api = hostel.api
    api.post("/v1/kernels?wait=60", {"name": "debian", "path": str(guest.kernel)})
    image = {"name": "load", "kind": "initrd", "path": str(guest.load)}
    api.post("/v1/images?wait=60", image)
    vm = {
        "name": NAME,
        "vcpus": vcpus,
        "memory_mib": MEMORY_MIB,
        "kernel": "debian",
        "initrd": "load",
        "cmdline": words,
        "rng": False,
        "disks": [{"id": DISK, **disk}],
    }
    api.post("/v1/vms?wait=60", vm)


def run_rounds(sides: Mapping[str, Callable[[], Results]], rounds: int) -> Samples:
    """Measure every side once a round."""
    samples: Samples = {}
    for number in range(rounds):
        for name, run in sides.items():
            began = time.monotonic()
            for case, (per_s, cpu_us) in run().items():
                progress(f"round {number + 1} {name} {case}: {per_s:.6g}/s, {cpu_us:.4g} us")
                kept = samples.setdefault(case, {})
                kept.setdefault(f"{name} per_s", []).append(per_s)
                kept.setdefault(f"{name} cpu_us", []).append(cpu_us)
            progress(f"round {number + 1} {name}: {time.monotonic() - began:.0f} s in all")
    return samples


def rows(samples: Samples, peers: Sequence[str]) -> list[Row]:
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
        for machine in peers
    ]


def run(
    name: str,
    description: str | None,
    measure: Callable[[Guest, int, int], Samples],
    rows: Callable[[Samples], list[Row]],
) -> int:
    """Measure here or in the lab, and print the result.

    Args:
        name: of the benchmark, and of its module.
        description: for --help.
        measure: called with the guest, the number of rounds, and the length of each case in ms.
        rows: makes the result of them.
    """
    arguments = parser(description)
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    arguments.add_argument("--ms", type=int, default=MS, help="length of each case")
    return rig.run(
        name,
        arguments,
        lambda guest, options: measure(guest, options.rounds, options.ms),
        rows,
    )
