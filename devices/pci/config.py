# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""PCI configuration space of one function: identity, BARs, capabilities, command register.

The bytes live in the exit table, where C serves the guest's reads; so they are current at all
times, and a write is a masked update of them. BAR sizing falls out of the mask: the bits below
the BAR's size cannot be written.

Source: PCI Local Bus Specification 3.0, chapter 6; <linux/pci_regs.h> for the names.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Protocol

from devices.bus import BusDevice

CONFIG_SIZE_BYTES: Final = 4096
CONVENTIONAL_SIZE_BYTES: Final = 256  # we use nothing of the extended space

PCI_COMMAND: Final = 0x04
PCI_COMMAND_MEMORY: Final = 0x0002
# I/O, memory, bus master, parity, SERR, INTx disable: kept as written, only memory has an effect.
PCI_COMMAND_WRITABLE: Final = 0x0547
PCI_STATUS: Final = 0x06
PCI_STATUS_CAP_LIST: Final = 0x0010
PCI_CACHE_LINE_SIZE: Final = 0x0C
PCI_LATENCY_TIMER: Final = 0x0D
PCI_BASE_ADDRESS_0: Final = 0x10
PCI_BASE_ADDRESS_5: Final = 0x24
PCI_CAPABILITY_LIST: Final = 0x34
PCI_INTERRUPT_LINE: Final = 0x3C
FIRST_CAPABILITY: Final = 0x40

BAR_TYPE_64BIT: Final = 0x4
BAR_PREFETCHABLE: Final = 0x8
BAR_FLAGS_MASK: Final = 0xF
MIN_BAR_SIZE_BYTES: Final = 4096  # a page, so that no two functions share one
MAX_BARS: Final = 6


@dataclass(frozen=True)
class PciIdentity:
    """The read-only registers that tell what a function is."""

    vendor_id: int
    device_id: int
    class_code: int  # 24 bits: class, subclass, programming interface
    revision: int = 0
    subsystem_vendor_id: int = 0
    subsystem_id: int = 0


@dataclass(frozen=True)
class Bar:
    """One memory BAR and who serves it."""

    index: int
    size_bytes: int
    handler: BusDevice
    is_64bit: bool = False
    is_prefetchable: bool = False


class BarMapper(Protocol):
    """Gives addresses to BARs: the PCI host."""

    def map_bar(self, bar: Bar, gpa: int) -> bool:
        """Let the guest reach ``bar`` at ``gpa`` (guest-controlled); False when that is refused."""
        ...

    def unmap_bar(self, bar: Bar, gpa: int) -> None:
        """Undo a map_bar() that returned True."""
        ...


class _Nowhere:
    def map_bar(self, bar: Bar, gpa: int) -> bool:
        return False

    def unmap_bar(self, bar: Bar, gpa: int) -> None:
        pass


class PciFunction:
    """Function 0 of one slot.

    A subclass adds BARs and capabilities in its constructor and overrides the hooks.

    Threads: the PCI host serialises everything here by its lock.
    """

    def __init__(self, identity: PciIdentity) -> None:
        self._config = memoryview(bytearray(CONFIG_SIZE_BYTES))
        self._writable = bytearray(CONFIG_SIZE_BYTES)
        self._bars: dict[int, Bar] = {}
        self._mapped: dict[int, int] = {}
        self._mapper: BarMapper = _Nowhere()
        self._last_capability: int | None = None
        self._capabilities_end = FIRST_CAPABILITY
        # Registers (offset, length) whose reads do something and so must come to config_read().
        self.trapped_reads: tuple[int, int] | None = None
        self._set(0x00, "<HH", identity.vendor_id, identity.device_id)
        self._set(0x08, "<I", identity.class_code << 8 | identity.revision)
        self._set(0x2C, "<HH", identity.subsystem_vendor_id, identity.subsystem_id)
        struct.pack_into("<H", self._writable, PCI_COMMAND, PCI_COMMAND_WRITABLE)
        for register in (PCI_CACHE_LINE_SIZE, PCI_LATENCY_TIMER, PCI_INTERRUPT_LINE):
            self._writable[register] = 0xFF

    @property
    def bars(self) -> tuple[Bar, ...]:
        """The BARs, by index."""
        return tuple(self._bars[index] for index in sorted(self._bars))

    def mapped_at(self, index: int) -> int | None:
        """Where the guest reaches BAR ``index`` now, or None."""
        return self._mapped.get(index)

    @property
    def mapped(self) -> dict[int, int]:
        """Where the guest reaches BARs now, and how large they are."""
        return {gpa: self._bars[index].size_bytes for index, gpa in self._mapped.items()}

    # ---- set-up, before the guest runs

    def add_bar(self, bar: Bar) -> None:
        """Add a memory BAR.

        Raises:
            ValueError: the size is no power of two of at least a page, or the index is taken.
        """
        slots = (bar.index, bar.index + 1) if bar.is_64bit else (bar.index,)
        if not all(0 <= slot < MAX_BARS for slot in slots):
            raise ValueError(f"BAR {bar.index}: there are {MAX_BARS}")
        if bar.size_bytes < MIN_BAR_SIZE_BYTES or bar.size_bytes & (bar.size_bytes - 1):
            raise ValueError(f"BAR {bar.index}: size={bar.size_bytes:#x}: no power of two")
        taken = {s for old in self._bars.values() for s in (old.index, old.index + old.is_64bit)}
        if taken & set(slots):
            raise ValueError(f"BAR {bar.index} is taken")
        self._bars[bar.index] = bar
        offset = PCI_BASE_ADDRESS_0 + 4 * bar.index
        flags = BAR_TYPE_64BIT * bar.is_64bit | BAR_PREFETCHABLE * bar.is_prefetchable
        self._set(offset, "<I", flags)
        mask = ((1 << 64) - bar.size_bytes) & ~BAR_FLAGS_MASK
        width = 8 if bar.is_64bit else 4
        self._writable[offset : offset + width] = mask.to_bytes(8, "little")[:width]

    def add_capability(self, capability_id: int, body: bytes, writable: bytes = b"") -> int:
        """Append a capability and return its offset.

        Args:
            capability_id: PCI_CAP_ID_*.
            body: what follows the id and the next pointer.
            writable: mask of the bits of ``body`` that the guest may write; missing bytes are 0.

        Raises:
            ValueError: the conventional configuration space is full.
        """
        offset = self._capabilities_end
        end = offset + 2 + len(body)
        if end > CONVENTIONAL_SIZE_BYTES:
            raise ValueError(f"capability {capability_id:#x} does not fit")
        self._set(offset, f"<BB{len(body)}s", capability_id, 0, body)
        self._writable[offset + 2 : offset + 2 + len(writable)] = writable
        previous = self._last_capability
        self._config[PCI_CAPABILITY_LIST if previous is None else previous + 1] = offset
        self._set(PCI_STATUS, "<H", PCI_STATUS_CAP_LIST)
        self._last_capability = offset
        self._capabilities_end = (end + 3) & ~3
        return offset

    def bind(self, config: memoryview, mapper: BarMapper) -> None:
        """Move the bytes into the exit table's view and learn who maps BARs."""
        config[: len(self._config)] = self._config
        self._config = config
        self._mapper = mapper

    def unbind(self) -> None:
        """Unmap every BAR and keep the bytes in memory of our own again."""
        for index in list(self._mapped):
            self._unmap(self._bars[index])
        self._config = memoryview(bytearray(self._config))
        self._mapper = _Nowhere()

    def place_bar(self, index: int, gpa: int) -> None:
        """Preset a BAR's address, as firmware would; decoding stays off until the guest says so."""
        bar = self._bars[index]
        offset = PCI_BASE_ADDRESS_0 + 4 * index
        low = self._get(offset, "<I") & BAR_FLAGS_MASK
        if bar.is_64bit:
            self._set(offset, "<Q", gpa | low)
        else:
            self._set(offset, "<I", gpa | low)

    # ---- guest accesses

    def config_write(self, register: int, length: int, value: int) -> None:
        """Write ``length`` bytes of ``value`` at ``register``; all three are guest-controlled."""
        length = min(length, CONFIG_SIZE_BYTES - register)
        if register < 0 or length <= 0:
            return
        written = value.to_bytes(8, "little")
        end = register + length
        # One slice assignment, so that C never serves a half-written register.
        self._config[register:end] = bytes(
            old & ~mask | new & mask
            for old, mask, new in zip(
                self._config[register:end], self._writable[register:end], written, strict=False
            )
        )
        if overlaps(register, length, PCI_COMMAND, 2) or overlaps(
            register, length, PCI_BASE_ADDRESS_0, 4 * MAX_BARS
        ):
            self._update_decode()
        self.config_written(register, length)

    def config_read(self, register: int, length: int) -> int:
        """Return configuration bytes; used where C hands a read out (trapped registers)."""
        return int.from_bytes(self._config[register : register + length], "little")

    def poke(self, register: int, data: bytes) -> None:
        """Change bytes that the guest will read, whatever their mask."""
        self._config[register : register + len(data)] = data

    # ---- hooks

    def config_written(self, register: int, length: int) -> None:
        """React to a guest's write, after the bytes were updated."""

    def bar_mapped(self, bar: Bar, gpa: int) -> None:
        """React to a BAR that the guest can reach at ``gpa`` from now on."""

    def bar_unmapped(self, bar: Bar, gpa: int) -> None:
        """React to a BAR that the guest can no longer reach at ``gpa``."""

    # ---- helpers

    def _update_decode(self) -> None:
        is_decoding = bool(self._get(PCI_COMMAND, "<H") & PCI_COMMAND_MEMORY)
        wanted = {i: self._bar_gpa(bar) if is_decoding else None for i, bar in self._bars.items()}
        # First everything that goes, then everything that comes: two BARs may swap places.
        for index, gpa in wanted.items():
            if index in self._mapped and self._mapped[index] != gpa:
                self._unmap(self._bars[index])
        for index, gpa in wanted.items():
            bar = self._bars[index]
            if gpa is not None and index not in self._mapped and self._mapper.map_bar(bar, gpa):
                self._mapped[index] = gpa
                self.bar_mapped(bar, gpa)

    def _unmap(self, bar: Bar) -> None:
        gpa = self._mapped.pop(bar.index)
        self.bar_unmapped(bar, gpa)
        self._mapper.unmap_bar(bar, gpa)

    def _bar_gpa(self, bar: Bar) -> int:
        offset = PCI_BASE_ADDRESS_0 + 4 * bar.index
        return self._get(offset, "<Q" if bar.is_64bit else "<I") & ~BAR_FLAGS_MASK

    def _get(self, offset: int, layout: str) -> int:
        value: int = struct.unpack_from(layout, self._config, offset)[0]
        return value

    def _set(self, offset: int, layout: str, *values: int | bytes) -> None:
        struct.pack_into(layout, self._config, offset, *values)


def overlaps(base: int, length: int, other: int, other_length: int) -> bool:
    """Whether two ranges share a byte."""
    return base < other + other_length and other < base + length
