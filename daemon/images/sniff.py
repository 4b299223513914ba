# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Name the usual mistakes: a file of another kind than the wanted one, by its first bytes."""

from __future__ import annotations

from typing import Final

from daemon.images.elf import ELF_MAGIC
from daemon.images.errors import KernelFormatError, SourceError
from daemon.images.setup_header import HDR_MAGIC, MAGIC

# How much of a file the checks here look at.
HEAD_BYTES: Final = 1024

# (offset, bytes, what it is)
_Signatures = tuple[tuple[int, bytes, str], ...]
_NOT_KERNELS: Final[_Signatures] = (
    (0x38, b"ARM\x64", "a kernel for ARM64"),
    (0, b"MZ", "an EFI program without a Linux setup header; of a unified kernel image, take the "
     "section .linux: objcopy -O binary --only-section=.linux"),
    (0, b"\x1f\x8b", "a gzip file; unpack it"),
    (0, b"\xfd7zXZ", "an xz file; unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file; unpack it"),
    (0, b"!<arch>", "an archive or a .deb package; give the vmlinuz in it"),
    (0, b"\xed\xab\xee\xdb", "an RPM package; give the vmlinuz in it"),
    (0, b"070701", "a cpio archive, such as an initrd"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
)  # fmt: skip
_NOT_RAW_DISKS: Final[_Signatures] = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
)


def refuse_foreign_kernel(head: bytes) -> None:
    """Say what a file is that is neither a bzImage nor ELF.

    Args:
        head: the first HEAD_BYTES, or all that there are; client-controlled.

    Raises:
        KernelFormatError: always, unless it may be one of the two.
    """
    if head.startswith(ELF_MAGIC) or head[HDR_MAGIC : HDR_MAGIC + len(MAGIC)] == MAGIC:
        return
    what = _find(_NOT_KERNELS, head) or f"a file that starts with {head[:4].hex(' ')}"
    raise KernelFormatError(f"must be a bzImage (vmlinuz) or an ELF kernel (vmlinux), is {what}")


def refuse_foreign_disk(head: bytes) -> None:
    """Refuse a disk image in a format that a guest would see as garbage.

    Args:
        head: the first HEAD_BYTES, or all that there are; client-controlled.

    Raises:
        SourceError: it is in one of the usual formats of other programs.
    """
    found = _find(_NOT_RAW_DISKS, head)
    if found is not None:
        raise SourceError(
            "image_not_raw",
            f"a {found} image, must be raw: qemu-img convert -f {found} -O raw IN OUT",
            field="path",
        )


def _find(signatures: _Signatures, head: bytes) -> str | None:
    for offset, magic, name in signatures:
        if head[offset : offset + len(magic)] == magic:
            return name
    return None
