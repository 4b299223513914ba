# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a running VM costs its host beyond the guest's own RAM, against QEMU's microvm.

Proportional set size (PSS) of the process that runs the VM, without the mapping of guest RAM: one
worker alone, and each of 20, with Linux guests of 1 vCPU and 128 MiB that are idle until nothing
changes any more. What all workers share is there once, with no VM too, and is a row of its own.
Runs in the lab where this machine cannot run stock kernels.
"""

from __future__ import annotations

import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from bench.common import Goal, Row, document, parser, progress, row, show
from bench.qemu import RAM_NAME, Peer, warm_up
from lab.guests import Guest, find_guest
from lab.hosteld import ROOT
from lab.where import in_lab, lab_command, why_not_here
from tests.support.hostel import Hostel, spare_of, zygote_of

COUNT: Final = 20
MEMORY_MIB: Final = 128
LAB_MEMORY_MIB: Final = 8192
BOOT_LIMIT_S: Final = 300.0
# A worker gives memory back half a minute after its start, some milliseconds at a time: on an
# emulated host that takes minutes.
IDLE_S: Final = 45.0
SETTLED: Final = 0.99
MAX_LOOKS: Final = 10
LAB_RUN_LIMIT_S: Final = 3600
PEER_ATTEMPTS: Final = 3
CMDLINE: Final = "console=ttyS0 quiet reboot=k panic=-1"
ALONE_GOAL_MIB: Final = 5.0
MANY_GOAL_MIB: Final = 4.0
RATIO_GOAL: Final = 0.10
OUR_RAM: Final = "memfd:hostel-ram"
OUR_IMAGE: Final = "memfd:hostel-heap"
# A mapping's first line in smaps: address range, permissions, offset, device, inode, name.
MAPPING: Final = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+\s*(.*)$")


def main() -> int:
    """Measure here or in the lab, and print the result."""
    arguments = parser(__doc__)
    arguments.add_argument("--count", type=int, default=COUNT, help="how many VMs are many")
    options = arguments.parse_args()
    guest = find_guest()
    reason = why_not_here()
    if reason is not None:
        progress(f"not on this machine itself: {reason}; so in the lab")
        inside = [sys.executable, "-m", "bench.memory", "--count", str(options.count)]
        inside += ["--json"] if options.json else []
        command = lab_command(inside, ["-m", str(LAB_MEMORY_MIB)])
        return subprocess.run(command, cwd=ROOT, timeout=LAB_RUN_LIMIT_S, check=False).returncode
    rows = measure(guest, options.count)
    show(document("memory", "lab" if in_lab() else "full", rows), as_json=options.json)
    return 0


def measure(guest: Guest, count: int) -> list[Row]:
    """Measure both sides on this host."""
    alone, many, once = measure_ours(guest, count)
    peer_alone, peer_many = measure_qemu(guest, count)
    return [
        *_rows("1 VM: PSS beyond guest RAM", alone, peer_alone, ALONE_GOAL_MIB),
        *_rows(f"each of {count} VMs", many, peer_many, MANY_GOAL_MIB),
        row("once a host, at most: zygote, image and spare worker", "MiB", once),
    ]


def _rows(case: str, ours: float, peer: float, limit_mib: float) -> list[Row]:
    return [
        row(case, "MiB", ours, goal=(Goal.AT_MOST, limit_mib)),
        row(case, "MiB", ours, ("qemu microvm", peer), (Goal.RATIO_AT_MOST, RATIO_GOAL)),
    ]


def measure_ours(guest: Guest, count: int) -> tuple[float, float, float]:
    """Return the MiB of one worker alone, the median of many, and what they share."""
    directory = Path(tempfile.mkdtemp(prefix="hb-"))
    hostel = Hostel(directory)
    api = hostel.api
    try:
        hostel.start()
        api.post("/v1/kernels?wait=60", {"name": "debian", "path": str(guest.kernel)})
        image = {"name": "instant", "kind": "initrd", "path": str(guest.instant)}
        api.post("/v1/images?wait=60", image)
        pids = [_start(hostel, f"idle-{number}") for number in range(1)]
        (alone,) = settled(pids, OUR_RAM)
        progress(f"one worker: {alone:.2f} MiB")
        pids += [_start(hostel, f"idle-{number}") for number in range(1, count)]
        many = settled(pids, OUR_RAM)
        progress(f"{count} workers: {min(many):.2f} to {max(many):.2f} MiB")
        return alone, statistics.median(many), shared_mib(hostel)
    finally:
        hostel.end()
        shutil.rmtree(directory)


def shared_mib(hostel: Hostel) -> float:
    """Return the PSS of zygote and spare, and the image's size; some of it is counted twice so."""
    zygote, spare = (Path("/proc", str(pid)) for pid in (zygote_of(hostel), spare_of(hostel)))
    rollups = [(process / "smaps_rollup").read_text() for process in (zygote, spare)]
    pss = [int(re.findall(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[0]) for text in rollups]
    images = [fd for fd in (zygote / "fd").iterdir() if OUR_IMAGE in fd.readlink().name]
    return sum(pss) / 1024 + sum(fd.stat().st_blocks for fd in images) * 512 / (1 << 20)


def _start(hostel: Hostel, name: str) -> int:
    """Boot a guest until its init waits; return its worker's process id."""
    vm = {
        "name": name,
        "memory_mib": MEMORY_MIB,
        "kernel": "debian",
        "initrd": "instant",
        "cmdline": CMDLINE,
        "start": True,
    }
    hostel.api.post("/v1/vms?wait=60", vm)
    claim = "through its boot"
    up = hostel.api.wait_vm(name, lambda vm: vm["boot_time_us"] is not None, claim, BOOT_LIMIT_S)
    return int(up["pid"])


def measure_qemu(guest: Guest, count: int) -> tuple[float, float]:
    """Return the MiB of one QEMU alone, and the median of many."""
    peer = Peer("microvm", guest.kernel, guest.instant, CMDLINE, MEMORY_MIB, has_named_ram=True)
    marker = guest.instant_line.encode()
    warm_up(guest.kernel, guest.instant)
    with ExitStack() as stack:
        pids = [_start_peer(peer, marker, stack)]
        (alone,) = settled(pids, RAM_NAME)
        progress(f"one QEMU: {alone:.2f} MiB")
        for _ in range(1, count):
            pids.append(_start_peer(peer, marker, stack))
        many = settled(pids, RAM_NAME)
        progress(f"{count} QEMUs: {min(many):.2f} to {max(many):.2f} MiB")
        return alone, statistics.median(many)


def _start_peer(peer: Peer, marker: bytes, stack: ExitStack) -> int:
    """Boot a guest of QEMU; return its process id."""
    for _ in range(PEER_ATTEMPTS - 1):
        try:
            return stack.enter_context(peer.running(marker, BOOT_LIMIT_S))[0]
        except TimeoutError as err:
            # On an emulated host a guest's kernel panics now and then.
            progress(f"once more: {err}")
    return stack.enter_context(peer.running(marker, BOOT_LIMIT_S))[0]


def settled(pids: Sequence[int], ram_name: str) -> list[float]:
    """Wait until idle processes have become no smaller for a while; return their sizes in MiB."""
    sizes = [math.inf]
    for _ in range(MAX_LOOKS):
        before = sum(sizes)
        time.sleep(IDLE_S)
        sizes = [beyond_ram_mib(pid, ram_name) for pid in pids]
        if sum(sizes) > SETTLED * before:
            break
    return sizes


def beyond_ram_mib(pid: int, ram_name: str) -> float:
    """Return a process's proportional memory without guest RAM, in MiB.

    Raises:
        ValueError: it has no mapping of guest RAM of that name.
    """
    return sum_pss(Path(f"/proc/{pid}/smaps").read_text(), ram_name) / 1024


def sum_pss(smaps: str, ram_name: str) -> int:
    """Add up the KiB of every mapping whose name does not hold ``ram_name``."""
    total, is_ram, has_ram = 0, False, False
    for line in smaps.splitlines():
        if mapping := MAPPING.match(line):
            is_ram = ram_name in mapping[1]
            has_ram |= is_ram
        elif line.startswith("Pss:") and not is_ram:
            total += int(line.split()[1])
    if not has_ram:
        raise ValueError(f"no mapping named {ram_name}")
    return total


if __name__ == "__main__":
    sys.exit(main())
