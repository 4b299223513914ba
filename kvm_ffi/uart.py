# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The 16550A serial port, whose registers C serves on the vCPU threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ._kvm import ffi, lib
from .eventfd import EventFd

if TYPE_CHECKING:
    from ._kvm import CData

UART_PORTS: Final = lib.UART16550_PORTS
INPUT_SIZE_BYTES: Final = lib.UART16550_INPUT_SIZE
OUTPUT_SIZE_BYTES: Final = lib.UART16550_OUTPUT_SIZE

_CHUNK_BYTES: Final = 64 * 1024


class Uart:
    """A 16550A; ExitTable.attach_uart() gives it ports.

    What the guest sends waits in a ring of OUTPUT_SIZE_BYTES; when that is full, more is dropped
    and counted, so a vCPU never waits. What the host sends waits in a buffer of INPUT_SIZE_BYTES
    and reaches the 16-byte FIFO as the guest makes room.

    Args:
        irq: signalled on each rising edge of the interrupt condition (assign it as an irqfd); None
            for a port that is polled.

    Attributes:
        output: signalled when there is output to read.

    Threads: any.

    Source: Texas Instruments PC16550D data sheet.
    """

    def __init__(self, irq: EventFd | None = None) -> None:
        self.output = EventFd()
        self._keepalive_irq = irq
        raw = lib.uart16550_create(-1 if irq is None else irq.fd, self.output.fd)
        if raw == ffi.NULL:
            raise MemoryError("uart")
        self.raw: CData = ffi.gc(raw, lib.uart16550_destroy)

    def read(self, offset: int) -> int:
        """Read a register as the guest would, with the same effects.

        Args:
            offset: 0..7; others answer 0xff.
        """
        return lib.uart16550_read(self.raw, offset)

    def write(self, offset: int, value: int) -> None:
        """Write a register as the guest would.

        Args:
            offset: 0..7; others are ignored.
            value: 0..255.
        """
        lib.uart16550_write(self.raw, offset, value)

    def read_output(self) -> bytes:
        """Take up to 64 KiB of what the guest sent; drain ``output`` first.

        Returns:
            Guest-controlled bytes, empty if there are none. If more remain, ``output`` is signalled
            again.
        """
        size = min(lib.uart16550_output_size(self.raw), _CHUNK_BYTES)
        if size == 0:
            return b""
        buffer = ffi.new("uint8_t[]", size)
        taken = lib.uart16550_take_output(self.raw, buffer, size)
        return bytes(ffi.buffer(buffer, taken))

    def write_input(self, data: bytes) -> int:
        """Send bytes to the guest.

        Returns:
            How many were accepted: fewer than given when the buffer is full.
        """
        return lib.uart16550_put_input(self.raw, data, len(data))

    @property
    def dropped_bytes(self) -> int:
        """How much output was lost because nobody read it in time."""
        return lib.uart16550_dropped(self.raw)

    def close(self) -> None:
        """Disconnect the UART from its eventfds and close ``output``; the irq stays open."""
        lib.uart16550_disconnect(self.raw)
        self.output.close()
