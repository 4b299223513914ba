# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The setup header of a Linux bzImage: what the kernel tells a boot loader about itself.

Light enough for a worker to import: the header travels to it beside the unpacked kernel, because
its fields (and ones that later kernels add) go into the zero page as they are.

Source: Linux Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from daemon.images.errors import KernelFormatError

# Offsets in the file, and in struct boot_params.
HDR_START: Final = 0x1F1
HDR_SETUP_SECTS: Final = 0x1F1
HDR_BOOT_FLAG: Final = 0x1FE
HDR_JUMP_LENGTH: Final = 0x201
HDR_MAGIC: Final = 0x202
HDR_VERSION: Final = 0x206
HDR_TYPE_OF_LOADER: Final = 0x210
HDR_LOADFLAGS: Final = 0x211
HDR_RAMDISK_IMAGE: Final = 0x218
HDR_RAMDISK_SIZE: Final = 0x21C
HDR_CMD_LINE_PTR: Final = 0x228
HDR_INITRD_ADDR_MAX: Final = 0x22C
HDR_KERNEL_ALIGNMENT: Final = 0x230
HDR_CMDLINE_SIZE: Final = 0x238
HDR_PAYLOAD_OFFSET: Final = 0x248
HDR_PAYLOAD_LENGTH: Final = 0x24C
# In struct boot_params another field starts here, so a header ends before it.
HDR_LIMIT: Final = 0x290

BOOT_FLAG: Final = 0xAA55
MAGIC: Final = b"HdrS"
LOADED_HIGH: Final = 1
# 2.08 brought payload_offset and payload_length (Linux 2.6.26).
MIN_VERSION: Final = 0x0208


@dataclass(frozen=True, slots=True)
class SetupHeader:
    """The bytes of a bzImage from 0x1f1 to the end of its header; client-controlled."""

    raw: bytes

    @classmethod
    def parse(cls, head: bytes) -> SetupHeader | None:
        """Find the header in the first 0x290 bytes of a file; None without one.

        Raises:
            KernelFormatError: there is one, but it is too old or contradicts itself.
        """
        if len(head) < HDR_LIMIT or head[HDR_MAGIC : HDR_MAGIC + 4] != MAGIC:
            return None
        end = HDR_MAGIC + head[HDR_JUMP_LENGTH]
        header = cls(head[HDR_START : min(end, HDR_LIMIT)])
        version = int.from_bytes(head[HDR_VERSION : HDR_VERSION + 2], "little")
        if version < MIN_VERSION:
            raise KernelFormatError(
                f"boot protocol {version >> 8}.{version & 0xFF:02}, must be at least 2.08 "
                "(Linux 2.6.26)",
                offset=HDR_VERSION,
            )
        if not HDR_PAYLOAD_LENGTH + 4 <= end <= HDR_LIMIT:
            raise KernelFormatError(
                f"the setup header ends at {end:#x}, must end at "
                f"{HDR_PAYLOAD_LENGTH + 4:#x}..{HDR_LIMIT:#x}",
                offset=HDR_JUMP_LENGTH,
            )
        if not head[HDR_LOADFLAGS] & LOADED_HIGH:
            raise KernelFormatError("a zImage, must be a bzImage", offset=HDR_LOADFLAGS)
        return header

    @property
    def payload_at(self) -> int:
        """Offset in the file of the packed kernel."""
        # boot.rst: "For backwards compatibility, if the setup_sects field contains 0, the real
        # value is 4"; the boot sector comes on top.
        sectors = (self.raw[HDR_SETUP_SECTS - HDR_START] or 4) + 1
        return sectors * 512 + self._u32(HDR_PAYLOAD_OFFSET)

    @property
    def payload_bytes(self) -> int:
        """Length of the packed kernel."""
        return self._u32(HDR_PAYLOAD_LENGTH)

    @property
    def initrd_addr_max(self) -> int:
        """The highest address that a byte of the initrd may have."""
        return self._u32(HDR_INITRD_ADDR_MAX)

    @property
    def cmdline_max_bytes(self) -> int:
        """The longest command line, without its NUL."""
        return self._u32(HDR_CMDLINE_SIZE)

    def _u32(self, offset: int) -> int:
        value: int = struct.unpack_from("<I", self.raw, offset - HDR_START)[0]
        return value
