# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Imports and deletes of kernels and images; the work itself is daemon/images, in threads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, Literal

from api.errors import Conflict
from api.models.common import ObjectRef
from api.models.resources import Image, ImageImport, Kernel, KernelImport
from api.ports import Call

from ..images import importer
from ..images import records as kept
from ..images.errors import StorageError
from ..images.staging import claim, is_unclaimed, remove_stored, sweep_staging
from .dirs import Layout
from .library import Library
from .operations import Job
from .records import KernelRecord, now
from .store import StoreFull
from .vm_table import VmTable

log = logging.getLogger(__name__)

# A request's body comes in pieces of up to 64 KiB; a thread takes it in larger ones.
PIECE_BYTES: Final = 1 << 20
IMPORTS_AT_ONCE: Final = 2

_SHA256: Final = re.compile(r"[0-9a-f]{64}")

ImageKind = Literal["disk", "initrd"]
KernelWork = Callable[[Job], Awaitable[Kernel]]
ImageWork = Callable[[Job], Awaitable[Image]]


class Importer:
    """Takes kernels and images in, and removes them.

    Threads: the event loop's; everything that touches files runs in others.
    """

    def __init__(self, library: Library, table: VmTable, layout: Layout) -> None:
        self._library = library
        self._table = table
        self._layout = layout
        # A delete must not take away the bytes that an import has just found to be there already:
        # while one runs, what nobody needs any more waits here.
        # Of its own, so that long copies do not keep the starts of VMs waiting for a thread.
        self._threads = ThreadPoolExecutor(IMPORTS_AT_ONCE, "import")
        self._running = 0
        self._removing = asyncio.Lock()
        self._doomed: set[tuple[Path, str]] = set()

    async def sweep(self) -> None:
        """Remove what killed imports and deletes have left; before the first import.

        Raises:
            StorageError: the directories cannot be listed, or not be written.
        """
        for directory in (self._layout.kernels, self._layout.images):
            count = await asyncio.to_thread(sweep_staging, directory)
            if count:
                log.info("staging swept directory=%s count=%d", directory, count)
            doomed = await self._library.doomed(self._kind_of(directory))
            self._doomed |= {(directory, sha256) for sha256 in doomed if _SHA256.fullmatch(sha256)}
            for path in directory.iterdir():
                self._look_at(directory, path.name)
        await self._remove_doomed()

    def _look_at(self, directory: Path, name: str) -> None:
        """Doom what a killed import put in place and nobody knows of; keep all else."""
        is_ours = _SHA256.fullmatch(name) is not None and is_unclaimed(directory, name)
        if self._uses_of(directory, name):
            if is_ours:
                claim(directory, name)
        elif is_ours:
            log.warning("left by a killed import, removed path=%s/%s", directory, name)
            self._doomed.add((directory, name))
        elif (directory, name) not in self._doomed:
            # The database may be new, or restored from a backup: what it does not know may well
            # be all that somebody has.
            log.warning("no kernel or image stands for this, kept path=%s/%s", directory, name)

    async def _remove_doomed(self) -> None:
        """Remove the bytes that no name stands for, unless an import may be about to use them."""
        async with self._removing:
            while self._doomed and not self._running:
                directory, sha256 = self._doomed.pop()
                if not self._uses_of(directory, sha256) and (directory / sha256).exists():
                    await asyncio.to_thread(remove_stored, directory, sha256)
                try:
                    await self._library.forget_doomed(self._kind_of(directory), sha256)
                except StoreFull as err:
                    log.warning("looked at again at the next start path=%s error=%s", sha256, err)

    def _kind_of(self, directory: Path) -> str:
        return "kernel" if directory == self._layout.kernels else "image"

    def _uses_of(self, directory: Path, sha256: str) -> int:
        if directory == self._layout.kernels:
            return self._library.kernels.uses_of(sha256)
        return self._library.images.uses_of(sha256)

    @contextlib.asynccontextmanager
    async def _importing(self) -> AsyncIterator[None]:
        async with self._removing:
            self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            try:
                await self._remove_doomed()
            except StorageError as err:
                log.warning("unused files stay until the next start error=%s", err)

    @contextlib.asynccontextmanager
    async def _claiming(self, directory: Path, sha256: str) -> AsyncIterator[None]:
        """Around the commit of what stands for bytes that are in place: without it they go."""
        try:
            yield
        except BaseException:
            if is_unclaimed(directory, sha256):
                self._doomed.add((directory, sha256))
            raise
        try:
            claim(directory, sha256)
        except StorageError as err:
            log.warning("claimed at the next start path=%s error=%s", sha256, err)

    def close(self) -> None:
        """Wait for the copies that have been asked to stop."""
        self._threads.shutdown()

    # --- kernels

    def import_kernel(self, wanted: KernelImport, call: Call) -> tuple[Job, KernelWork]:
        """Return the job that imports a kernel; its name is kept for it.

        Raises:
            Conflict: the name is taken.
        """
        self._library.kernels.reserve(wanted.name)
        job = Job("kernel.import", _about("kernel", wanted.name), may_cancel=True)
        return job, partial(self._import_kernel, wanted, call)

    async def _import_kernel(self, wanted: KernelImport, call: Call, job: Job) -> Kernel:
        take = partial(
            importer.import_kernel,
            wanted.path,
            self._layout.kernels,
            expected_sha256=wanted.sha256,
            progress=job.progress,
            cancelled=job.cancelled.is_set,
        )
        return await self._keep_kernel(wanted.name, take, call, job)

    async def receive_kernel(
        self, name: str, sha256: str | None, body: AsyncIterator[bytes], call: Call
    ) -> tuple[Job, KernelWork]:
        """Take an upload in and return the job that makes a kernel of it.

        Raises:
            Conflict: the name is taken.
            ImageError: it cannot be kept.
        """
        self._library.kernels.reserve(name)
        try:
            sink = await asyncio.to_thread(
                importer.KernelUpload, self._layout.kernels, expected_sha256=sha256
            )
            await _fill(sink, body)
        except BaseException:
            self._library.kernels.release(name)
            raise
        job = Job("kernel.import", _about("kernel", name), may_cancel=True)
        finish = partial(sink.finish, progress=job.progress, cancelled=job.cancelled.is_set)

        async def work(job: Job) -> Kernel:
            return await self._keep_kernel(name, finish, call, job)

        return job, work

    async def _keep_kernel(
        self, name: str, take: Callable[[], kept.KernelRecord], call: Call, job: Job
    ) -> Kernel:
        try:
            async with self._importing():
                loop = asyncio.get_running_loop()
                stored = await loop.run_in_executor(self._threads, take)
                kernel = Kernel(
                    id=job.about.id,
                    name=name,
                    sha256=stored.sha256,
                    size_bytes=stored.size_bytes,
                    format=stored.format,
                    compression=stored.compression,
                    entry=stored.entry,
                    banner=stored.banner,
                    created_at=now(),
                    version=1,
                )
                record = KernelRecord(kernel, stored.setup_header)
                async with self._claiming(self._layout.kernels, stored.sha256):
                    await self._library.insert_kernel(record, call.actor)
        finally:
            self._library.kernels.release(name)
        log.info("kernel imported name=%s sha256=%s", name, kernel.sha256)
        return kernel

    async def delete_kernel(self, ref: str, call: Call) -> None:
        """Delete a kernel that no VM uses.

        Raises:
            ApiError: there is none, or it is in use.
        """
        kernel = self._library.kernels.get(ref)
        self._library.kernels.check_idle(kernel)
        users = [e.record.name for e in self._table if e.record.kernel_id == kernel.id]
        _check_unused("kernel", kernel.name, users)
        await self._library.kernels.remove(kernel, call.actor)
        self._doomed.add((self._layout.kernels, kernel.sha256))
        await self._remove_doomed()

    # --- images

    def import_image(self, wanted: ImageImport, call: Call) -> tuple[Job, ImageWork]:
        """Return the job that imports an image; its name is kept for it.

        Raises:
            Conflict: the name is taken.
        """
        self._library.images.reserve(wanted.name)
        job = Job("image.import", _about("image", wanted.name), may_cancel=True)
        return job, partial(self._import_image, wanted, call)

    async def _import_image(self, wanted: ImageImport, call: Call, job: Job) -> Image:
        take = partial(
            importer.import_image,
            wanted.path,
            self._layout.images,
            is_disk=wanted.kind == "disk",
            expected_sha256=wanted.sha256,
            progress=job.progress,
            cancelled=job.cancelled.is_set,
        )
        return await self._keep_image(wanted.name, wanted.kind, take, call, job)

    async def receive_image(
        self,
        name: str,
        kind: ImageKind,
        sha256: str | None,
        body: AsyncIterator[bytes],
        call: Call,
    ) -> tuple[Job, ImageWork]:
        """Take an upload in and return the job that makes an image of it.

        Raises:
            Conflict: the name is taken.
            ImageError: it cannot be kept.
        """
        self._library.images.reserve(name)
        try:
            sink = await asyncio.to_thread(
                importer.ImageUpload,
                self._layout.images,
                is_disk=kind == "disk",
                expected_sha256=sha256,
            )
            await _fill(sink, body)
        except BaseException:
            self._library.images.release(name)
            raise
        job = Job("image.import", _about("image", name), may_cancel=False)

        async def work(job: Job) -> Image:
            return await self._keep_image(name, kind, sink.finish, call, job)

        return job, work

    async def _keep_image(
        self,
        name: str,
        kind: ImageKind,
        take: Callable[[], kept.ImageRecord],
        call: Call,
        job: Job,
    ) -> Image:
        try:
            async with self._importing():
                loop = asyncio.get_running_loop()
                stored = await loop.run_in_executor(self._threads, take)
                image = Image(
                    id=job.about.id,
                    name=name,
                    kind=kind,
                    sha256=stored.sha256,
                    size_bytes=stored.size_bytes,
                    created_at=now(),
                    version=1,
                )
                async with self._claiming(self._layout.images, stored.sha256):
                    await self._library.insert_image(image, call.actor)
        finally:
            self._library.images.release(name)
        log.info("image imported name=%s kind=%s sha256=%s", name, kind, image.sha256)
        return image

    async def delete_image(self, ref: str, call: Call) -> None:
        """Delete an image that no VM uses; a disk that was copied from it is no use.

        Raises:
            ApiError: there is none, or it is in use.
        """
        image = self._library.images.get(ref)
        self._library.images.check_idle(image)
        users = [
            entry.record.name
            for entry in self._table
            if entry.record.initrd_id == image.id
            or any(disk.image_id == image.id and not disk.is_own for disk in entry.record.disks)
        ]
        _check_unused("image", image.name, users)
        await self._library.images.remove(image, call.actor)
        self._doomed.add((self._layout.images, image.sha256))
        await self._remove_doomed()


async def _fill(sink: importer.UploadSink, body: AsyncIterator[bytes]) -> None:
    """Write a request's body into a sink, which is removed if that fails."""
    try:
        pieces, size_bytes = [], 0
        async for chunk in body:
            pieces.append(chunk)
            size_bytes += len(chunk)
            if size_bytes >= PIECE_BYTES:
                await asyncio.to_thread(sink.write, b"".join(pieces))
                pieces, size_bytes = [], 0
        if size_bytes:
            await asyncio.to_thread(sink.write, b"".join(pieces))
    except BaseException:
        await asyncio.shield(asyncio.to_thread(sink.abort))
        raise


def _about(kind: Literal["kernel", "image"], name: str) -> ObjectRef:
    return ObjectRef(kind=kind, id=str(uuid.uuid4()), name=name)


def _check_unused(kind: str, name: str, users: list[str]) -> None:
    if users:
        named = ", ".join(sorted(users)[:5]) + (" and others" if len(users) > 5 else "")
        raise Conflict("in_use", f"{kind} {name} is used by VM {named}; delete that first")
