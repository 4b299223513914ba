# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A slow, obvious model of a 16550A, written from the data sheet and not from the C."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

RX_TRIGGERS = (1, 4, 8, 14)


@dataclass
class UartModel:
    """Registers and byte streams; ``interrupts`` counts the rising edges of the interrupt."""

    input_size: int
    output_size: int
    ier: int = 0
    fcr: int = 0
    lcr: int = 3
    mcr: int = 0
    scratch: int = 0
    divisor: list[int] = field(default_factory=lambda: [1, 0])
    modem_deltas: set[str] = field(default_factory=set)
    is_overrun: bool = False
    is_transmitter_news: bool = False
    fifo: deque[int] = field(default_factory=deque)
    input: deque[int] = field(default_factory=deque)
    output: bytearray = field(default_factory=bytearray)
    dropped: int = 0
    interrupts: int = 0
    announcements: int = 0
    was_pending: bool = False

    @property
    def has_fifo(self) -> bool:
        return bool(self.fcr & 1)

    @property
    def is_loopback(self) -> bool:
        return bool(self.mcr & 0x10)

    @property
    def depth(self) -> int:
        return 16 if self.has_fifo else 1

    def modem_lines(self) -> dict[str, bool]:
        if not self.is_loopback:
            return {"cts": True, "dsr": True, "ri": False, "dcd": True}
        return {
            "cts": bool(self.mcr & 2),
            "dsr": bool(self.mcr & 1),
            "ri": bool(self.mcr & 4),
            "dcd": bool(self.mcr & 8),
        }

    def cause(self) -> int | None:
        """The identification bits of the highest interrupt, or None."""
        trigger = RX_TRIGGERS[self.fcr >> 6] if self.has_fifo else 1
        if self.ier & 4 and self.is_overrun:
            return 6
        if self.ier & 1 and self.fifo:
            return 4 if len(self.fifo) >= trigger else 12
        if self.ier & 2 and self.is_transmitter_news:
            return 2
        if self.ier & 8 and self.modem_deltas:
            return 0
        return None

    def settle(self) -> None:
        """After every operation: input moves up, and an interrupt may rise."""
        while self.input and not self.is_loopback and len(self.fifo) < self.depth:
            self.fifo.append(self.input.popleft())
        is_pending = self.cause() is not None
        self.interrupts += is_pending and not self.was_pending
        self.was_pending = is_pending

    def receive(self, byte: int) -> None:
        if len(self.fifo) < self.depth:
            self.fifo.append(byte)
        else:
            self.is_overrun = True

    def read(self, offset: int) -> int:
        value = self.read_register(offset)
        self.settle()
        return value

    def read_register(self, offset: int) -> int:
        if self.lcr & 0x80 and offset in (0, 1):
            return self.divisor[offset]
        match offset:
            case 0:
                return self.fifo.popleft() if self.fifo else 0
            case 1:
                return self.ier
            case 2:
                return self.read_identification()
            case 3:
                return self.lcr
            case 4:
                return self.mcr
            case 5:
                return self.read_line_status()
            case 6:
                return self.read_modem_status()
            case 7:
                return self.scratch
            case _:
                return 0xFF

    def read_identification(self) -> int:
        cause = self.cause()
        if cause == 2:
            self.is_transmitter_news = False
        return (1 if cause is None else cause) | (0xC0 if self.has_fifo else 0)

    def read_line_status(self) -> int:
        status = 0x60 | (1 if self.fifo else 0) | (2 if self.is_overrun else 0)
        self.is_overrun = False
        return status

    def read_modem_status(self) -> int:
        status = 0
        for bit, line in enumerate(("cts", "dsr", "ri", "dcd")):
            status |= self.modem_lines()[line] << 4 + bit
            status |= (line in self.modem_deltas) << bit
        self.modem_deltas.clear()
        return status

    def write(self, offset: int, value: int) -> None:
        self.write_register(offset, value)
        self.settle()

    def write_register(self, offset: int, value: int) -> None:
        if self.lcr & 0x80 and offset in (0, 1):
            self.divisor[offset] = value
            return
        match offset:
            case 0:
                self.transmit(value)
            case 1:
                if value & 2 and not self.ier & 2:
                    self.is_transmitter_news = True
                self.ier = value & 0xF
            case 2:
                if value & 2 or (value ^ self.fcr) & 1:
                    self.fifo.clear()
                self.fcr = value if value & 1 else 0
            case 3:
                self.lcr = value
            case 4:
                before = self.modem_lines()
                self.mcr = value & 0x1F
                after = self.modem_lines()
                changed = {line for line in after if after[line] != before[line]}
                self.modem_deltas |= changed - (set() if before["ri"] else {"ri"})
            case 7:
                self.scratch = value
            case _:
                pass  # line and modem status cannot be written

    def transmit(self, byte: int) -> None:
        self.is_transmitter_news = True
        if self.is_loopback:
            self.receive(byte)
        elif len(self.output) == self.output_size:
            self.dropped += 1
        else:
            self.announcements += not self.output
            self.output.append(byte)

    def take_output(self) -> bytes:
        taken, self.output = bytes(self.output), bytearray()
        return taken

    def put_input(self, data: bytes) -> int:
        accepted = data[: self.input_size - len(self.input)]
        self.input.extend(accepted)
        self.settle()
        return len(accepted)
