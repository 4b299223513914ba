# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""HostelService: the daemon as HTTP sees it, put together from its parts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Literal, TypeVar

from pydantic import BaseModel

from api.errors import ApiError, Conflict
from api.models.common import Page
from api.models.limits import RateGroupPatch
from api.models.resources import (
    Event,
    Host,
    Image,
    ImageImport,
    Kernel,
    KernelImport,
    Operation,
)
from api.models.vms import (
    DiskCreate,
    DiskPatch,
    NicCreate,
    NicPatch,
    StopRequest,
    Vm,
    VmAction,
    VmCreate,
    VmPatch,
    VmStats,
)
from api.ports import Call, ConsoleChunk, DetachQuery, DeviceKind, ListQuery, StoredReply

from . import faults, lifecycle
from .config import Config
from .console import Consoles
from .dirs import Layout
from .events import EventHub, replay
from .host import HostView, Metrics, vm_stats
from .idempotency import IdempotencyKeys
from .imports import Importer
from .library import Library
from .operations import Job, Operations
from .plug import Plugger, find_device
from .plug import check as check_plug
from .reconcile import Reconciler, Report
from .store import Store
from .tasks import Tasks
from .vm_make import VmMaker
from .vm_plan import Planner
from .vm_run import Request, VmRunner
from .vm_table import VmEntry, VmTable, to_model
from .workers import WorkerPool
from .zygotes import ZygoteClient

log = logging.getLogger(__name__)

R = TypeVar("R", bound=BaseModel | None)


class Supervisor:
    """Implements api.ports.HostelService.

    Args:
        config: the configuration.
        layout: its directories, made and locked.
        zygote: running.
        version: of hosteld.

    Threads: the event loop's.
    """

    def __init__(
        self, config: Config, layout: Layout, zygote: ZygoteClient, tasks: Tasks, version: str
    ) -> None:
        self._config = config
        self._layout = layout
        self._tasks = tasks
        self._zygote = zygote
        self._hub = EventHub()
        self._store = Store(
            layout.database, events_kept=config.events_kept, on_events=self._hub.publish
        )
        self._table = VmTable(self._store, tasks)
        self._library = Library(self._store, layout)
        self._operations = Operations(self._store, tasks, config.operations_kept)
        self._keys = IdempotencyKeys(self._store, config.idempotency_hours * 3600)
        self._pool = WorkerPool(layout, zygote, tasks)
        self._runner = VmRunner(config, self._table, self._pool, self._library, tasks)
        planner = Planner(self._table, self._library, layout, self._pool.backends)
        self._maker = VmMaker(self._table, self._runner, planner, self._library, self._pool, layout)
        self._plugger = Plugger(
            self._table, self._runner, self._maker, planner, self._library, layout
        )
        self._importer = Importer(self._library, self._table, layout)
        self._consoles = Consoles(layout, self._runner)
        self._host = HostView(config, self._table, version)
        self._metrics = Metrics(self._table, self._runner)

    async def start(self) -> Report:
        """Load the database and reconcile it with the workers that run.

        Raises:
            StoreFull, StorageError: the state directory cannot be read or written.
        """
        await self._library.load()
        await self._table.load()
        await self._operations.load()
        await self._importer.sweep()
        reconciler = Reconciler(
            self._table, self._runner, self._maker, self._pool, self._layout, self._tasks
        )
        report = await reconciler.run(self._store)
        for entry in list(self._table):
            async with entry.lock:
                await self._plugger.tidy(entry)
        return report

    async def stop(self) -> None:
        """Let running jobs end, let go of the workers, and close the database."""
        self._operations.cancel_all()
        await self._tasks.finish(self._config.stop_grace_s)
        await asyncio.to_thread(self._importer.close)
        await asyncio.to_thread(self._maker.close)
        for entry in self._table:
            if entry.worker is not None:
                entry.worker.release()
        self._pool.backends.release()
        self._consoles.close()
        await self._zygote.close()
        await self._store.close()

    # --- host

    async def host(self) -> Host:
        """Describe the host."""
        async with _door("host"):
            return await self._host.describe()

    async def metrics(self) -> bytes:
        """Return the Prometheus text exposition."""
        async with _door("metrics"):
            return await self._metrics.expose()

    # --- VMs

    async def list_vms(self, query: ListQuery) -> Page[Vm]:
        """List VMs in order of name."""
        return self._table.page(query, self._library.names())

    async def create_vm(self, request: VmCreate, call: Call) -> Vm | Operation:
        """Create a VM, and start it if asked."""
        async with _door(f"create VM {request.name}"):
            job, work = await self._maker.create(request, _request(call))
            return await self._run(job, call, work)

    async def get_vm(self, ref: str) -> Vm:
        """Return one VM by name or id."""
        return self._model(self._table.get(ref))

    async def patch_vm(self, ref: str, patch: VmPatch, call: Call) -> Vm:
        """Change a VM."""
        async with _door(f"change VM {ref}"):
            entry = self._table.get(ref)
            await self._tasks.complete(self._maker.patch(entry, patch, _request(call)), "patch")
            return self._model(entry)

    async def delete_vm(self, ref: str, force: bool, call: Call) -> Operation | None:
        """Delete a VM and its own disks; ``force`` kills it first. None when it is gone."""
        async with _door(f"delete VM {ref}"):
            entry, request = self._table.get(ref), _request(call)
            entry.check_version(call.if_match)
            lifecycle.check_delete(entry.record.name, entry.record.state, force=force)

            async def work(_: Job) -> None:
                await self._maker.delete(entry, force, request)

            return await self._run(Job("vm.delete", entry.ref, may_cancel=False), call, work)

    async def act_on_vm(
        self, ref: str, action: VmAction, stop: StopRequest | None, call: Call
    ) -> Vm | Operation:
        """Start, pause, resume, stop, kill, reset or send Ctrl-Alt-Del."""
        async with _door(f"{action.value} VM {ref}"):
            entry, request = self._table.get(ref), _request(call)
            entry.check_version(call.if_match)
            lifecycle.check_action(entry.record.name, entry.record.state, action)

            async def work(job: Job) -> Vm:
                await self._act(entry, action, stop or StopRequest(), job, request)
                return self._model(entry)

            job = Job(f"vm.{action.value}", entry.ref, may_cancel=False)
            return await self._run(job, call, work)

    async def _act(
        self, entry: VmEntry, action: VmAction, stop: StopRequest, job: Job, request: Request
    ) -> None:
        if action is VmAction.START:
            await self._runner.start(entry, request)
        elif action is VmAction.STOP:
            await self._runner.stop(entry, stop, job, request)
        elif action is VmAction.KILL:
            await self._runner.kill(entry, request)
        else:
            await self._runner.act(entry, action, request)

    async def patch_disk(self, ref: str, disk_id: str, patch: DiskPatch, call: Call) -> Vm:
        """Grow a disk, change its limits or its file; a running guest has it at once."""
        async with _door(f"change disk {disk_id} of VM {ref}"):
            entry = self._table.get(ref)
            change = self._maker.patch_disk(entry, disk_id, patch, _request(call))
            await self._tasks.complete(change, "change disk")
            return self._model(entry)

    async def patch_rate_group(
        self, ref: str, group_id: str, patch: RateGroupPatch, call: Call
    ) -> Vm:
        """Change the limits that disks share, at once."""
        async with _door(f"change rate group {group_id} of VM {ref}"):
            entry = self._table.get(ref)
            change = self._maker.patch_rate_group(entry, group_id, patch, _request(call))
            await self._tasks.complete(change, "change rate group")
            return self._model(entry)

    async def patch_nic(self, ref: str, nic_id: str, patch: NicPatch, call: Call) -> Vm:
        """Change an interface; a running guest sees it."""
        async with _door(f"change interface {nic_id} of VM {ref}"):
            entry = self._table.get(ref)
            change = self._maker.patch_nic(entry, nic_id, patch, _request(call))
            await self._tasks.complete(change, "change interface")
            return self._model(entry)

    async def attach(self, ref: str, wanted: DiskCreate | NicCreate, call: Call) -> Vm | Operation:
        """Give a VM one more disk or network interface, at once if it runs."""
        async with _door(f"attach {wanted.id} to VM {ref}"):
            entry, request = self._table.get(ref), _request(call)
            check_plug(entry, request)

            async def work(job: Job) -> Vm:
                await self._plugger.attach(entry, wanted, request, job)
                return self._model(entry)

            may_cancel = isinstance(wanted, DiskCreate) and wanted.image is not None
            return await self._run(Job("vm.attach", entry.ref, may_cancel), call, work)

    async def detach(
        self, ref: str, device: tuple[DeviceKind, str], how: DetachQuery, call: Call
    ) -> Vm | Operation:
        """Take a disk or a network interface from a VM."""
        async with _door(f"detach {device[1]} from VM {ref}"):
            entry, request = self._table.get(ref), _request(call)
            find_device(entry.record, *device)
            check_plug(entry, request)

            async def work(_: Job) -> Vm:
                await self._plugger.detach(entry, device, how.force, how.timeout_s, request)
                return self._model(entry)

            return await self._run(Job("vm.detach", entry.ref, may_cancel=False), call, work)

    async def vm_stats(self, ref: str) -> VmStats:
        """Read a running VM's counters."""
        async with _door(f"stats of VM {ref}"):
            entry = self._table.get(ref)
            if entry.worker is None:
                state = entry.record.state
                raise Conflict(
                    "wrong_state",
                    f"VM {entry.record.name} is {state.value}: only a live one has counters",
                    state=state.value,
                    allowed=[action.value for action in lifecycle.allowed_actions(state)],
                )
            return await vm_stats(self._runner, entry)

    # --- console

    async def read_console(self, ref: str, offset: int, limit: int) -> ConsoleChunk:
        """Read the console log; a negative offset counts from its end."""
        async with _door(f"console of VM {ref}"):
            return self._consoles.read(self._table.get(ref), offset, limit)

    async def follow_console(self, ref: str, offset: int) -> AsyncIterator[ConsoleChunk]:
        """Yield the console log from ``offset`` on, as it grows, until the VM is deleted."""
        async with _door(f"console of VM {ref}"):
            async for chunk in self._consoles.follow(self._table.get(ref), offset):
                yield chunk

    async def write_console(self, ref: str, data: bytes) -> int:
        """Type into the console; returns the bytes that were taken."""
        async with _door(f"console of VM {ref}"):
            return await self._consoles.write(self._table.get(ref), data)

    # --- kernels and images

    async def list_kernels(self, query: ListQuery) -> Page[Kernel]:
        """List kernels in order of name."""
        return self._library.kernels.page(query)

    async def get_kernel(self, ref: str) -> Kernel:
        """Return one kernel."""
        return self._library.kernels.get(ref)

    async def import_kernel(self, request: KernelImport, call: Call) -> Kernel | Operation:
        """Import a kernel from a path."""
        async with _door(f"import kernel {request.name}"):
            job, work = self._importer.import_kernel(request, call)
            return await self._run(job, call, work)

    async def upload_kernel(
        self, name: str, sha256: str | None, body: AsyncIterator[bytes], call: Call
    ) -> Kernel | Operation:
        """Import a kernel from the request's body."""
        async with _door(f"import kernel {name}"):
            job, work = await self._importer.receive_kernel(name, sha256, body, call)
            return await self._run(job, call, work)

    async def delete_kernel(self, ref: str, call: Call) -> None:
        """Delete a kernel that no VM uses."""
        async with _door(f"delete kernel {ref}"):
            await self._tasks.complete(self._importer.delete_kernel(ref, call), "delete kernel")

    async def list_images(self, query: ListQuery) -> Page[Image]:
        """List images in order of name."""
        return self._library.images.page(query)

    async def get_image(self, ref: str) -> Image:
        """Return one image."""
        return self._library.images.get(ref)

    async def import_image(self, request: ImageImport, call: Call) -> Image | Operation:
        """Import an image from a path."""
        async with _door(f"import image {request.name}"):
            job, work = self._importer.import_image(request, call)
            return await self._run(job, call, work)

    async def upload_image(
        self,
        name: str,
        kind: Literal["disk", "initrd"],
        sha256: str | None,
        body: AsyncIterator[bytes],
        call: Call,
    ) -> Image | Operation:
        """Import an image from the request's body."""
        async with _door(f"import image {name}"):
            job, work = await self._importer.receive_image(name, kind, sha256, body, call)
            return await self._run(job, call, work)

    async def delete_image(self, ref: str, call: Call) -> None:
        """Delete an image that no VM uses."""
        async with _door(f"delete image {ref}"):
            await self._tasks.complete(self._importer.delete_image(ref, call), "delete image")

    # --- operations

    async def list_operations(self, query: ListQuery) -> Page[Operation]:
        """List operations, the newest first."""
        return self._operations.list(query)

    async def get_operation(self, operation_id: str, wait_s: float) -> Operation:
        """Return an operation, after its end or ``wait_s`` seconds."""
        return await self._operations.get(operation_id, wait_s)

    async def cancel_operation(self, operation_id: str, call: Call) -> Operation:
        """Ask an operation to stop; what it made is removed."""
        return await self._operations.cancel(operation_id, call.wait_s)

    # --- events

    async def list_events(self, after: int, limit: int) -> list[Event]:
        """Return events with an id above ``after``, in order."""
        async with _door("events"):
            return await replay(self._store, after, limit)

    async def follow_events(self, after: int | None) -> AsyncIterator[Event]:
        """Yield every event above ``after``, then new ones as they happen; None: new ones only."""
        async with _door("events"):
            async for event in self._hub.follow(self._store, after):
                yield event

    # --- idempotency

    async def claim_key(self, key: str, fingerprint: str) -> StoredReply | None:
        """Claim an Idempotency-Key; a reply means that the work was done before."""
        async with _door("Idempotency-Key"):
            return await self._keys.claim(key, fingerprint)

    async def settle_key(self, key: str, reply: StoredReply | None) -> None:
        """Keep the reply of a claimed key, or with None give the key back."""
        async with _door("Idempotency-Key"):
            await self._keys.settle(key, reply)

    # ---

    async def _run(
        self, job: Job, call: Call, work: Callable[[Job], Awaitable[R]]
    ) -> R | Operation:
        return await self._operations.run(job, call, work)

    def _model(self, entry: VmEntry) -> Vm:
        return to_model(entry, self._library.names())


@asynccontextmanager
async def _door(doing: str) -> AsyncIterator[None]:
    """Let nothing but ApiError out to HTTP; what is not foreseen is logged with its trace."""
    try:
        yield
    except ApiError:
        raise
    except Exception as err:
        # The border "HTTP request".
        raise faults.translate(err, doing) from err


def _request(call: Call) -> Request:
    return Request(call.actor, call.if_match, time.monotonic_ns())
