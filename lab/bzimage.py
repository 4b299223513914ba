# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Unpacks a bzImage to the ELF kernel in it, as far as the standard library can.

The emulated machine then boots the ELF by its PVH entry, and does not spend seconds of emulated
CPU time on unpacking a kernel that this machine unpacks in a fraction of one.
"""

import gzip
import lzma
import struct
from typing import Final

# Linux Documentation/arch/x86/boot.rst, "The real-mode kernel header".
SETUP_SECTS_AT: Final = 0x1F1
HEADER_MAGIC_AT: Final = 0x202
PAYLOAD_AT: Final = 0x248  # u32 offset and u32 length, from the start of the protected-mode part
SECTOR_BYTES: Final = 512


def unpack(image: bytes) -> bytes | None:
    """Return the ELF kernel in a bzImage, or None if it is packed in a way unknown here.

    Args:
        image: A bzImage of a package that is trusted; not for images that users bring.
    """
    if image[HEADER_MAGIC_AT : HEADER_MAGIC_AT + 4] != b"HdrS":
        return None
    start = (image[SETUP_SECTS_AT] + 1) * SECTOR_BYTES
    offset, length = struct.unpack_from("<II", image, PAYLOAD_AT)
    payload = image[start + offset : start + offset + length]
    # The last four bytes are the unpacked size, put there by the kernel's build.
    if payload.startswith(b"\xfd7zXZ\0"):
        kernel = lzma.decompress(payload[:-4])
    elif payload.startswith(b"\x1f\x8b"):
        kernel = gzip.decompress(payload[:-4])
    else:
        return None
    return kernel if kernel.startswith(b"\x7fELF") else None
