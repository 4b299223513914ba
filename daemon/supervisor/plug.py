# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Disks and network interfaces that come and go, while a VM runs and while it is at rest.

The order of steps is what makes a kill at any point harmless: news.py says how what is left is
told, and a file is only removed when a committed record has named it as doomed.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from api.errors import ApiError, Conflict, HostFailure, NotFound
from api.models.vms import DiskCreate, NicCreate, VmState

from ..images.errors import StorageError
from ..images.staging import sweep_staging
from . import lifecycle
from .dirs import Layout
from .launch import FdBag, open_disk, open_nic
from .library import Library
from .news import kind_of, without
from .operations import Job
from .records import DiskRecord, NicRecord, VmRecord
from .vm_make import VmMaker
from .vm_plan import Planner, own_fields
from .vm_run import Request, VmRunner
from .vm_table import VmEntry, VmTable

log = logging.getLogger(__name__)

Device = DiskRecord | NicRecord


class Plugger:
    """Attaches and detaches.

    Threads: the event loop's; files are opened, copied and removed in others.
    """

    def __init__(
        self,
        table: VmTable,
        runner: VmRunner,
        maker: VmMaker,
        planner: Planner,
        library: Library,
        layout: Layout,
    ) -> None:
        self._table = table
        self._runner = runner
        self._maker = maker
        self._planner = planner
        self._library = library
        self._layout = layout

    # --- attach

    async def attach(
        self, entry: VmEntry, wanted: DiskCreate | NicCreate, request: Request, job: Job
    ) -> None:
        """Give a VM one more device, at once if it runs.

        Raises:
            ApiError: its state does not allow it, the device cannot be had, or the worker could
                not take it; nothing has changed then.
        """
        async with entry.lock:
            check(entry, request)
            try:
                with own_fields():
                    if isinstance(wanted, NicCreate):
                        await self._join(
                            entry, self._planner.plan_nic(entry.record, wanted), request
                        )
                    else:
                        await self._attach_disk(entry, wanted, request, job)
            finally:
                await asyncio.shield(self.remove_doomed(entry))

    async def _attach_disk(
        self, entry: VmEntry, wanted: DiskCreate, request: Request, job: Job
    ) -> None:
        disk = await self._planner.plan_disk(entry.record, wanted)
        alone = replace(entry.record, initrd_id=None, disks=(disk,))
        with self._library.holding(alone):
            if disk.is_own:
                # Doomed until the VM has it: whatever happens in between, it is removed.
                doomed = (*entry.record.doomed, disk.path)
                await self._table.commit(entry, doomed=doomed)
                await self._maker.clone_disks(alone, job)
            await self._join(entry, disk, request)

    async def _join(self, entry: VmEntry, device: Device, request: Request) -> None:
        """Keep a device in the record, then hand it to a running worker."""
        _check_back_end(entry, device)
        record, event = entry.record, _event(entry, "attached", device, request.actor)
        changes = _with(record, device)
        if record.state is not VmState.RUNNING:
            await self._table.commit(entry, event, **changes)
            return
        with FdBag(first=self._next_fd(entry)) as bag:
            args = await _open(record, device, bag)
            await self._table.commit(entry, **changes)
            try:
                await self._runner.ask(entry, "attach", args, tuple(bag.fds))
            except ApiError:
                await self._table.record(entry, **without(entry.record, {device.id}))
                raise
        await self._table.record(entry, event)

    def _next_fd(self, entry: VmEntry) -> int:
        worker = entry.worker
        if worker is None or worker.status is None:
            raise HostFailure("worker_gone", f"VM {entry.record.name} has no worker that answers")
        if worker.status.devices is None:
            raise Conflict(
                "worker_too_old",
                f"VM {entry.record.name} was started by an older hosteld, whose workers cannot do"
                " this: stop it and start it again",
                state=entry.record.state.value,
            )
        return worker.status.next_fd

    # --- detach

    async def detach(
        self,
        entry: VmEntry,
        device: tuple[str, str],
        force: bool,
        timeout_s: float,
        request: Request,
    ) -> None:
        """Take a device from a VM; a disk that is its own copy of an image goes for good.

        Args:
            entry: the VM.
            device: "disk" or "nic", and the id.
            force: do not ask the guest.
            timeout_s: how long a guest may take to let go of it.
            request: who wants it.

        Raises:
            ApiError: no such device, the state does not allow it, or the guest does not let go.
        """
        async with entry.lock:
            check(entry, request)
            found = find_device(entry.record, *device)
            _check_back_end(entry, found)
            event = _event(entry, "detached", found, request.actor)
            try:
                if entry.record.state is VmState.RUNNING:
                    await self._take_out(entry, found, force, timeout_s)
                    await self._table.record(entry, event, **without(entry.record, {found.id}))
                else:
                    await self._table.commit(entry, event, **without(entry.record, {found.id}))
            finally:
                await asyncio.shield(self.remove_doomed(entry))

    async def _take_out(
        self, entry: VmEntry, device: Device, force: bool, timeout_s: float
    ) -> None:
        """Have the worker take a device out.

        Raises:
            ApiError: the guest keeps it.
        """
        self._next_fd(entry)
        worker = entry.worker
        assert worker is not None
        await self._runner.ask(entry, "detach", {"device": device.id, "force": force})
        if await worker.wait_status(lambda status: _lacks(status.devices, device), timeout_s):
            return
        if worker.ended.done():
            return
        await self._runner.ask(entry, "keep", {"device": device.id})
        if worker.status is not None and _lacks(worker.status.devices, device):
            return
        kind = kind_of(device)
        raise Conflict(
            "guest_keeps_device",
            f"VM {entry.record.name}: the guest did not let go of {kind} {device.id} within"
            f" {timeout_s:g} s: see that it runs and knows ACPI hotplug, and try again, or pull the"
            f" {kind} out with force",
            state=entry.record.state.value,
        )

    # --- what is left over

    async def tidy(self, entry: VmEntry) -> None:
        """Remove what a killed hosteld has left among a VM's disks; the caller holds the lock."""
        disks = self._disks_of(entry)
        if disks.is_dir():
            try:
                await asyncio.to_thread(sweep_staging, disks)
            except StorageError as err:
                log.warning("not swept path=%s error=%s", disks, err)
        await self.remove_doomed(entry)

    async def remove_doomed(self, entry: VmEntry) -> None:
        """Remove the files of disks that the VM has no more; the caller holds the lock."""
        record = entry.record
        if not record.doomed:
            return
        kept = {disk.path for disk in record.disks}
        late = []
        for path in record.doomed:
            # Whatever a record says, only what lies where the VM's own disks do is ours.
            if path in kept or Path(path).parent != self._disks_of(entry):
                continue
            try:
                await asyncio.to_thread(partial(Path(path).unlink, missing_ok=True))
            except OSError as err:
                log.warning("tried again at the next start path=%s error=%s", path, err.strerror)
                late.append(path)
        if tuple(late) != record.doomed:
            await self._table.record(entry, doomed=tuple(late))

    def _disks_of(self, entry: VmEntry) -> Path:
        return self._layout.vm_state(entry.record.id) / "disks"


def check(entry: VmEntry, request: Request) -> None:
    """Refuse a change of a VM's devices that cannot be.

    Raises:
        ApiError: it is gone, has another version, or its state does not allow it.
    """
    entry.check_present()
    entry.check_version(request.if_match)
    lifecycle.check_plug(entry.record.name, entry.record.state)


def find_device(record: VmRecord, kind: str, device_id: str) -> Device:
    """Return a VM's disk or network interface.

    Raises:
        NotFound: it has none of that kind and id.
    """
    devices: tuple[Device, ...] = record.disks if kind == "disk" else record.nics
    found = next((device for device in devices if device.id == device_id), None)
    if found is None:
        raise NotFound(f"{kind}_not_found", f"VM {record.name} has no {kind} {device_id}")
    return found


def _check_back_end(entry: VmEntry, device: Device) -> None:
    """Refuse what a back end serves, where the guest runs.

    Raises:
        Conflict: it does.
    """
    is_served = device.socket if isinstance(device, NicRecord) else device.format != "raw"
    if is_served and entry.record.state is VmState.RUNNING:
        raise Conflict(
            "needs_stopped_vm",
            f"{kind_of(device)} {device.id} is served by another process: such come and go with a"
            f" stopped VM only, and VM {entry.record.name} runs",
            state=entry.record.state.value,
        )


def _with(record: VmRecord, device: Device) -> dict[str, Any]:
    if isinstance(device, NicRecord):
        return {"nics": (*record.nics, device)}
    doomed = tuple(path for path in record.doomed if path != device.path)
    return {"disks": (*record.disks, device), "doomed": doomed}


async def _open(record: VmRecord, device: Device, bag: FdBag) -> dict[str, Any]:
    """Open what is behind a device and return the arguments of an attach."""
    args: dict[str, Any] = {"first_fd": bag.first}
    if isinstance(device, DiskRecord):
        args["disks"] = [asdict(await open_disk(device, len(record.disks), bag))]
    else:
        args["nics"] = [asdict(await open_nic(device, len(record.nics), record.vcpus, bag))]
    return args


def _event(entry: VmEntry, what: str, device: Device, actor: str | None) -> Any:  # noqa: ANN401
    kind = kind_of(device)
    return entry.event(f"{kind}_{what}", actor, **{kind: device.id})


def _lacks(devices: tuple[str, ...] | None, device: Device) -> bool:
    return devices is not None and device.id not in devices
