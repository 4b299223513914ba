# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The disk that guest/blkload.c stamps: what it holds before, and what it has to hold after."""

from __future__ import annotations

import re
import struct
from pathlib import Path

BLOCK_BYTES, SECTOR_BYTES = 4096, 512
DISK_BLOCKS = 1024
# As guest/blkload.c has it: the second and third quarter, every 31st block.
FIRST, COUNT, STRIDE = DISK_BLOCKS // 4, DISK_BLOCKS // 2, 31
UNTOUCHED = b"\xa5" * SECTOR_BYTES
# More than any guest writes in a round.
NUMBERS_A_ROUND = 1_000_000
LINE = re.compile(r"stamped (\d+)$", re.MULTILINE)


def make_disk(path: Path) -> None:
    """Write a disk that nobody has stamped."""
    path.write_bytes(UNTOUCHED * (DISK_BLOCKS * BLOCK_BYTES // SECTOR_BYTES))


def last_told(text: str) -> int:
    """Return the last stamp that a console tells of."""
    return max(int(number) for number in LINE.findall(text.replace("\r", "")))


def blocks_told(first: int, last: int) -> dict[int, int]:
    """Return which block has at least which stamp, when those from first to last were told."""
    return {FIRST + number * STRIDE % COUNT: number for number in range(first, last + 1)}


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
