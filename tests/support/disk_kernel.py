# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A guest of a few hundred bytes that drives its first disk as it is told on the console.

A typed letter is one request of 4 KiB: a lower-case one reads, an upper-case one writes; A and a
are the first block, B and b the second, and so on. The guest answers each with four characters: the
request's status as a digit, the first byte of what it has read last, the disk's size in MiB as a
digit, and a full stop.
"""

from __future__ import annotations

import struct
from pathlib import Path

from lab.rest import Console, Json
from tests.support import tiny_kernel as tiny
from tests.support.hostel import Hostel

BLOCK_BYTES = 4096
FILL = b"w"  # what it writes

BAR = 0xC000_0000
NOTIFY, DEVICE_CONFIG = 0x3000, 0x2000
# Offsets into its memory, at RAM.
RAM = 0x20_0000
DESC, AVAIL, USED, WRITE_HEADER, READ_HEADER, STATUS = 0, 0x1000, 0x2000, 0x3000, 0x3010, 0x3020
READ_DATA, WRITE_DATA = 0x4000, 0x5000
QUEUE_SIZE = 8
DESC_NEXT, DESC_WRITE = 1, 2
READ_HEAD = 3  # the chain of a write is 0 to 2, that of a read 3 to 5


def _poke(base: int, offset: int, length: int, value: int) -> bytes:
    """Mov [rdi or rsi + offset], value."""
    opcode = {1: b"\xc6", 2: b"\x66\xc7", 4: b"\xc7"}[length]
    return opcode + bytes([base]) + struct.pack("<i", offset) + value.to_bytes(length, "little")


def _device(offset: int, length: int, value: int) -> bytes:
    return _poke(0x87, offset, length, value)


def _ram(offset: int, length: int, value: int) -> bytes:
    return _poke(0x86, offset, length, value)


def _pci(register: int, value: int) -> bytes:
    """Write a configuration register of slot 1."""
    code = b""
    for port, word in ((0xCF8, 0x8000_0800 | register), (0xCFC, value)):
        code += b"\x66\xba" + struct.pack("<H", port) + b"\xb8" + struct.pack("<I", word) + b"\xef"
    return code


def _descriptor(index: int, offset: int, length: int, flags: int) -> bytes:
    at = DESC + 16 * index
    link = flags | (DESC_NEXT if index % 3 < 2 else 0)
    code = _ram(at, 4, RAM + offset) + _ram(at + 8, 4, length)
    return code + _ram(at + 12, 2, link) + _ram(at + 14, 2, index + 1)


def _start() -> bytes:
    """Initialise device and ring: VIRTIO 1.2, 3.1.1; with VERSION_1 and FLUSH, without vectors."""
    code = b"\xbf" + struct.pack("<I", BAR) + b"\xbe" + struct.pack("<I", RAM) + b"\x31\xdb"
    code += _pci(0x10, BAR) + _pci(0x04, 0x6)
    code += _device(0x14, 1, 0) + _device(0x14, 1, 1) + _device(0x14, 1, 3)
    for select, features in ((0, 1 << 9), (1, 1)):
        code += _device(0x08, 4, select) + _device(0x0C, 4, features)
    code += _device(0x14, 1, 11) + _device(0x16, 2, 0) + _device(0x18, 2, QUEUE_SIZE)
    for register, offset in ((0x20, DESC), (0x28, AVAIL), (0x30, USED)):
        code += _device(register, 4, RAM + offset) + _device(register + 4, 4, 0)
    code += _device(0x1C, 2, 1) + _device(0x14, 1, 15)
    code += _ram(WRITE_HEADER, 4, 1) + _ram(WRITE_DATA, 1, FILL[0])
    code += _descriptor(0, WRITE_HEADER, 16, 0) + _descriptor(1, WRITE_DATA, BLOCK_BYTES, 0)
    code += _descriptor(2, STATUS, 1, DESC_WRITE) + _descriptor(3, READ_HEADER, 16, 0)
    code += _descriptor(4, READ_DATA, BLOCK_BYTES, DESC_WRITE)
    return code + _descriptor(5, STATUS, 1, DESC_WRITE)


def _load(modrm: int, offset: int, opcode: bytes = b"\x8a") -> bytes:
    return opcode + bytes([modrm]) + struct.pack("<i", offset)


def _serve() -> bytes:
    """One request: its letter is in al; ebx counts them."""
    at = struct.Struct("<i").pack
    code = b"\x0f\xb6\xc8\x83\xe1\x1f\xff\xc9\xc1\xe1\x03"  # ecx = ((al & 31) - 1) * 8 sectors
    code += b"\x89\x8e" + at(WRITE_HEADER + 8) + b"\x89\x8e" + at(READ_HEADER + 8)
    code += b"\x31\xc9\xa8\x20\x74\x02\xb1" + bytes([READ_HEAD])  # ecx = its chain
    code += b"\x89\xda\x83\xe2" + bytes([QUEUE_SIZE - 1])  # edx = the place in the ring
    code += b"\x66\x89\x8c\x56" + at(AVAIL + 4)  # mov [rsi + 2 * rdx + ...], cx
    code += b"\xff\xc3\x66\x89\x9e" + at(AVAIL + 2) + _device(NOTIFY, 2, 0)
    code += b"\x66\x39\x9e" + at(USED + 2) + b"\x75\xf7"  # 1: cmp [used idx], bx; jne 1b
    code += _load(0x86, STATUS) + b"\x04\x30" + b"\x66\xba\xf8\x03\xee"
    code += _load(0x86, READ_DATA) + b"\xee"
    code += _load(0x87, DEVICE_CONFIG, b"\x8b") + b"\xc1\xe8\x0b\x04\x30\xee"
    return code + b"\xb0.\xee"


def disk_kernel(first: bytes = b"", idle: bytes = b"") -> bytes:
    """Return the guest's code; it says "up" when its disk is ready.

    Args:
        first: what it does before all else.
        idle: what it does again and again while it has no request under way.
    """
    # 1: (idle); mov dx, LSR; in al, dx; test al, 1; jz 1b; mov dx, COM1; in al, dx
    wait = idle + b"\x66\xba\xfd\x03\xec\xa8\x01"
    wait += b"\x74" + struct.pack("<b", -len(wait) - 2) + b"\x66\xba\xf8\x03\xec"
    body = wait + _serve()
    return first + _start() + tiny.say("up.") + body + b"\xe9" + struct.pack("<i", -(len(body) + 5))


class DiskGuest:
    """A VM that runs it, on a disk with id "root": a file, or what the options say.

    Args:
        hostel: where it runs.
        path: of the file.
        code: what it runs, if that has something to do besides.
        vm: options of the VM.
        how: options of the disk.
    """

    def __init__(
        self,
        hostel: Hostel,
        path: Path | None = None,
        *,
        code: bytes | None = None,
        vm: Json | None = None,
        **how: object,
    ) -> None:
        self.hostel = hostel
        disk = {"id": "root", **({} if path is None else {"path": str(path)}), **how}
        self.name = hostel.run(code or disk_kernel(), disks=[disk], **(vm or {}))
        self._starts = 1
        self.follow()

    def follow(self) -> None:
        """Follow its console, from the beginning of its log on."""
        self.console = Console(self.hostel.api, self.name)
        at = 0
        for _ in range(self._starts):
            at = self.console.wait_for("up.", after=at)

    def act(self, *actions: str) -> None:
        """Do what makes the guest start once more, and wait for that."""
        for action in actions:
            self.hostel.api.act(self.name, action)
        self._starts += 1
        self.console.close()
        self.follow()

    def ask(self, letters: str) -> list[str]:
        """Have it do one request for each letter, and return its answers."""
        answers = []
        for letter in letters:
            begin = len(self.console.text)
            self.hostel.api.type(self.name, letter)
            end = self.console.wait_for(".", after=begin)
            answers.append(self.console.text[begin:end].rstrip("."))
        return answers

    def events(self, kind: str) -> list[Json]:
        """Return the data of the VM's events of one kind."""
        events = self.hostel.api.get("/v1/events?limit=1000")["items"]
        ours = [event for event in events if event["object"]["name"] == self.name]
        return [event["data"] for event in ours if event["type"] == kind]

    def swap(self, path: Path) -> Json:
        """Put another file behind its disk."""
        wanted = {"path": str(path)}
        return self.hostel.api.call("PATCH", f"/v1/vms/{self.name}/disks/root", wanted)

    def delete(self) -> None:
        """Delete it."""
        self.console.close()
        self.hostel.delete(self.name)
