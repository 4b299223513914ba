# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The host's end of vsock streams, and the pattern that guest/vsock.c sends."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final

LIMIT_S: Final = 240.0


def connect(path: Path, port: int) -> socket.socket:
    """Connect to a port of the guest.

    Raises:
        ConnectionError: it was refused.
    """
    stream = socket.socket(socket.AF_UNIX)
    try:
        stream.settimeout(LIMIT_S)
        stream.connect(str(path))
        stream.sendall(f"CONNECT {port}\n".encode())
        line = b""
        while not line.endswith(b"\n"):
            byte = stream.recv(1)
            if not byte:
                raise ConnectionError(f"{path}: port {port} was refused")
            line += byte
    except BaseException:
        stream.close()
        raise
    assert line.startswith(b"OK "), line
    return stream


def connect_by_vhost(cid: int, port: int) -> socket.socket:
    """Connect to a port of a guest that vhost serves."""
    stream = socket.socket(socket.AF_VSOCK)
    try:
        stream.settimeout(LIMIT_S)
        stream.connect((cid, port))
    except BaseException:
        stream.close()
        raise
    return stream


def read_exactly(stream: socket.socket, length: int) -> bytes:
    """So many bytes, or fewer where the stream ends before."""
    data = bytearray()
    while len(data) < length and (piece := stream.recv(length - len(data))):
        data += piece
    return bytes(data)


def read_to_end(stream: socket.socket) -> bytes:
    data = bytearray()
    while piece := stream.recv(1 << 16):
        data += piece
    return bytes(data)


def pattern(length: int) -> bytes:
    """What guest/vsock.c fills its chunks with."""
    # Repeats after 2**19 bytes: bits 11 to 18 of a product with an odd number.
    period = bytes(i * 2654435761 >> 11 & 0xFF for i in range(min(length, 1 << 19)))
    return (period * (length // len(period) + 1))[:length]


def checksum(data: bytes) -> int:
    """FNV-1a of 64 bits."""
    total = 0xCBF29CE484222325
    for byte in data:
        total = (total ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return total
