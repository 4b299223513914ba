# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Take kernels and images into their stores, from a file or from an upload, and clone disks.

A store is a directory of its own:

    <store>/<sha256>/original, vmlinux, meta.json     a kernel; the sha256 is that of original
    <store>/<sha256>/image                            a disk image or an initrd

The same bytes are kept once, whatever name a client gives them; who deletes a name has to see
whether another one uses them. Everything here blocks: hosteld runs it in threads.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final

from daemon.images import bzimage
from daemon.images.copying import (
    Cancel,
    Progress,
    SparseWriter,
    copy_hashed,
    copy_sparse,
    hash_shared,
    never,
    no_progress,
    reflink,
)
from daemon.images.elf import ElfKernel, find_banner, parse_elf
from daemon.images.errors import DigestMismatch, FitError, SourceError, StorageError
from daemon.images.records import (
    IMAGE_NAME,
    META_NAME,
    VMLINUX_NAME,
    Entry,
    ImageRecord,
    KernelRecord,
    load_image,
    load_kernel,
)
from daemon.images.sniff import HEAD_BYTES, refuse_foreign_disk, refuse_foreign_kernel
from daemon.images.source import open_source
from daemon.images.staging import StagingDirectory, storing, sync_directory

# A vmlinux with all its debug information is larger; strip it.
MAX_KERNEL_FILE_BYTES: Final = 512 << 20
ORIGINAL_NAME: Final = "original"
SECTOR_BYTES: Final = 512
# A kernel's zeros are worth finding page by page: what is a hole is neither read at a VM's start
# nor backed by memory in it. A disk would only be fragmented by that.
_KERNEL_BLOCK_BYTES: Final = 4096
_IMAGE_BLOCK_BYTES: Final = 64 << 10

SourceArg = str | os.PathLike[str] | int


def import_kernel(
    source: SourceArg,
    dest_dir: Path,
    *,
    expected_sha256: str | None = None,
    progress: Progress = no_progress,
    cancelled: Cancel = never,
) -> KernelRecord:
    """Take in a kernel: copy it, unpack it if it is a bzImage, check it, put it in place.

    Bytes that are in the store already are not unpacked again.

    Args:
        source: path, or open descriptor (the caller's; its offset is moved).
        dest_dir: the store of kernels.
        expected_sha256: refuse the file if it differs; lower-case hex.
        progress: bytes copied of the file's size, then packed bytes unpacked of the payload's.
        cancelled: asked every MiB or so.

    Raises:
        ImageError: any of its kinds; nothing is left behind.
    """
    with open_source(source) as opened, StagingDirectory(dest_dir) as staging:
        _check_kernel_size(opened.size_bytes)
        with storing(dest_dir):
            fd = staging.create(ORIGINAL_NAME)
            writer = SparseWriter(fd, _KERNEL_BLOCK_BYTES)
            digest = copy_hashed(opened, writer, progress=progress, cancelled=cancelled)
        _check_digest(expected_sha256, digest)
        return _take_kernel(dest_dir, staging, fd, digest, progress, cancelled)


def import_image(
    source: SourceArg,
    dest_dir: Path,
    *,
    is_disk: bool,
    expected_sha256: str | None = None,
    progress: Progress = no_progress,
    cancelled: Cancel = never,
) -> ImageRecord:
    """Take in a raw disk image or an initrd.

    Args:
        source: path, or open descriptor (the caller's; its offset is moved).
        dest_dir: the store of images.
        is_disk: refuse the disk formats of other programs.
        expected_sha256: refuse the file if it differs; lower-case hex.
        progress: bytes done of the file's size.
        cancelled: asked every MiB or so.

    Raises:
        ImageError: any of its kinds but KernelFormatError; nothing is left behind.
    """
    with open_source(source) as opened, StagingDirectory(dest_dir) as staging:
        if is_disk:
            refuse_foreign_disk(opened.read(0, HEAD_BYTES))
        with storing(dest_dir):
            fd = staging.create(IMAGE_NAME)
            if reflink(opened.fd, fd):
                digest = hash_shared(opened, fd, progress=progress, cancelled=cancelled)
            else:
                writer = SparseWriter(fd, _IMAGE_BLOCK_BYTES)
                digest = copy_hashed(opened, writer, progress=progress, cancelled=cancelled)
        _check_digest(expected_sha256, digest)
        return _take_image(dest_dir, staging, fd, digest)


class UploadSink(ABC):
    """Takes the body of an upload piece by piece; ends with finish() or abort().

    Args:
        dest_dir: the store.
        expected_sha256: refuse the bytes if they differ; lower-case hex.

    Threads: one at a time, not always the same one.
    """

    _FILE_NAME: str
    _BLOCK_BYTES: int

    def __init__(self, dest_dir: Path, *, expected_sha256: str | None = None) -> None:
        self._store = dest_dir
        self._expected = expected_sha256
        self._digest = hashlib.sha256()
        self._staging = StagingDirectory(dest_dir)
        try:
            with storing(dest_dir):
                self._fd = self._staging.create(self._FILE_NAME)
        except StorageError:
            self._staging.discard()
            raise
        self._writer = SparseWriter(self._fd, self._BLOCK_BYTES)

    @property
    def size_bytes(self) -> int:
        """How much has been taken."""
        return self._writer.size_bytes

    def write(self, chunk: bytes) -> None:
        """Take the next piece.

        Raises:
            ImageError: it cannot be kept, or it is too much; abort() then.
        """
        self._check(chunk)
        self._digest.update(chunk)
        with storing(self._store):
            self._writer.write(chunk)

    def abort(self) -> None:
        """Remove what has come; safe after finish() and to call twice."""
        self._staging.discard()

    def _complete(self) -> str:
        if self.size_bytes == 0:
            raise SourceError("source_empty", "the body is empty")
        with storing(self._store):
            self._writer.finish()
        digest = self._digest.hexdigest()
        _check_digest(self._expected, digest)
        return digest

    @abstractmethod
    def _check(self, chunk: bytes) -> None:
        """Refuse the next piece before it is written."""


class KernelUpload(UploadSink):
    """The upload of a kernel."""

    _FILE_NAME = ORIGINAL_NAME
    _BLOCK_BYTES = _KERNEL_BLOCK_BYTES

    def finish(
        self, *, progress: Progress = no_progress, cancelled: Cancel = never
    ) -> KernelRecord:
        """Unpack and check the kernel and put it in place.

        Args:
            progress: packed bytes unpacked of the payload's.
            cancelled: asked every MiB or so.

        Raises:
            ImageError: any of its kinds; nothing is left behind.
        """
        with self._staging:
            digest = self._complete()
            return _take_kernel(self._store, self._staging, self._fd, digest, progress, cancelled)

    def _check(self, chunk: bytes) -> None:
        _check_kernel_size(self.size_bytes + len(chunk))


class ImageUpload(UploadSink):
    """The upload of a raw disk image or an initrd.

    Args:
        is_disk: refuse the disk formats of other programs.
    """

    _FILE_NAME = IMAGE_NAME
    _BLOCK_BYTES = _IMAGE_BLOCK_BYTES

    def __init__(
        self, dest_dir: Path, *, is_disk: bool, expected_sha256: str | None = None
    ) -> None:
        super().__init__(dest_dir, expected_sha256=expected_sha256)
        self._is_disk = is_disk

    def finish(self) -> ImageRecord:
        """Put the image in place.

        Raises:
            ImageError: any of its kinds but KernelFormatError; nothing is left behind.
        """
        with self._staging:
            digest = self._complete()
            return _take_image(self._store, self._staging, self._fd, digest)

    def _check(self, chunk: bytes) -> None:
        # Only the first piece, and what of it came: enough to spare a long upload for nothing.
        if self._is_disk and self.size_bytes == 0:
            refuse_foreign_disk(chunk[:HEAD_BYTES])


def clone_disk(
    image: Path,
    dest: Path,
    size_bytes: int,
    *,
    progress: Progress = no_progress,
    cancelled: Cancel = never,
) -> None:
    """Make a VM's own writable copy of a disk image, by sharing its blocks where that works.

    Args:
        image: a raw image.
        dest: the new file, which must not exist; its directory must.
        size_bytes: of the new disk; rounded up to whole sectors.
        progress: bytes done of the image's size; not called where blocks are shared.
        cancelled: asked every 64 MiB or so.

    Raises:
        FitError: the image is larger than that.
        ImageError: the image cannot be read, the copy cannot be written, or ``dest`` exists.
    """
    with open_source(image) as source:
        if size_bytes < source.size_bytes:
            raise FitError(
                "disk_too_small",
                f"a disk of {size_bytes} bytes cannot hold its image of {source.size_bytes} bytes",
                field="size_mib",
            )
        with StagingDirectory(dest.parent) as staging, storing(dest.parent):
            fd = staging.create(dest.name)
            copy_sparse(source, fd, progress=progress, cancelled=cancelled)
            os.ftruncate(fd, -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES)
            os.fsync(fd)
            # link() and not rename(): a disk that exists is somebody's data.
            os.link(staging.path / dest.name, dest)
            sync_directory(dest.parent)


def _take_kernel(
    store: Path,
    staging: StagingDirectory,
    original_fd: int,
    sha256: str,
    progress: Progress,
    cancelled: Cancel,
) -> KernelRecord:
    known = load_kernel(store, sha256)
    if known is not None:
        return known
    with storing(store):
        record = _make_record(store, staging, original_fd, sha256, progress, cancelled)
        with open(staging.create(META_NAME), "wb", closefd=False) as meta:
            meta.write(record.encode())
    staging.place(sha256)
    return record


def _make_record(
    store: Path,
    staging: StagingDirectory,
    original_fd: int,
    sha256: str,
    progress: Progress,
    cancelled: Cancel,
) -> KernelRecord:
    refuse_foreign_kernel(os.pread(original_fd, HEAD_BYTES, 0))
    header = bzimage.read_setup_header(original_fd)
    compression: str | None = None
    if header is None:
        vmlinux_fd = original_fd
        os.link(staging.path / ORIGINAL_NAME, staging.path / VMLINUX_NAME)
    else:
        vmlinux_fd = staging.create(VMLINUX_NAME)
        writer = SparseWriter(vmlinux_fd, _KERNEL_BLOCK_BYTES)
        compression = bzimage.unpack(
            original_fd, header, writer.write, progress=progress, cancelled=cancelled
        )
        writer.finish()
    elf = parse_elf(vmlinux_fd)
    banner = find_banner(vmlinux_fd)
    return KernelRecord(
        sha256=sha256,
        size_bytes=os.fstat(original_fd).st_size,
        format="elf" if header is None else "bzImage",
        compression=compression,
        entry=_choose_entry(elf, is_linux=header is not None or banner is not None),
        banner=banner,
        setup_header="" if header is None else header.raw.hex(),
        elf=elf,
        path=store / sha256 / VMLINUX_NAME,
    )


def _choose_entry(elf: ElfKernel, *, is_linux: bool) -> Entry:
    # Linux has both; its 64-bit entry has less to do. What else carries the PVH note expects it.
    if elf.linux64_gpa is not None and (is_linux or elf.pvh_gpa is None):
        return "linux64"
    return "pvh"


def _take_image(store: Path, staging: StagingDirectory, fd: int, sha256: str) -> ImageRecord:
    with storing(store):
        size_bytes = os.fstat(fd).st_size
    if load_image(store, sha256) is None:
        staging.place(sha256)
    return ImageRecord(sha256, size_bytes, store / sha256 / IMAGE_NAME)


def _check_kernel_size(size_bytes: int) -> None:
    if size_bytes > MAX_KERNEL_FILE_BYTES:
        raise SourceError(
            "source_too_large",
            f"a kernel file must have at most {MAX_KERNEL_FILE_BYTES} bytes: strip its debug "
            "information",
            field="path",
        )


def _check_digest(expected: str | None, actual: str) -> None:
    if expected is not None and expected != actual:
        raise DigestMismatch(expected, actual)
