# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""How long a stock Debian kernel takes to its init, against QEMU's microvm and q35.

Ours counts from the POST that starts the VM, with hosteld warm, to init's write to the boot timer;
QEMU's from its exec to the same moment, seen on its serial port. On a host that cannot run stock
kernels this takes several runs of the lab, whose emulated CPU counts instructions instead of time,
so that its figures are nearly repeatable.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from bench.common import Goal, document, interleave, medians, parser, progress, row, show
from bench.qemu import Peer, copy_to
from lab.guests import Guest, find_guest
from lab.hosteld import ROOT
from lab.where import in_lab, lab_command, why_not_here
from tests.support.hostel import Hostel

ROUNDS = 7
# Five starts a round, and two before the first: a lab run stays at a dozen VM starts.
ROUNDS_PER_LAB = 2
LAB_RUN_LIMIT_S = 1800
BOOT_LIMIT_S = 120.0
POLL_S = 0.02
MEMORY_MIB = 256
GOAL_RATIO = 0.50
OURS = "hostel"
# quiet: a serial port costs an exit a byte, and nobody reads a boot log in production.
CMDLINE = "console=ttyS0 quiet reboot=k panic=-1"
# As the worker's log has it: local time, milliseconds.
TIMER_LINE = re.compile(r"^(\S+ \S+) .*code=boot_timer", re.MULTILINE)

Samples = dict[str, list[float]]


def main() -> int:
    """Measure here or in the lab, and print the result."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    arguments.add_argument("--samples", action="store_true", help="print raw samples as JSON")
    options = arguments.parse_args()
    guest = find_guest()
    if options.samples:
        print(json.dumps(measure(guest, options.rounds)))
        return 0
    reason = why_not_here()
    if reason is None:
        samples, tier = measure(guest, options.rounds), "lab" if in_lab() else "full"
    else:
        progress(f"not on this machine itself: {reason}; so in the lab")
        samples, tier = measure_in_labs(options.rounds), "lab"
    show(result(samples, tier), as_json=options.json)
    return 0


def measure_in_labs(rounds: int) -> Samples:
    """Gather the rounds over as many lab runs as it takes."""
    together: Samples = {}
    for first in range(0, rounds, ROUNDS_PER_LAB):
        count = min(ROUNDS_PER_LAB, rounds - first)
        inside = [sys.executable, "-m", "bench.boot", "--samples", "--rounds", str(count)]
        progress(f"lab run for rounds {first + 1} to {first + count} of {rounds}")
        run = subprocess.run(
            lab_command(inside, ["--icount"]),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            timeout=LAB_RUN_LIMIT_S,
            check=True,
        )
        for name, values in json.loads(run.stdout).items():
            together.setdefault(name, []).extend(values)
    return together


def measure(guest: Guest, rounds: int) -> Samples:
    """Measure every case once a round, on this host; in milliseconds."""
    directory = Path(tempfile.mkdtemp(prefix="hb-"))
    memory = Path(tempfile.mkdtemp(prefix="hb-", dir="/dev/shm"))
    hostel = Hostel(directory)
    try:
        hostel.start()
        prepare(hostel, guest)
        kernels = {
            "ELF by PVH": shutil.copy(unpacked_kernel(hostel), memory / "elf"),
            "bzImage": shutil.copy(guest.kernel, memory / "bzimage"),
        }
        program = copy_to(memory)
        initrd = shutil.copy(guest.instant, memory)
        cases: dict[str, Callable[[], float]] = {OURS: partial(boot_ours, hostel)}
        for machine in ("microvm", "q35"):
            for kind, kernel in kernels.items():
                peer = Peer(machine, kernel, initrd, CMDLINE, MEMORY_MIB, program=program)
                cases[f"{machine} {kind}"] = partial(boot_peer, peer, guest)
        # The first start of each side waits for disks, and time that is counted by instructions
        # runs away meanwhile.
        for name in (OURS, "microvm bzImage"):
            cases[name]()
        return interleave(cases, rounds)
    finally:
        hostel.end()
        shutil.rmtree(directory)
        shutil.rmtree(memory)


def prepare(hostel: Hostel, guest: Guest) -> None:
    """Import the files and create the VM that is started again and again."""
    api = hostel.api
    api.post("/v1/kernels?wait=60", {"name": "debian", "path": str(guest.kernel)})
    image = {"name": "instant", "kind": "initrd", "path": str(guest.instant)}
    api.post("/v1/images?wait=60", image)
    vm = {
        "name": "bench",
        "vcpus": 1,
        "memory_mib": MEMORY_MIB,
        "kernel": "debian",
        "initrd": "instant",
        "cmdline": CMDLINE,
        "rng": False,
    }
    api.post("/v1/vms?wait=60", vm)


def unpacked_kernel(hostel: Hostel) -> Path:
    """Return the ELF that hosteld made of the bzImage: QEMU gets the very same file."""
    for path in sorted(hostel.daemon.state_dir.glob("kernels/**/*")):
        if path.is_file():
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    return path
    raise FileNotFoundError(f"no unpacked kernel below {hostel.daemon.state_dir}")


def boot_peer(peer: Peer, guest: Guest) -> float:
    """Boot QEMU once; return the milliseconds from its exec to init."""
    return peer.boot_s(guest.instant_line.encode(), BOOT_LIMIT_S) * 1e3


def boot_ours(hostel: Hostel) -> float:
    """Start the VM once; return the milliseconds from sending the POST to init.

    boot_time_us counts from the moment that hosteld has understood the request. The worker's log is
    on the same clock as we are, so that the way into hosteld counts as well; and reading it costs
    the guest's processor less than asking the API over and over.
    """
    api = hostel.api
    log = hostel.daemon.state_dir / "vms" / api.vm("bench")["id"] / "worker.log"
    known = len(timer_stamps(log))
    began = time.time()
    api.act("bench", "start")
    while len(stamps := timer_stamps(log)) == known:
        if time.time() - began > BOOT_LIMIT_S:
            raise TimeoutError(f"no boot timer in {BOOT_LIMIT_S:g} s: {hostel.console('bench')}")
        time.sleep(POLL_S)
    took_ms = (stamps[-1] - began) * 1e3
    reported_ms = api.vm("bench")["boot_time_us"] / 1e3
    progress(f"{took_ms:.0f} ms from the POST, {reported_ms:.0f} ms as hosteld reports it")
    api.act("bench", "kill")
    return took_ms


def timer_stamps(log: Path) -> list[float]:
    """Return when a worker's log tells of its guest's boot timer, in seconds since 1970."""
    text = log.read_text() if log.exists() else ""
    form = "%Y-%m-%d %H:%M:%S,%f"
    return [datetime.strptime(stamp, form).timestamp() for stamp in TIMER_LINE.findall(text)]


def result(samples: Samples, tier: str) -> dict[str, Any]:
    """Compare our median with each of QEMU's."""
    middle = medians(samples)
    ours = middle.pop(OURS)
    fastest = min(middle.values())
    rows = [
        row(
            "POST to init" if value == fastest else "",
            "ms",
            ours,
            (f"qemu {name}", value),
            (Goal.RATIO_AT_MOST, GOAL_RATIO) if value == fastest else None,
        )
        for name, value in sorted(middle.items(), key=lambda item: item[1])
    ]
    return document("boot", tier, rows)


if __name__ == "__main__":
    sys.exit(main())
