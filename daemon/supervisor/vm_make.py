# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""How VMs come, change and go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from api.errors import HostFailure, Invalid, NotFound
from api.models.common import ObjectRef
from api.models.limits import RateGroupPatch
from api.models.vms import DiskPatch, NicPatch, Vm, VmCreate, VmPatch, VmState

from ..images.importer import clone_disk
from . import disks, lifecycle, vsock
from .dirs import Layout, Reserve
from .launch import MIB, FdBag, nic_wishes
from .library import Library
from .operations import Job
from .records import DiskRecord, NicRecord, VmRecord
from .store import StoreFull
from .swap import Swapper
from .vm_plan import Planner, limits_of
from .vm_run import Request, VmRunner
from .vm_table import VmEntry, VmTable, to_model
from .workers import KILL_TIMEOUT_S, WorkerPool

log = logging.getLogger(__name__)

CLONES_AT_ONCE: Final = 2
# States in which a worker has open disks.
_HAS_DISKS: Final = frozenset({VmState.RUNNING, VmState.PAUSED, VmState.CRASHED})


class VmMaker:
    """Creates, changes and deletes VMs.

    Threads: the event loop's; files are copied and removed in others.
    """

    def __init__(
        self,
        table: VmTable,
        runner: VmRunner,
        planner: Planner,
        library: Library,
        pool: WorkerPool,
        layout: Layout,
    ) -> None:
        self._table = table
        self._runner = runner
        self._planner = planner
        self._library = library
        self._pool = pool
        self._layout = layout
        self._swapper = Swapper(table, runner, planner)
        self._reserve = Reserve(layout.state)
        # Of its own, so that long copies do not keep the starts of VMs waiting for a thread.
        self._threads = ThreadPoolExecutor(CLONES_AT_ONCE, "clone")

    def close(self) -> None:
        """Wait for the copies that have been asked to stop."""
        self._threads.shutdown()

    # --- create

    async def create(
        self, wanted: VmCreate, request: Request
    ) -> tuple[Job, Callable[[Job], Awaitable[Vm]]]:
        """Check a request and return the job that fulfils it; the name is kept for it.

        Raises:
            ApiError: it cannot be fulfilled.
        """
        self._table.reserve(wanted.name)
        held = contextlib.ExitStack()
        try:
            record = await self._planner.plan_create(wanted)
            held.enter_context(self._table.holding_cid(record))
            held.enter_context(self._library.holding(record))
        except BaseException:
            self._table.release(wanted.name)
            raise
        about = ObjectRef(kind="vm", id=record.id, name=record.name)
        job = Job("vm.create", about, may_cancel=any(disk.is_own for disk in record.disks))
        return job, partial(self._create, record, held, wanted.start, request)

    async def _create(
        self,
        record: VmRecord,
        held: contextlib.ExitStack,
        start: bool,
        request: Request,
        job: Job,
    ) -> Vm:
        try:
            vsock.make_directory(record)
            if job.may_cancel:
                entry = await self._create_with_disks(record, start, request, job)
            elif start:
                entry = await self._create_running(record, request)
            else:
                entry = VmEntry(record)
                await self._table.insert(entry, request.actor)
        finally:
            held.close()
            self._table.release(record.name)
        if not start:
            log.info("vm created vm=%s actor=%s", record.name, request.actor)
        return to_model(entry, self._library.names())

    async def _create_running(self, record: VmRecord, request: Request) -> VmEntry:
        """Create a VM straight into its start: one commit less."""
        entry = VmEntry(replace(record, state=VmState.STARTING))
        async with entry.lock:
            with FdBag() as bag:
                spec = await self._runner.open_all(record, request, bag)
                intend = partial(self._table.insert, entry, request.actor)
                try:
                    await self._runner.launch(entry, spec, bag, intend, request)
                except StoreFull:
                    await self._remove_files(record)
                    raise
        return entry

    async def _create_with_disks(
        self, record: VmRecord, start: bool, request: Request, job: Job
    ) -> VmEntry:
        entry = VmEntry(replace(record, state=VmState.CREATING))
        async with entry.lock:
            await self._table.insert(entry, request.actor)
            try:
                await self.clone_disks(entry.record, job)
                if not start:
                    await self._table.commit(entry, state=VmState.STOPPED)
                    return entry
                with FdBag() as bag:
                    spec = await self._runner.open_all(record, request, bag)
                    intend = partial(self._table.commit, entry, state=VmState.STARTING)
                    await self._runner.launch(entry, spec, bag, intend, request)
            except BaseException:
                # Once it has been starting it stays, so that its log can be read.
                if entry.record.state is VmState.CREATING:
                    await asyncio.shield(self.roll_back(entry, request.actor))
                raise
        return entry

    async def clone_disks(self, record: VmRecord, job: Job) -> None:
        """Make a VM's own copies of images, in a thread; what is there already is an error."""
        (self._layout.vm_state(record.id) / "disks").mkdir(mode=0o700, parents=True, exist_ok=True)
        for disk in record.disks:
            if disk.is_own and disk.image_id is not None:
                job.note(f"copying disk {disk.id}")
                image = self._library.images.get(disk.image_id)
                clone = partial(
                    clone_disk,
                    Path(self._library.image_path(image)),
                    Path(disk.path),
                    disk.size_bytes,
                    progress=job.progress,
                    cancelled=job.cancelled.is_set,
                )
                await asyncio.get_running_loop().run_in_executor(self._threads, clone)

    async def roll_back(self, entry: VmEntry, actor: str | None) -> None:
        """Remove a VM whose creation did not come to its end; the caller holds the lock."""
        await self._remove_files(entry.record)
        await self._commit_with_reserve(
            partial(self._table.remove, entry, entry.event("create_failed", actor))
        )

    # --- change

    async def patch(self, entry: VmEntry, patch: VmPatch, request: Request) -> None:
        """Change a VM.

        Raises:
            ApiError: its state does not allow it, or a value is wrong.
        """
        if entry.lock.locked():
            # Its state may stay what it is for minutes: who would be refused then is refused now.
            self._planner.plan_patch(entry, patch)
        async with entry.lock:
            entry.check_present()
            entry.check_version(request.if_match)
            changes = self._planner.plan_patch(entry, patch)
            if not changes:
                return
            if changes.keys() & {"memory_mib", "kernel_id", "initrd_id", "cmdline"}:
                self._planner.check_fit(replace(entry.record, **changes))
            new_name = changes.get("name")
            if new_name is not None:
                self._table.reserve(new_name)
            try:
                event = entry.event("updated", request.actor, fields=sorted(changes))
                with self._library.holding(replace(entry.record, **changes, disks=())):
                    await self._table.commit(entry, event, **changes)
            finally:
                if new_name is not None:
                    self._table.release(new_name)

    async def patch_disk(
        self, entry: VmEntry, disk_id: str, patch: DiskPatch, request: Request
    ) -> None:
        """Grow a disk and tell a running guest; change its limits, or its file, while it runs.

        Raises:
            ApiError: no such disk; of one that is to grow: it is read-only, or would shrink; of a
                new file: as Swapper.swap().
        """
        async with entry.lock:
            entry.check_present()
            entry.check_version(request.if_match)
            disk = _find_disk(entry.record, disk_id)
            if patch.path is not None:
                await self._swapper.swap(entry, disk, patch.path, request)
            if patch.size_mib is not None:
                await self._grow_disk(entry, disk, patch.size_mib * MIB, request)
            if "rate_limit" in patch.model_fields_set:
                if disk.format != "raw":
                    raise Invalid(
                        "disk_format",
                        f"disk {disk_id} is {disk.format}: only raw disks have limits",
                        field="rate_limit",
                    )
                limits = limits_of(patch.rate_limit)
                event = entry.event("disk_limited", request.actor, disk=disk_id, **limits)
                changed = _with_disk(entry.record, disk_id, rate_limit=limits)
                await self._table.commit(entry, event, disks=changed)
                await self._tell(entry, "limit_disk", disk=disk_id, rate_limit=limits)

    async def _grow_disk(
        self, entry: VmEntry, disk: DiskRecord, size_bytes: int, request: Request
    ) -> None:
        if disk.read_only:
            raise Invalid("disk_read_only", f"disk {disk.id} is read-only", field="disk")
        if disk.format != "raw":
            raise Invalid(
                "disk_format",
                f"disk {disk.id} is {disk.format}: stop the VM and grow it with its own tool, such"
                " as qemu-img resize",
                field="disk",
            )
        size_bytes = await asyncio.to_thread(disks.grow, disk.path, size_bytes)
        event = entry.event("disk_resized", request.actor, disk=disk.id, size_bytes=size_bytes)
        changed = _with_disk(entry.record, disk.id, size_bytes=size_bytes)
        await self._table.record(entry, event, disks=changed)
        await self._tell(entry, "resize_disk", disk=disk.id)

    async def patch_rate_group(
        self, entry: VmEntry, group_id: str, patch: RateGroupPatch, request: Request
    ) -> None:
        """Change the limits that disks share, also of a VM that runs.

        Raises:
            NotFound: the VM has no such rate group.
        """
        async with entry.lock:
            entry.check_present()
            entry.check_version(request.if_match)
            groups = entry.record.rate_groups
            if group_id not in groups:
                raise NotFound(
                    "rate_group_not_found",
                    f"VM {entry.record.name} has no rate group {group_id}; it has:"
                    f" {', '.join(groups) or 'none'}",
                )
            limits = limits_of(patch.rate_limit)
            event = entry.event("rate_group_limited", request.actor, group=group_id, **limits)
            await self._table.commit(entry, event, rate_groups={**groups, group_id: limits})
            await self._tell(entry, "limit_group", group=group_id, rate_limit=limits)

    async def _tell(self, entry: VmEntry, op: str, **args: object) -> None:
        if entry.worker is not None and entry.record.state in _HAS_DISKS:
            await self._runner.ask(entry, op, args)

    async def patch_nic(
        self, entry: VmEntry, nic_id: str, patch: NicPatch, request: Request
    ) -> None:
        """Change an interface and tell a running guest.

        Raises:
            ApiError: no such interface, or its tap is gone.
        """
        async with entry.lock:
            entry.check_present()
            entry.check_version(request.if_match)
            nic = _find_nic(entry.record, nic_id)
            if nic.socket is not None:
                raise Invalid(
                    "nic_on_switch",
                    f"interface {nic_id} is on the switch at {nic.socket}: change it there",
                    field="nic",
                )
            wanted = _patched(nic, patch)
            if wanted == nic:
                return
            # The worker first: it may have to refuse limits, and its tap may be gone.
            if entry.record.state in (VmState.RUNNING, VmState.PAUSED):
                told = {"nic": nic_id, "wishes": asdict(nic_wishes(wanted))}
                await self._runner.ask(entry, "set_nic", told)
            changed = tuple(wanted if other is nic else other for other in entry.record.nics)
            fields = sorted(patch.model_fields_set)
            event = entry.event("nic_changed", request.actor, nic=nic_id, fields=fields)
            await self._table.record(entry, event, nics=changed)

    # --- delete

    async def delete(self, entry: VmEntry, force: bool, request: Request) -> None:
        """Delete a VM with all that is its own.

        Raises:
            ApiError: its state does not allow it without ``force``, or its process does not end.
        """
        name = entry.record.name
        entry.check_version(request.if_match)
        lifecycle.check_delete(name, entry.record.state, force=force)
        if force:
            self._runner.request_kill(entry)
        async with entry.lock:
            entry.check_present()
            lifecycle.check_delete(name, entry.record.state, force=force)
            await self._commit_with_reserve(
                partial(self._table.commit, entry, state=VmState.DELETING, reason=None)
            )
            await self.finish_delete(entry, request.actor)
        log.info("vm deleted vm=%s actor=%s", name, request.actor)

    async def finish_delete(self, entry: VmEntry, actor: str | None) -> None:
        """Remove all of a VM in state deleting; the caller holds the lock.

        Raises:
            HostFailure: its process does not end, or its files cannot be removed.
            StoreFull: its row cannot be removed.
        """
        worker = entry.worker
        if worker is not None:
            worker.kill()
            if await worker.wait_ended(KILL_TIMEOUT_S) is None:
                raise HostFailure(
                    "worker_unkillable",
                    f"VM {entry.record.name}: process {worker.pid} does not end by SIGKILL",
                )
            entry.worker = None
        await self._remove_files(entry.record)
        await self._commit_with_reserve(
            partial(self._table.remove, entry, entry.event("deleted", actor))
        )

    async def _remove_files(self, record: VmRecord) -> None:
        self._pool.forget(record.id)
        vsock.remove_directory(record)
        await self._pool.backends.gone(record.id)
        path = self._layout.vm_state(record.id)
        try:
            if any(disk.is_own for disk in record.disks):
                await asyncio.to_thread(shutil.rmtree, path)  # large files take their time
            else:
                shutil.rmtree(path)
        except FileNotFoundError:
            log.debug("no files to remove vm=%s", record.name)
        except OSError as err:
            raise HostFailure(
                "remove_failed", f"VM {record.name}: {err.filename}: {err.strerror}"
            ) from err

    async def _commit_with_reserve(self, commit: Callable[[], Awaitable[None]]) -> None:
        """Commit what makes room: on a full disk it may use the space that is kept for that.

        Raises:
            StoreFull: that did not help.
        """
        try:
            await commit()
        except StoreFull:
            self._reserve.release()
            await commit()
        self._reserve.hold()


def _find_disk(record: VmRecord, disk_id: str) -> DiskRecord:
    disk = next((disk for disk in record.disks if disk.id == disk_id), None)
    if disk is None:
        raise NotFound("disk_not_found", f"VM {record.name} has no disk {disk_id}")
    return disk


def _with_disk(record: VmRecord, disk_id: str, **changes: Any) -> tuple[DiskRecord, ...]:  # noqa: ANN401 - any field
    return tuple(replace(disk, **changes) if disk.id == disk_id else disk for disk in record.disks)


def _find_nic(record: VmRecord, nic_id: str) -> NicRecord:
    nic = next((nic for nic in record.nics if nic.id == nic_id), None)
    if nic is None:
        raise NotFound("nic_not_found", f"VM {record.name} has no network interface {nic_id}")
    return nic


def _patched(nic: NicRecord, patch: NicPatch) -> NicRecord:
    """Return an interface with a patch applied.

    Raises:
        Invalid: it insists on vhost, which knows no limits.
    """
    wanted = nic if patch.link is None else replace(nic, link=patch.link)
    if "rx_limit" in patch.model_fields_set:
        wanted = replace(wanted, rx_limit=limits_of(patch.rx_limit))
    if "tx_limit" in patch.model_fields_set:
        wanted = replace(wanted, tx_limit=limits_of(patch.tx_limit))
    if nic.backend == "vhost" and (wanted.rx_limit or wanted.tx_limit):
        raise Invalid(
            "vhost_unlimited",
            f"interface {nic.id} has backend vhost, which knows no limits; make it with auto",
            field="rx_limit" if wanted.rx_limit else "tx_limit",
        )
    return wanted
