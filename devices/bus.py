# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Address ranges and who serves them: one Bus for port I/O, one for MMIO.

C serves what it can (kvm_ffi's exit table); only accesses to ranges that were claimed here come
to Python at all.
"""

from __future__ import annotations

import bisect
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvm_ffi.errors import GuestError

from .ratelimit import GuestLog

log = logging.getLogger(__name__)


class BusDevice(Protocol):
    """A handler of one address range.

    Offsets, lengths and values are guest-controlled: any offset inside the range, any length
    that does not leave it. A handler may raise GuestError; the bus logs it and answers all ones.
    """

    def read(self, offset: int, length: int) -> int:
        """Return the value of ``length`` bytes at ``offset``, little-endian."""
        ...

    def write(self, offset: int, length: int, value: int) -> None:
        """Take ``length`` bytes, little-endian in ``value``, at ``offset``."""
        ...


def all_ones(length: int) -> int:
    """Return what an access of ``length`` bytes to nothing reads."""
    return (1 << (8 * length)) - 1


@dataclass(frozen=True)
class AddressWindow:
    """A range of guest-physical addresses, e.g. what BARs may be placed in."""

    base: int
    size_bytes: int

    def __post_init__(self) -> None:
        if self.base < 0 or self.size_bytes <= 0:
            raise ValueError(f"window base={self.base:#x} size={self.size_bytes:#x}: empty")

    def contains(self, base: int, size_bytes: int) -> bool:
        """Whether the whole range lies inside."""
        return self.base <= base and base + size_bytes <= self.base + self.size_bytes


@dataclass(frozen=True)
class _Range:
    base: int
    length: int
    handler: BusDevice

    @property
    def end(self) -> int:
        return self.base + self.length


@dataclass(frozen=True)
class _Map:
    """One immutable picture of the bus, so that vCPU threads look ranges up without a lock."""

    bases: tuple[int, ...]
    ranges: tuple[_Range, ...]


def _ignore_range(base: int, length: int) -> None:
    pass


class Bus:
    """Address range to handler; overlap is refused.

    Args:
        name: "pio" or "mmio", for log lines and errors.
        claim: told of each range added, e.g. ExitTable.claim_pio.
        unclaim: told of each range removed.

    Threads: read() and write() from any vCPU thread, without a lock; add() and remove() from
    any thread, serialised by a lock of the bus.
    """

    def __init__(
        self,
        name: str,
        claim: Callable[[int, int], object] = _ignore_range,
        unclaim: Callable[[int, int], object] = _ignore_range,
    ) -> None:
        self.name = name
        self._claim = claim
        self._unclaim = unclaim
        self._map = _Map((), ())
        self._lock = threading.Lock()
        self._guest_log = GuestLog(log)

    def add(self, base: int, length: int, handler: BusDevice) -> None:
        """Let ``handler`` serve ``length`` bytes from ``base``.

        Raises:
            ValueError: the range is empty, negative, or overlaps one that is already there.
        """
        if base < 0 or length <= 0:
            raise ValueError(f"{self.name}: base={base:#x} length={length:#x}: empty range")
        new = _Range(base, length, handler)
        with self._lock:
            for old in self._map.ranges:
                if new.base < old.end and old.base < new.end:
                    raise ValueError(
                        f"{self.name}: {_describe(new)} overlaps {_describe(old)}",
                    )
            self._claim(base, length)
            self._replace((*self._map.ranges, new))

    def remove(self, base: int) -> None:
        """Take away the range that starts at ``base``.

        Raises:
            ValueError: no range starts there.
        """
        with self._lock:
            gone = next((r for r in self._map.ranges if r.base == base), None)
            if gone is None:
                raise ValueError(f"{self.name}: no range starts at {base:#x}")
            self._replace(tuple(r for r in self._map.ranges if r is not gone))
            self._unclaim(base, gone.length)

    def read(self, address: int, length: int) -> int:
        """Return what the guest reads; all ones where nobody answers. Never raises GuestError."""
        found = self._find(address, length)
        if found is None:
            return all_ones(length)
        try:
            return found.handler.read(address - found.base, length) & all_ones(length)
        except GuestError as err:
            self._guest_log.warning("bad read bus=%s address=%#x: %s", self.name, address, err)
            return all_ones(length)

    def write(self, address: int, length: int, value: int) -> None:
        """Hand a guest write to its handler, or drop it. Never raises GuestError."""
        found = self._find(address, length)
        if found is None:
            return
        try:
            found.handler.write(address - found.base, length, value & all_ones(length))
        except GuestError as err:
            self._guest_log.warning("bad write bus=%s address=%#x: %s", self.name, address, err)

    def _find(self, address: int, length: int) -> _Range | None:
        current = self._map
        index = bisect.bisect_right(current.bases, address) - 1
        if index < 0:
            return None
        candidate = current.ranges[index]
        # An access that leaves its range would need two handlers; hardware answers it with
        # garbage, we with all ones, so that no handler has to think of it.
        return candidate if address + length <= candidate.end else None

    def _replace(self, ranges: tuple[_Range, ...]) -> None:
        ordered = tuple(sorted(ranges, key=lambda r: r.base))
        self._map = _Map(tuple(r.base for r in ordered), ordered)


def _describe(entry: _Range) -> str:
    return f"{type(entry.handler).__name__} at {entry.base:#x}..{entry.end - 1:#x}"
