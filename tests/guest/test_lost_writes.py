# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A guest writes, syncs and says so, until its worker is killed: what it said is on the disk."""

from __future__ import annotations

import os
import random
import re
import signal
import struct
import time
from pathlib import Path

from lab.guests import Guest
from lab.rest import Console
from tests.support.hostel import Hostel

ROUNDS = 3
BLOCK_BYTES, SECTOR_BYTES = 4096, 512
DISK_BLOCKS = 1024
# As guest/blkload.c has it: the second and third quarter, every 31st block.
FIRST, COUNT, STRIDE = DISK_BLOCKS // 4, DISK_BLOCKS // 2, 31
UNTOUCHED = b"\xa5" * SECTOR_BYTES
BOOT_LIMIT_S = 240.0
# More than any guest writes in a round.
NUMBERS_A_ROUND = 1_000_000


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
    told = re.findall(r"stamped (\d+)\n", hostel.console("stamped").replace("\r", ""))
    return max(int(number) for number in told)


def check_disk(path: Path, told: dict[int, int]) -> None:
    """Hold every sector against what was told of its block."""
    content = path.read_bytes()
    assert len(content) == DISK_BLOCKS * BLOCK_BYTES
    for at in range(0, len(content), SECTOR_BYTES):
        block, sector = at // BLOCK_BYTES, content[at : at + SECTOR_BYTES]
        if block not in told and sector == UNTOUCHED:
            continue
        assert FIRST <= block < FIRST + COUNT, f"block {block} was never written"
        stamped_block, number = struct.unpack_from("<QQ", sector)
        assert sector == struct.pack("<QQ", block, number) * (SECTOR_BYTES // 16)
        assert stamped_block == FIRST + number * STRIDE % COUNT
        # Newer is fine: a write that was under way, or whose line was.
        assert number >= told.get(block, 0), f"block {block}: an acknowledged write is lost"


def test_what_a_guest_has_synced_outlives_its_worker(hostel: Hostel, guest: Guest) -> None:
    path = hostel.directory / "stamped.raw"
    path.write_bytes(UNTOUCHED * (DISK_BLOCKS * BLOCK_BYTES // SECTOR_BYTES))
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
            told |= {FIRST + n * STRIDE % COUNT: n for n in range(first, last + 1)}
            assert last >= first
            check_disk(path, told)
    finally:
        hostel.delete("stamped")
