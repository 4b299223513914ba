# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What taking in, keeping and loading a kernel or an image can fail with.

ImageError            .code (stable), .detail (one sentence with the value and what to do), .field
 +- KernelFormatError not a kernel that can be entered, or a corrupt one: .offset
 +- SourceError       the source is missing, of the wrong kind, unreadable, too large, or changed
 +- DigestMismatch    the bytes are not those that the client named
 +- StorageError      the state directory is full, read-only or broken: .errno
 +- Cancelled         the caller asked to stop
 +- FitError          kernel, initrd and cmdline do not fit the VM that they are for
"""

from __future__ import annotations


class ImageError(Exception):
    """Base: ``field`` is the member of the request that is at fault, None where none is."""

    def __init__(self, code: str, detail: str, *, field: str | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.field = field


class KernelFormatError(ImageError):
    """The file is no kernel that Hostel can enter; ``offset`` is where in it that shows."""

    def __init__(self, detail: str, *, offset: int | None = None) -> None:
        where = "" if offset is None else f" (at byte {offset:#x})"
        super().__init__("kernel_format", detail + where, field="path")
        self.offset = offset


class SourceError(ImageError):
    """The source of an import cannot be read as it has to be."""


class DigestMismatch(ImageError):
    """The bytes have another sha256 than the client named."""

    def __init__(self, expected: str, actual: str) -> None:
        super().__init__(
            "sha256_mismatch",
            f"sha256 is {actual}, the request said {expected}: fetch the file again, or correct "
            "the request",
            field="sha256",
        )


class StorageError(ImageError):
    """The state directory could not take what was to be written."""

    def __init__(self, code: str, detail: str, errno: int | None) -> None:
        super().__init__(code, detail)
        self.errno = errno


class Cancelled(ImageError):
    """The caller's ``cancelled`` said so; nothing is left behind."""

    def __init__(self) -> None:
        super().__init__("cancelled", "cancelled; nothing was kept")


class FitError(ImageError):
    """Kernel, initrd and cmdline do not fit the VM."""
