# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Walks the C ring and the slow model of it through millions of random steps, side by side.

    python -m tests.fuzz.ring_walk --steps 2000000

Some drivers write garbage, and their rings break within steps. Others keep to the rules for
thousands of steps with a slip now and then, so that indices wrap around and rings are full or
empty. Whatever differs ends the walk with the seed and the step that show it again.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import time
from dataclasses import dataclass
from typing import Final

from kvm_ffi.memory import GuestMemory
from kvm_ffi.types import Gpa
from tests.support.virtqueue_model import INDIRECT, NEXT, WRITE
from tests.support.virtqueue_pair import (
    DESC,
    HIGH_GPA,
    HIGH_SIZE,
    INTERESTING,
    KINDS,
    LOW_SIZE,
    TABLE,
    USED,
    Rings,
    Step,
)

SIZES: Final = (1, 2, 4, 8)
TABLE_ENTRIES: Final = 4
GARBAGE_STEPS: Final = 60
HONEST_STEPS: Final = 5000
HONEST_SHARE: Final = 0.03  # of the rings; of the steps it is most
SLIP_EVERY: Final = 2000  # steps of an honest driver
COMPARE_EVERY: Final = 64
STEPS_AFTER_BREAK: Final = 4
HONEST_KINDS: Final = ("offer", "offer", "offer", *(kind for kind in KINDS if kind in
                       ("pop", "use", "publish", "unpop", "kick", "event", "flags")))  # fmt: skip


@dataclass
class Walked:
    """What a walk has seen."""

    seed: int
    steps: int = 0
    rings: int = 0
    chains: int = 0
    broken: int = 0
    wraps: int = 0

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.steps:,} steps of {self.rings:,} rings, {self.chains:,} "
            f"chains, {self.broken:,} rings broken, {self.wraps:,} wraps of the 16-bit index"
        )


class Driver:
    """A driver of one ring, honest or not, and what its device does."""

    def __init__(self, dice: random.Random, memory: GuestMemory) -> None:
        self._dice = dice
        self.is_honest = dice.random() < HONEST_SHARE
        self.has_indirect = dice.random() < 0.5
        self.rings = Rings.make(
            memory, dice.choice(SIZES), event_idx=dice.random() < 0.5, indirect=self.has_indirect
        )
        self.size = self.rings.real.size
        self.avail_idx = 0
        if dice.random() < 0.5:
            self.avail_idx = dice.randrange(0xFF00, 0x10000)
            self.rings.start_at(self.avail_idx)
        self._fill()

    def _fill(self) -> None:
        make = self._honest_table if self.is_honest else self._garbage_table
        self.rings.poke(TABLE, make(TABLE_ENTRIES, is_first=False))
        self.rings.poke(DESC, make(self.size, is_first=True))

    def _honest_table(self, count: int, *, is_first: bool) -> bytes:
        """Chains that run on to the next entry, readable before writable, and end in time."""
        table = b""
        n_readable = self._dice.randrange(count + 1)
        for index in range(count):
            if is_first and self.has_indirect and self._dice.random() < 0.2:
                length = 16 * self._dice.randint(1, min(self.size, TABLE_ENTRIES))
                # The whole of the table, or an entry of it that runs on is cut off: both happen.
                table += struct.pack("<QIHH", TABLE, length, INDIRECT, 0)
                continue
            flags = 0 if index < n_readable else WRITE
            if index + 1 < count and self._dice.random() < 0.5:
                flags |= NEXT
            gpa = self._dice.choice((0x900, 0x1000, HIGH_GPA))
            table += struct.pack("<QIHH", gpa, self._dice.randrange(0x400), flags, index + 1)
        return table

    def _garbage_table(self, count: int, *, is_first: bool) -> bytes:
        dice = self._dice
        return b"".join(
            struct.pack(
                "<QIHH",
                dice.choice((dice.choice(INTERESTING), dice.randrange(LOW_SIZE))),
                dice.choice((0, 1, 16, 32, 48, 17, 0x1000, 0xFFFFFFFF, dice.randrange(64))),
                dice.choice((0, 1, 1, 1, 2, 3, 3, 4, 4, 5, 6, 7, 0xFFF8, 0xFFFF)),
                dice.choice((dice.randrange(9), dice.randrange(9), 0xFFFF)),
            )
            for _ in range(count)
        )

    @property
    def n_steps(self) -> int:
        return self._dice.randrange(1, HONEST_STEPS if self.is_honest else GARBAGE_STEPS)

    def step(self) -> None:
        dice = self._dice
        kinds = HONEST_KINDS if self.is_honest else KINDS
        if self.is_honest and dice.randrange(SLIP_EVERY) == 0:
            kinds = KINDS
        kind = dice.choice(kinds)
        if kind == "offer":
            self._offer()
            return
        value = dice.choice((dice.randrange(10), dice.randrange(0x10000)))
        if kind in ("event", "idx") and dice.random() < 0.8:
            # Near where the ring is: elsewhere all values do the same.
            value = (self.rings.model.next_avail + dice.randrange(-9, 10)) % 0x10000
        self.rings.take(Step(kind, dice.randrange(8), value))

    def _offer(self) -> None:
        """As many more as a driver has descriptors for, at most."""
        (used_idx,) = struct.unpack("<H", self.rings.model.memory.read(USED + 2, 2))
        if (self.avail_idx - used_idx) % 0x10000 >= self.size:
            return
        self.rings.drive(Step("ring", self.avail_idx % self.size, self._dice.randrange(self.size)))
        self.avail_idx = (self.avail_idx + 1) % 0x10000
        self.rings.drive(Step("idx", 0, self.avail_idx))


def _walk_ring(dice: random.Random, memory: GuestMemory, done: Walked, limit: int) -> None:
    """One ring until it is broken or old, at most to `limit` steps of the whole walk."""
    driver = Driver(dice, memory)
    done.rings += 1
    left = min(driver.n_steps, limit - done.steps)
    while left > 0:
        before = driver.rings.model.next_avail
        was_broken = driver.rings.model.is_broken
        driver.step()
        done.steps += 1
        left -= 1
        after = driver.rings.model.next_avail
        done.chains += (after - before) % 0x10000 == 1
        done.wraps += (before, after) == (0xFFFF, 0)
        if driver.rings.model.is_broken and not was_broken:
            done.broken += 1
            left = min(left, STEPS_AFTER_BREAK)
        if done.steps % COMPARE_EVERY == 0:
            driver.rings.compare()
    driver.rings.compare()


def walk(memory: GuestMemory, seed: int, steps: int) -> Walked:
    """Go on until so many steps were compared.

    Args:
        memory: with the regions LOW and HIGH of tests.support.virtqueue_pair.

    Raises:
        AssertionError: the C ring and the model differ; it names the seed and the step.
    """
    dice = random.Random(seed)
    done = Walked(seed)
    try:
        while done.steps < steps:
            _walk_ring(dice, memory, done, steps)
    except BaseException as err:
        err.add_note(f"ring walk: seed {seed}, step {done.steps}, ring {done.rings}")
        raise
    return done


def main(argv: list[str]) -> int:
    """Walk, and print how far."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=2_000_000)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    options = parser.parse_args(argv)
    seed = time.time_ns() % 1_000_000_000 if options.seed is None else options.seed
    print(f"ring walk: seed {seed}", flush=True)
    with GuestMemory([(Gpa(0), LOW_SIZE), (Gpa(HIGH_GPA), HIGH_SIZE)]) as memory:
        print(walk(memory, seed, options.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
