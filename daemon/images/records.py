# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What is known of an imported kernel or image, and how a kernel's record is kept on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

from daemon.images.elf import ElfKernel, Segment
from daemon.images.errors import StorageError
from daemon.images.staging import storing

_META_VERSION: Final = 1
META_NAME: Final = "meta.json"
VMLINUX_NAME: Final = "vmlinux"
IMAGE_NAME: Final = "image"

Entry = Literal["linux64", "pvh"]


@dataclass(frozen=True, slots=True)
class KernelRecord:
    """An imported kernel.

    Attributes:
        sha256: of the file as it came.
        size_bytes: of the file as it came.
        format: what it came as.
        compression: of a bzImage's payload; "none" if stored, None for an ELF file.
        entry: how to enter it.
        banner: the kernel's own version text, or None.
        setup_header: SetupHeader.raw in hex, empty for an ELF file.
        elf: what to load, and where.
        path: the ELF file to load from.
    """

    sha256: str
    size_bytes: int
    format: Literal["bzImage", "elf"]
    compression: str | None
    entry: Entry
    banner: str | None
    setup_header: str
    elf: ElfKernel
    path: Path

    def encode(self) -> bytes:
        """Return the record as JSON, without its path."""
        meta = asdict(self)
        del meta["path"]
        meta["elf"] = {
            "segments": [segment._asdict() for segment in self.elf.segments],
            "linux64_gpa": self.elf.linux64_gpa,
            "pvh_gpa": self.elf.pvh_gpa,
        }
        return json.dumps({"meta_version": _META_VERSION} | meta, indent=1).encode()


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An imported image; read-only.

    Attributes:
        sha256: of its bytes, holes read as zeros.
        size_bytes: its length.
        path: the file.
    """

    sha256: str
    size_bytes: int
    path: Path


def load_kernel(store: Path, sha256: str) -> KernelRecord | None:
    """Return a kernel of the store, or None.

    Raises:
        StorageError: it is there and cannot be read.
    """
    directory = store / sha256
    with storing(store):
        try:
            meta = (directory / META_NAME).read_bytes()
        except FileNotFoundError:
            return None
    try:
        return _decode(json.loads(meta), directory)
    except (ValueError, TypeError, KeyError) as err:
        raise StorageError(
            "store_damaged",
            f"{directory / META_NAME}: {err!r}: delete the kernel and import it again",
            None,
        ) from err


def load_image(store: Path, sha256: str) -> ImageRecord | None:
    """Return an image of the store, or None.

    Raises:
        StorageError: it is there and cannot be read.
    """
    path = store / sha256 / IMAGE_NAME
    with storing(store):
        try:
            return ImageRecord(sha256, path.stat().st_size, path)
        except FileNotFoundError:
            return None


def _decode(meta: dict[str, Any], directory: Path) -> KernelRecord:
    if meta["meta_version"] != _META_VERSION:
        raise ValueError(f"meta_version is {meta['meta_version']}, must be {_META_VERSION}")
    elf = meta["elf"]
    segments = tuple(Segment(**segment) for segment in elf["segments"])
    names = {item.name for item in fields(KernelRecord)} - {"elf", "path"}
    return KernelRecord(
        elf=ElfKernel(segments, elf["linux64_gpa"], elf["pvh_gpa"]),
        path=directory / VMLINUX_NAME,
        **{name: meta[name] for name in names},
    )
