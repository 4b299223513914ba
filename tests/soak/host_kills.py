# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A guest writes, syncs and says so, until its whole host is killed: what it said is on the disk.

    python -m tests.soak.host_kills --rounds 50

Each round boots a lab whose extra disk is a file of this machine, and in it hosteld with a guest
that stamps that disk. The lab is ended by SIGKILL after a random time, and the file is held against
what had been told by then.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from lab.guests import find_guest
from lab.hosteld import ROOT
from lab.rest import Console
from lab.where import lab_command
from tests.support.hostel import Hostel
from tests.support.stamps import (
    LINE,
    NUMBERS_A_ROUND,
    blocks_told,
    check_disk,
    last_told,
    make_disk,
)

BOOT_LIMIT_S = 240.0
LONGEST_S = 3.0


def main() -> int:
    """Run rounds, or be the inner half of one."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=10)
    arguments.add_argument("--inside", type=int, metavar="FIRST", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.inside is not None:
        stamp(options.inside)
        return 0
    directory = Path(tempfile.mkdtemp(prefix="hostel-soak-"))
    try:
        run_rounds(directory / "stamped.raw", options.rounds)
    finally:
        shutil.rmtree(directory)
    return 0


def run_rounds(path: Path, rounds: int) -> None:
    """Kill the host once a round; what was told in any of them has to be there.

    Raises:
        AssertionError: a write is lost, or another block has changed.
    """
    make_disk(path)
    told: dict[int, int] = {}
    for number in range(rounds):
        first = number * NUMBERS_A_ROUND
        last = run_and_kill(path, first, random.uniform(0, LONGEST_S))
        told |= blocks_told(first, last)
        check_disk(path, told)
        print(f"round {number + 1} of {rounds}: {last - first + 1} writes told, none lost")
        sys.stdout.flush()


def run_and_kill(path: Path, first: int, after_s: float) -> int:
    """Boot a host, let its guest stamp for a while, kill the host; the last stamp told.

    Raises:
        RuntimeError: the guest told of none.
    """
    inside = [sys.executable, "-m", "tests.soak.host_kills", "--inside", str(first)]
    command = lab_command(inside, ["--disk", str(path)])
    text, killer = "", None
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as lab:
        assert lab.stdout is not None
        watchdog = threading.Timer(BOOT_LIMIT_S, lab.kill)
        watchdog.start()
        for line in lab.stdout:
            if killer is None and LINE.match(line):
                watchdog.cancel()
                killer = threading.Timer(after_s, kill_host, (lab.pid,))
                killer.start()
            text += line
        watchdog.cancel()
    if killer is None:
        raise RuntimeError(f"the guest stamped nothing: {text[-2000:]}")
    return last_told(text)


def kill_host(lab: int) -> None:
    """Kill the emulated host that a lab command runs."""
    children = Path(f"/proc/{lab}/task/{lab}/children").read_text().split()
    for pid in children:
        if "qemu-system" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(int(pid), signal.SIGKILL)


def stamp(first: int) -> None:
    """In the lab: run a guest that stamps the extra disk, and pass on what it tells, for ever."""
    guest = find_guest()
    (disk,) = [
        Path("/dev", block.name)
        for block in Path("/sys/block").glob("vd*")
        if (block / "serial").read_text().strip() == "disk"
    ]
    hostel = Hostel(Path(tempfile.mkdtemp(prefix="hs-")))
    hostel.start()
    api = hostel.api
    api.post("/v1/kernels?wait=60", {"name": "debian", "path": str(guest.kernel)})
    api.post("/v1/images?wait=60", {"name": "load", "kind": "initrd", "path": str(guest.load)})
    vm = {
        "name": "stamped",
        "kernel": "debian",
        "initrd": "load",
        "cmdline": f"console=ttyS0 quiet reboot=k panic=-1 hostel.stamp={first}",
        "memory_mib": 256,
        "rng": False,
        "disks": [{"id": "data", "path": str(disk)}],
        "start": True,
    }
    api.post("/v1/vms?wait=60", vm)
    console = Console(api, "stamped")
    at = 0
    while True:
        end = console.wait_for("\n", after=at, limit_s=BOOT_LIMIT_S)
        print(console.text[at:end].strip())
        sys.stdout.flush()
        at = end


if __name__ == "__main__":
    began = time.monotonic()
    status = main()
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(status)
