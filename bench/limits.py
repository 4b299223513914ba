# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""How much of a rate limit arrives: a real engine, the real clock, a driver that always has more.

A disk in memory; each limit in turn, after its burst is spent. `ours` is what was served a second,
by the clock at the driver; the peer is the limit. Needs nothing of the host; one that runs the
engine's thread more than a tenth of a second late loses what the burst cannot hold.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from bench.common import Goal, Row, document, interleave, medians, parser, row, show
from kvm_ffi.blk_engine import BlkEngine, BlkQueue, IoEngine
from kvm_ffi.eventfd import EventFd
from kvm_ffi.memory import GuestMemory
from kvm_ffi.rate_limiter import RateLimit, RateLimiter
from kvm_ffi.types import Gpa
from kvm_ffi.virtqueue import Virtqueue

LIMITS: Final = (50, 1_000, 20_000, 100_000)
ROUNDS: Final = 3
SECONDS: Final = 1.0
RING_SIZE: Final = 1024
SECTORS: Final = 8
POLL_S: Final = 0.001
DESC, AVAIL, USED, HEADER, STATUS, DATA = (0x1_0000 * place for place in range(1, 7))
# The spread that is promised: within 5 % of the limit.
LEAST, MOST = 0.95, 1.05


class Driver:
    """A ring that is refilled whenever it is looked at, with reads of one sector."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        chain = ((HEADER, 16, 1, 1), (DATA, 512, 3, 2), (STATUS, 1, 2, 0))
        memory.write(Gpa(DESC), b"".join(struct.pack("<QIHH", *entry) for entry in chain))
        self.queue = Virtqueue(memory, 0, RING_SIZE, Gpa(DESC), Gpa(AVAIL), Gpa(USED), 0)
        self.served = 0

    def refill(self) -> None:
        """Count what has come back, and make the ring full again."""
        (used,) = struct.unpack("<H", self._memory.read(Gpa(USED + 2), 2))
        self.served += (used - self.served) % 0x10000
        full = (self.served + RING_SIZE) % 0x10000
        self._memory.write(Gpa(AVAIL + 2), struct.pack("<H", full))


@dataclass(frozen=True, slots=True)
class Served:
    """Requests and the time that they took, from before the first one; and after the burst."""

    requests: int
    seconds: float
    steady_requests: int
    steady_seconds: float


def burst_of(ops_per_s: int) -> int:
    """Return what a limit without a burst of its own lets through at once."""
    return max(ops_per_s // 10, 1)


def serve(ops_per_s: int, seconds: float) -> Served:
    """Serve as much as a limit lets through, for some time after its burst."""
    began_s = time.monotonic()
    limiter = RateLimiter(RateLimit(ops_per_s=ops_per_s))
    with GuestMemory([(Gpa(0), 1 << 20)]) as memory:
        driver, kick, fault = Driver(memory), EventFd(), EventFd()
        disk = os.memfd_create("disk")
        os.truncate(disk, SECTORS * 512)
        engine = BlkEngine(
            memory, disk, size_sectors=SECTORS, read_only=True, serial=b"",
            queues=[BlkQueue(driver.queue, kick, None)], fault=fault, limiter=limiter,
            io_engine=IoEngine.THREADS,
        )  # fmt: skip
        thread = threading.Thread(target=engine.run)
        thread.start()
        try:
            _drive(driver, kick, lambda: driver.served > burst_of(ops_per_s))
            before, steady_s = driver.served, time.monotonic()
            _drive(driver, kick, lambda: time.monotonic() - steady_s >= seconds)
            now_s = time.monotonic()
            served = driver.served
            return Served(served, now_s - began_s, served - before, now_s - steady_s)
        finally:
            engine.stop()
            thread.join()
            engine.close()
            os.close(disk)
            kick.close()
            fault.close()


def _drive(driver: Driver, kick: EventFd, is_done: Callable[[], bool]) -> None:
    while not is_done():
        driver.refill()
        kick.signal()
        time.sleep(POLL_S)


def per_s(ops_per_s: int) -> float:
    """Return how many requests a second a limit lets through, its burst left out."""
    served = serve(ops_per_s, SECONDS)
    return served.steady_requests / served.steady_seconds


def rows(samples: dict[str, list[float]]) -> list[Row]:
    """Judge the medians, and the round that had most."""
    middle = medians(samples)
    found = []
    for limit in LIMITS:
        peer, name = ("the limit", float(limit)), str(limit)
        least, most = (Goal.RATIO_AT_LEAST, LEAST), (Goal.RATIO_AT_MOST, MOST)
        found.append(row(f"limit {limit}/s", "/s", middle[name], peer, least))
        found.append(row(f"limit {limit}/s, most of a round", "/s", max(samples[name]), peer, most))
    return found


def main() -> int:
    """Measure, and print the result."""
    options = parser(__doc__).parse_args()
    samples = interleave({str(limit): partial(per_s, limit) for limit in LIMITS}, ROUNDS)
    show(document("limits", "direct", rows(samples)), as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
