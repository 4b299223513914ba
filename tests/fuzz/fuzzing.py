# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Builds and runs the fuzz targets, briefly from pytest or at length by hand.

Those of the C core are C; those of parsers in Python run under libFuzzer too, by Atheris.

    python -m tests.fuzz.fuzzing virtqueue --seconds 3600

A crash leaves its input in the directory of the run; give that file as --input to see it again.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
CSRC: Final = HERE.parent.parent / "kvm_ffi" / "csrc"
C_TARGETS: Final = ("virtqueue", "blk", "net", "vsock", "uart", "exits")
PYTHON_TARGETS: Final = ("net_control", "vhost_user")
TARGETS: Final = (*C_TARGETS, *PYTHON_TARGETS)
CORE: Final = (
    *("guest_mem", "virtqueue", "engine", "token_bucket", "rate_group", "io_ring", "net_engine"),
    *("blk_file", "blk_request", "blk_stats", "blk_sync", "blk_ring", "blk_control", "blk_engine"),
    *("uart16550", "exit_table"),
    *("vsock_conn", "vsock_engine", "vsock_host", "vsock_rx", "vsock_tx"),
)
MAX_INPUT_BYTES: Final = 2048

# Where guest.h puts the rings.
AVAIL, USED, SECOND = 0x80, 0xA0, 0x100
NEXT, WRITE, INDIRECT = 1, 2, 4


def build(name: str, directory: Path, *, is_fuzzer: bool = True) -> Path:
    """Compile a program of this folder with the sources that it attacks."""
    program = directory / name
    sanitize = "address,undefined" + (",fuzzer" if is_fuzzer else "")
    sources = [HERE / f"{name}.c", *(CSRC / f"{unit}.c" for unit in CORE)]
    command = ["clang", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread",
               f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", f"-I{CSRC}", f"-I{HERE}",
               "-o", str(program), *map(str, sources)]  # fmt: skip
    subprocess.run(command, check=True)
    return program


def target(name: str, directory: Path) -> list[str]:
    """Return the command that runs a target, built where that is needed."""
    if name in PYTHON_TARGETS:
        return [sys.executable, "-m", f"tests.fuzz.fuzz_{name}"]
    return [str(build(f"fuzz_{name}", directory))]


def fuzz(name: str, directory: Path, limits: list[str]) -> None:
    """Run one target on its seeds and a corpus in `directory`.

    Raises:
        CalledProcessError: it found something, and says on stderr what.
    """
    corpus, seeds = directory / f"{name}.corpus", directory / f"{name}.seeds"
    corpus.mkdir(exist_ok=True)
    seeds.mkdir(exist_ok=True)
    for index, seed in enumerate(SEEDS[name]()):
        (seeds / f"{index:02}").write_bytes(seed)
    command = [*target(name, directory), str(corpus), str(seeds), "-timeout=20", "-verbosity=0",
               f"-max_len={MAX_INPUT_BYTES}", f"-artifact_prefix={directory}/{name}-",
               *limits]  # fmt: skip
    subprocess.run(command, check=True)


def desc(addr: int, length: int, flags: int = 0, after: int = 0) -> bytes:
    """One descriptor."""
    return struct.pack("<QIHH", addr, length, flags, after)


def avail(*heads: int) -> bytes:
    """An avail ring that offers some heads."""
    return struct.pack("<HH", 0, len(heads)) + b"".join(struct.pack("<H", head) for head in heads)


def image(*pieces: tuple[int, bytes]) -> bytes:
    """(gpa, bytes) pieces as guest memory from 0, with its length in front."""
    memory = bytearray(max(gpa + len(data) for gpa, data in pieces))
    for gpa, data in pieces:
        memory[gpa : gpa + len(data)] = data
    return struct.pack("<H", len(memory)) + bytes(memory)


def virtqueue_seeds() -> list[bytes]:
    """Chains as drivers build them, then pop, use, publish."""
    ops = bytes([0, 0, 2, 1, 0, 2, 1, 0, 3, 4, 0])
    chain = desc(0x400, 16, NEXT, 1) + desc(0x500, 64, NEXT | WRITE, 2) + desc(0x600, 1, WRITE)
    plain = image((0, chain), (AVAIL, avail(0, 2)))
    table = image((0, desc(0x300, 48, INDIRECT)), (AVAIL, avail(0)), (0x300, chain))
    high = image((0, desc(0x47FF, 1, WRITE)), (AVAIL, avail(0)))
    # One entry, popped, then offered again while it is in flight.
    reuse = image((0, desc(0x400, 1)), (AVAIL, avail(0)))
    again = bytes([0, 5, 0]) + struct.pack("<HB", AVAIL + 2, 2) + bytes([0, 0])
    return [
        struct.pack("<BH", setup, 0) + body + ops
        for body in (plain, table, high)
        for setup in (3 << 2, 3 << 2 | 3)
    ] + [struct.pack("<BH", 0, 0) + reuse + again, struct.pack("<BH", 0, 0) + reuse + b"\0\6\0"]


def blk_request(kind: int, sector: int, body: bytes, *, is_read: bool, length: int) -> bytes:
    """One request through the ring, without mutations behind it."""
    chain = desc(0x200, 16, NEXT, 1)
    chain += desc(0x300, length, NEXT | (WRITE if is_read else 0), 2) + desc(0x220, 1, WRITE)
    header = struct.pack("<IIQ", kind, 0, sector)
    return image((0, chain), (AVAIL, avail(0)), (0x200, header), (0x300, body))


def blk_seeds() -> list[bytes]:
    """One request of each type."""
    segment = struct.pack("<QII", 3, 4, 0)
    requests = [
        blk_request(0, 1, b"", is_read=True, length=1024),
        blk_request(1, 1, b"data", is_read=False, length=512),
        blk_request(4, 0, b"", is_read=False, length=0),
        blk_request(8, 0, b"", is_read=True, length=20),
        blk_request(11, 0, segment * 3, is_read=False, length=48),
        blk_request(13, 0, segment, is_read=False, length=16),
    ]
    # What the host does: all at once, all later, in parts, and with errors.
    hosts = (b"", b"\x01" * 40, b"\x00\xe8" * 40, b"\x01\xf0\x00\xf1" * 20)
    return [bytes([setup]) + body + host for body in requests for setup in (0, 9) for host in hosts]


def net_seeds() -> list[bytes]:
    """Receive buffers, packets to send, packets that arrive."""
    receive = b"".join(desc(0x400 + 0x100 * index, 0x100, WRITE) for index in range(4))
    send = desc(0x200, 12, NEXT, 1) + desc(0x300, 200) + desc(0x200, 60)
    body = image(
        (0, receive),
        (AVAIL, avail(0, 1, 2, 3)),
        (SECOND, send),
        (SECOND + AVAIL, avail(0, 2)),
        (0x300, b"\0"),
    )
    packets = b"".join(struct.pack("<BHB", 1, length, 1) for length in (60, 300, 5000, 11, 65000))
    # (buffers in a chain, their length, chains offered), then packets of a length
    large = [
        struct.pack("<HHH", *ring) + struct.pack("<BHB", 1, length, 31) * 4
        for *ring, length in ((1023, 16, 3, 900), (16, 63, 500, 950), (599, 64, 9, 40000))
    ]
    return [bytes([setup]) + body + packets for setup in (0, 1, 4, 5)] + [
        bytes([setup]) + struct.pack("<H", 0) + ring for ring in large for setup in (8, 12)
    ]


def vsock_seeds() -> list[bytes]:
    """A connection from each side, with data both ways, credit, and each way to end it."""
    receive = b"".join(desc(0x4000 + 0x100 * index, 0x100, WRITE) for index in range(8))
    body = image((0, receive), (AVAIL, avail(*range(8))))
    from_guest = bytes([1, 1, 7, 4, 8])  # REQUEST from port 7; the host accepts it as peer 0
    from_host = bytes([4, 0, 4, 0x00, 7, 1, 0x42, 7, 0])  # dial, CONNECT 7, RESPONSE
    rounds = bytes([4, 0x30, 0, 4, 4, 0x50, 32, 32])  # the host writes 1 KiB and reads
    payload = bytes([1, 0x85, 0, 14, 7])  # RW of 24.5 KiB: 20 are too much
    credit = bytes([1, 7, 7, 1, 0x26, 7, 0, 0, 0, 0, 0, 0, 0, 0])  # asked for, and taken away
    ends = [
        bytes(end)
        for end in (
            [4, 0xA0],
            [4, 0x90, 1],
            [1, 3, 7],
            [1, 0x14, 7],
            [8, 1, 0, 0],
            [1, 0x34, 7, 0, 0, 1, 0, 0, 0, 0, 0, 1, 3, 7, 4, 0x50],
        )
    ]  # closed, then read
    return [
        bytes([setup])
        + body
        + bytes([timeout])
        + start
        + rounds
        + payload * count
        + credit
        + end * 2
        for setup, count in ((0, 3), (1, 15), (0, 20))
        for timeout, start in ((1, from_guest), (1, from_host), (0, from_host))
        for end in ends
    ]


def uart_seeds() -> list[bytes]:
    """A driver's first steps, output beyond the ring's end, input beyond the buffer's."""
    line, fifo, interrupts = b"\x03\x03", b"\x02\x07", b"\x01\x0f"
    much = b"\x40\xff\xff." * 5  # writes of the data register
    take, put = b"\x18\xff\xff\x01", b"\x18\xff\xff\x00"
    read = b"\x50\xff\xff"
    loopback = b"\x04\x1f"
    return [
        line + fifo + interrupts + b"\x00.\x12\x15",
        fifo + much + take + take,
        fifo + interrupts + put + put + read + put,
        loopback + fifo + much + read + b"\xd0\xff\xff\x08\x00",
    ]


def exits_seeds() -> list[bytes]:
    """Configuration space by both ways, ports and ranges, claimed and not."""
    latch = b"\x00\x02\x01\x00" + struct.pack("<I", 0x8000F83C) + b"\x01"
    config = b"".join(b"\x00" + struct.pack("<BH", shift, 0x09) + bytes(9) for shift in range(3))
    ecam = b"".join(b"\x01" + bytes((size, 0)) + struct.pack("<H", 241 * size) + bytes(9)
                    for size in range(8))  # fmt: skip
    claim = b"\x03\x05\x01" + struct.pack("<HHBH", 64, 8, 0, 16)
    inside = b"\x01\x03\x01" + struct.pack("<H", 70) + bytes(5)
    uart = b"\x00" + struct.pack("<BH", 2, 0x3F8) + bytes(5)
    return [latch + config, ecam, claim + inside + claim + inside, uart]


def net_control_seeds() -> list[bytes]:
    """Each command as a driver sends it."""
    address = bytes.fromhex("020000000007")
    tables = struct.pack("<I", 1) + address + struct.pack("<I", 2) + address * 2
    commands = (b"\0\0\1", b"\0\5\0", b"\1\0" + tables, b"\1\1" + address, b"\2\0\xfe\x0f",
                b"\2\1\0\0", b"\3\0", b"\4\0\2\0")  # fmt: skip
    return [struct.pack("<Q", 0x1_00FC_0000) + command for command in commands]


def vhost_user_seeds() -> list[bytes]:
    """An honest back end's messages, for each thing that the target does with them."""

    def message(request: int, payload: bytes, *, flags: int = 5, n_fds: int = 0) -> bytes:
        data = struct.pack("<III", request, flags, len(payload)) + payload
        pieces = [data[at : at + 63] for at in range(0, len(data), 63)]
        sizes = [
            len(piece) | (n_fds << 6 if index == 0 else 0) for index, piece in enumerate(pieces)
        ]
        return b"".join(bytes([size]) + piece for size, piece in zip(sizes, pieces, strict=True))

    def number(request: int, value: int) -> bytes:
        return message(request, struct.pack("<Q", value))

    change = struct.pack("<III", 2, 9, 0)
    config = message(24, struct.pack("<III", 0, 60, 0) + bytes(60))
    # With REPLY_ACK, a request channel and a config space, and with the last alone.
    full = number(1, 0x1_4000_0000) + number(15, 0x1229) + number(21, 0) + number(3, 0) + config
    plain = number(1, 0x1_4000_0000) + number(15, 0x200) + config
    inflight = message(31, struct.pack("<QQHH", 4096, 0, 1, 64), n_fds=1)
    talk = inflight + number(1, 7) + number(3, 0) + number(1, 8)
    return [
        b"\0\5" + change * 3,
        b"\1" + (b"\x0c" + change) * 2 + b"\3" + change[:3] + b"\x09" + change[3:],
        *(b"\2" + kind + shake for kind in (b"\0", b"\xff") for shake in (full, plain)),
        b"\3\x55" + talk * 4,
    ]


SEEDS: Final = {
    "virtqueue": virtqueue_seeds,
    "blk": blk_seeds,
    "net": net_seeds,
    "vsock": vsock_seeds,
    "uart": uart_seeds,
    "exits": exits_seeds,
    "net_control": net_control_seeds,
    "vhost_user": vhost_user_seeds,
}


def main(argv: list[str]) -> int:
    """Fuzz one target until the time is up or something is found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("target", choices=TARGETS, nargs="?")
    parser.add_argument("--list", action="store_true", help="print what can run here")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--directory", type=Path, default=Path(".cache/fuzz"))
    parser.add_argument("--input", type=Path, help="run this one input instead")
    options = parser.parse_args(argv)
    if options.list:
        print(*C_TARGETS, *(PYTHON_TARGETS if find_spec("atheris") else ()))
        return 0
    if options.target is None:
        parser.error(f"name a target: one of {', '.join(TARGETS)}")
    options.directory.mkdir(parents=True, exist_ok=True)
    if options.input is not None:
        command = [*target(options.target, options.directory), str(options.input)]
        return subprocess.run(command, check=False).returncode
    fuzz(options.target, options.directory, [f"-max_total_time={options.seconds}"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
