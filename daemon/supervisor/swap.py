# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Put another file behind a disk, while its VM runs and while it is at rest.

The record has the new file before the worker is asked to take it, with its number, and keeps the
old one beside it. Whatever becomes of hosteld or of the answer, a status of the worker has the
number of the file that it uses: news.py takes that over.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from api.errors import ApiError, Conflict, HostFailure, Invalid
from api.models.vms import VmState

from . import lifecycle
from .launch import FdBag, open_disk
from .records import DiskRecord
from .store import NewEvent
from .vm_plan import Planner, own_fields
from .vm_run import Request, VmRunner
from .vm_table import VmEntry, VmTable
from .workers import Ending


class Swapper:
    """Swaps the files of disks.

    Threads: the event loop's; files are looked at and opened in others.
    """

    def __init__(self, table: VmTable, runner: VmRunner, planner: Planner) -> None:
        self._table = table
        self._runner = runner
        self._planner = planner

    async def swap(self, entry: VmEntry, disk: DiskRecord, path: str, request: Request) -> None:
        """Have a disk use the file or block device at ``path``; the caller holds the lock.

        Raises:
            ApiError: the VM's state does not allow it, the disk is no raw one used by path, or the
                file is missing, in use or not fit; the disk keeps the file that it has.
        """
        lifecycle.check_swap(entry.record.name, entry.record.state)
        _check_swappable(disk)
        is_up = entry.record.state in (VmState.RUNNING, VmState.PAUSED)
        if is_up:
            # The worker answers in order: what became of an earlier swap is known after this.
            await self._runner.ask(entry, "status")
            await self._runner.keep_up(entry)
            (disk,) = [known for known in entry.record.disks if known.id == disk.id]
            await self._write_back(entry, disk)
        elif path == disk.path:
            return
        with own_fields():
            fresh = await self._planner.plan_swap(entry.record, disk, path)
            if is_up:
                await self._hand_over(entry, disk, fresh, request)
                return
        # What may be left of a worker never uses a disk again.
        alone = replace(fresh, other=None)
        await self._table.commit(entry, _event(entry, alone, request), disks=_with(entry, alone))

    async def _hand_over(
        self, entry: VmEntry, disk: DiskRecord, fresh: DiskRecord, request: Request
    ) -> None:
        index = entry.record.disks.index(disk)
        with FdBag() as bag:
            try:
                await open_disk(fresh, index, bag)
            except Conflict as err:
                # Another file may lie at the same path by now; the one that the worker has is
                # locked by it.
                if err.code == "disk_in_use" and fresh.path == disk.path:
                    return
                raise
            if not disk.read_only:
                await self._sync(entry, fresh.path, bag.fds[0])
            await self._table.commit(entry, disks=_with(entry, fresh))
            args = {"disk": disk.id, "swaps": fresh.swaps}
            try:
                await self._runner.ask(entry, "swap_disk", args, tuple(bag.fds))
            except ApiError:
                # Refused, or not known: the worker's word is taken, now and with each status.
                await self._runner.keep_up(entry)
                if _is_taken(entry, fresh):
                    await self._table.record(entry, _event(entry, fresh, request))
                raise
        await self._table.record(entry, _event(entry, fresh, request))

    async def _write_back(self, entry: VmEntry, disk: DiskRecord) -> None:
        """Have the kernel write what it holds of the file that is to be left.

        The worker does that for good, while the guest and all requests wait for it: this makes it
        short, and finds out whether the storage hangs. What fails is told by the worker: the kernel
        tells each descriptor of a lost write once.
        """
        if not disk.read_only:
            await self._runner.syncs.sync(disk.path, _end_of(entry))

    async def _sync(self, entry: VmEntry, path: str, fd: int) -> None:
        """Make a file durable before a guest goes on with it: it was told that its data is.

        Raises:
            HostFailure: it cannot be written.
        """
        error = await self._runner.syncs.sync(path, _end_of(entry), fd=fd)
        if error is not None:
            raise HostFailure("disk_failed", f"{path}: {error}, as it was synced")


def _end_of(entry: VmEntry) -> asyncio.Future[Ending]:
    assert entry.worker is not None
    return entry.worker.ended


def _is_taken(entry: VmEntry, fresh: DiskRecord) -> bool:
    """Whether the worker has told that it uses a file."""
    status = None if entry.worker is None else entry.worker.status
    return status is not None and status.swaps.get(fresh.id) == fresh.swaps


def _check_swappable(disk: DiskRecord) -> None:
    if disk.is_own:
        raise Conflict(
            "disk_is_own",
            f"disk {disk.id} is the VM's own copy of an image, which would be lost: attach the"
            " other file as a disk of its own, or detach this one first",
            field="path",
        )
    if disk.format != "raw":
        raise Invalid(
            "disk_format",
            f"disk {disk.id} is {disk.format}: only a raw disk can use another file",
            field="path",
        )


def _with(entry: VmEntry, fresh: DiskRecord) -> tuple[DiskRecord, ...]:
    return tuple(fresh if disk.id == fresh.id else disk for disk in entry.record.disks)


def _event(entry: VmEntry, disk: DiskRecord, request: Request) -> NewEvent:
    return entry.event("disk_swapped", request.actor, disk=disk.id, path=disk.path)
