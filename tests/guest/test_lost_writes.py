# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A guest writes, syncs and says so, until its worker is killed: what it said is on the disk."""

from __future__ import annotations

import os
import random
import signal
import time

from lab.guests import Guest
from lab.rest import Console
from tests.support.hostel import Hostel
from tests.support.stamps import NUMBERS_A_ROUND, blocks_told, check_disk, last_told, make_disk

ROUNDS = 3
BOOT_LIMIT_S = 240.0


def run_and_kill(hostel: Hostel, first: int, after_s: float) -> int:
    """Start the guest, let it stamp for a while, kill its worker; the last stamp that it told."""
    path = "/v1/vms/stamped/console/log?limit=1"
    offset = int(hostel.api.request("GET", path).headers["console-end-offset"])
    cmdline = f"console=ttyS0 quiet reboot=k panic=-1 hostel.stamp={first}"
    hostel.api.call("PATCH", "/v1/vms/stamped", {"cmdline": cmdline})
    pid = hostel.api.act("stamped", "start")["pid"]
    console = Console(hostel.api, "stamped", offset)
    console.wait_for("\nstamped ", limit_s=BOOT_LIMIT_S)
    time.sleep(after_s)
    os.kill(pid, signal.SIGKILL)
    hostel.api.wait_state("stamped", "crashed")
    console.close()
    return last_told(hostel.console("stamped"))


def test_what_a_guest_has_synced_outlives_its_worker(hostel: Hostel, guest: Guest) -> None:
    path = hostel.directory / "stamped.raw"
    make_disk(path)
    hostel.api.post(
        "/v1/images?wait=60", {"name": "load", "kind": "initrd", "path": str(guest.load)}
    )
    hostel.api.post(
        "/v1/vms?wait=60",
        {
            "name": "stamped",
            "kernel": "debian",
            "initrd": "load",
            "memory_mib": 256,
            "rng": False,
            "disks": [{"id": "data", "path": str(path)}],
        },
    )
    told: dict[int, int] = {}
    try:
        for number in range(ROUNDS):
            first = number * NUMBERS_A_ROUND
            last = run_and_kill(hostel, first, random.uniform(0, 2))
            assert last >= first
            told |= blocks_told(first, last)
            check_disk(path, told)
    finally:
        hostel.delete("stamped")
