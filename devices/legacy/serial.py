# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""COM1: a 16550A that C serves (kvm_ffi.uart), wired to its ports and its interrupt.

Source: Texas Instruments PC16550D data sheet; the registers are in csrc/uart16550.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from devices.platform import IrqLine
from kvm_ffi.uart import Uart

if TYPE_CHECKING:
    from devices.platform import IrqfdVm
    from kvm_ffi.eventfd import EventFd
    from kvm_ffi.exits import ExitTable

COM1_PORT: Final = 0x3F8
COM1_GSI: Final = 4


class SerialPort:
    """The guest's ttyS0.

    Args:
        vm: binds the interrupt.
        exit_table: serves the ports in C from now on.
        port: first of eight I/O ports.
        gsi: the interrupt line.

    Threads: any.
    """

    def __init__(
        self, vm: IrqfdVm, exit_table: ExitTable, *, port: int = COM1_PORT, gsi: int = COM1_GSI
    ) -> None:
        self._irq = IrqLine(vm, gsi)
        self._uart = Uart(self._irq.eventfd)
        self._output_bytes = 0
        self._input_bytes = 0
        exit_table.attach_uart(self._uart, port)

    @property
    def output(self) -> EventFd:
        """Signalled when there is output to read."""
        return self._uart.output

    def read_output(self) -> bytes:
        """Take up to 64 KiB of what the guest sent (guest-controlled); drain ``output`` first."""
        data = self._uart.read_output()
        self._output_bytes += len(data)
        return data

    def write_input(self, data: bytes) -> int:
        """Type something; return how many bytes were accepted, fewer when the buffer is full."""
        accepted = self._uart.write_input(data)
        self._input_bytes += accepted
        return accepted

    def stats(self) -> dict[str, int]:
        """Return output_bytes, input_bytes and dropped_bytes (output that nobody read in time)."""
        return {
            "output_bytes": self._output_bytes,
            "input_bytes": self._input_bytes,
            "dropped_bytes": self._uart.dropped_bytes,
        }

    def close(self) -> None:
        """Disconnect from the eventfds and close them; the ports then do nothing."""
        self._uart.close()
        self._irq.close()
