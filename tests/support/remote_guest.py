# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A guest that does what it is told on its console, access by access: a driver written in Python.

It knows nothing of any device, so a test decides what it writes where: to memory, to what is mapped
below 4 GiB, and to ports. A command has 16 bytes; one that reads is answered with eight letters
and a full stop.
"""

from __future__ import annotations

import struct
from typing import Final

from lab.rest import Console
from tests.support.hostel import Hostel

# What a command begins with; the address and the value follow.
_COMMAND: Final = struct.Struct("<B3xIQ")
_READ, _WRITE = {1: 1, 2: 2, 4: 3}, {1: 4, 2: 5, 4: 6, 8: 7}
_IN, _OUT, _STIR = 8, {1: 9, 2: 10, 4: 11}, 12

_BUFFER_GPA: Final = 0x20_0000


def _case(number: int, body: bytes) -> bytes:
    """If al is ``number``: do ``body``."""
    assert len(body) < 0x80
    return b"\x3c" + bytes([number, 0x75, len(body)]) + body


def remote_kernel() -> bytes:
    """Return the guest's code, in 64-bit mode."""
    code = b"\xbf" + struct.pack("<I", _BUFFER_GPA)
    # Sixteen bytes: 1: in al, LSR; test al, 1; jz 1b; in al, COM1; mov [rdi+rcx], al
    loop = b"\x31\xc9"
    take = b"\x66\xba\xfd\x03\xec\xa8\x01\x74\xf7\x66\xba\xf8\x03\xec\x88\x04\x0f"
    take += b"\xff\xc1\x83\xf9\x10"  # inc ecx; cmp ecx, 16
    loop += take + b"\x75" + struct.pack("<b", -(len(take) + 2))
    # al = command, esi = address, rbx = value, dx = address
    loop += b"\x8b\x77\x04\x48\x8b\x5f\x08\x89\xf2\x8a\x07"
    # Letters: eax in r8d; eight times: rol r8d, 4; al = r8b & 15 + 'a'; out
    letter = b"\x41\xc1\xc0\x04\x44\x89\xc0\x24\x0f\x04\x61\xee\xff\xc9"
    tell = b"\x41\x89\xc0\x66\xba\xf8\x03\xb9\x08\x00\x00\x00"
    tell += letter + b"\x75" + struct.pack("<b", -(len(letter) + 2)) + b"\xb0.\xee"
    loop += _case(_READ[1], b"\x0f\xb6\x06" + tell)
    loop += _case(_READ[2], b"\x0f\xb7\x06" + tell)
    loop += _case(_READ[4], b"\x8b\x06" + tell)
    loop += _case(_IN, b"\xed" + tell)
    # What a case leaves in al is no command of a later one.
    loop += _case(_WRITE[1], b"\x88\x1e") + _case(_WRITE[2], b"\x66\x89\x1e")
    loop += _case(_WRITE[4], b"\x89\x1e") + _case(_WRITE[8], b"\x48\x89\x1e")
    loop += _case(_OUT[1], b"\x88\xd8\xee\x30\xc0") + _case(
        _OUT[2], b"\x66\x89\xd8\x66\xef\x30\xc0"
    )
    loop += _case(_OUT[4], b"\x89\xd8\xef\x30\xc0")
    # mov ecx, ebx; 1: mov [rsi], cx; dec ecx; jnz 1b
    loop += _case(_STIR, b"\x89\xd9\x66\x89\x0e\xff\xc9\x75\xf9")
    return code + loop + b"\xe9" + struct.pack("<i", -(len(loop) + 5))


class RemoteGuest:
    """A VM that runs it.

    Writes are collected; a read sends them, then itself, and so waits until all are done.
    """

    def __init__(self, hostel: Hostel, **options: object) -> None:
        self.hostel = hostel
        self.name = hostel.run(remote_kernel(), **options)
        self._console = Console(hostel.api, self.name)
        self._pending = bytearray()

    def write(self, address: int, width: int, value: int) -> None:
        """Write to memory or to a device, in one access of 1, 2, 4 or 8 bytes."""
        self._add(_WRITE[width], address, value)

    def write_bytes(self, address: int, data: bytes) -> None:
        """Write to memory; ``data`` is filled up to a multiple of 8."""
        data += bytes(-len(data) % 8)
        for offset in range(0, len(data), 8):
            self.write(address + offset, 8, int.from_bytes(data[offset : offset + 8], "little"))

    def read(self, address: int, width: int) -> int:
        """Read from memory or from a device, in one access of 1, 2 or 4 bytes."""
        self._add(_READ[width], address, 0)
        return self._answer()

    def read_bytes(self, address: int, length: int) -> bytes:
        """Read from memory, in words."""
        words = [self.read(address + offset, 4) for offset in range(0, length, 4)]
        return struct.pack(f"<{len(words)}I", *words)[:length]

    def port_in(self, port: int) -> int:
        """Read four bytes from a port."""
        self._add(_IN, port, 0)
        return self._answer()

    def port_out(self, port: int, width: int, value: int) -> None:
        """Write to a port."""
        self._add(_OUT[width], port, value)

    def stir(self, address: int, count: int) -> None:
        """Write ``count``, ``count`` - 1 ... 1 to a 16-bit word, as fast as the guest can."""
        self._add(_STIR, address, count)

    def send(self) -> None:
        """Send what was collected, and do not wait for it."""
        self.hostel.api.type(self.name, bytes(self._pending))
        self._pending.clear()

    def settle(self) -> None:
        """Wait until everything has been done."""
        self.read(_BUFFER_GPA, 4)

    def delete(self) -> None:
        """Delete the VM."""
        self._console.close()
        self.hostel.delete(self.name)

    def _add(self, command: int, address: int, value: int) -> None:
        self._pending += _COMMAND.pack(command, address, value)

    def _answer(self) -> int:
        begin = len(self._console.text)
        self.send()
        end = self._console.wait_for(".", after=begin)
        digits = (ord(letter) - ord("a") for letter in self._console.text[begin : end - 1])
        return int.from_bytes(bytes(a << 4 | b for a, b in zip(digits, digits, strict=True)))
