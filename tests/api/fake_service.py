# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A daemon in memory: HostelService without a host, for tests of what is between it and HTTP."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Literal, TypeVar

from api.errors import ApiError, Busy, Conflict, Invalid, NotFound, PreconditionFailed
from api.models.common import ObjectRef, Page
from api.models.devices import Pmem, Port, Vsock, VsockCreate
from api.models.limits import RateGroup, RateGroupPatch
from api.models.resources import (
    Check,
    Event,
    Host,
    Image,
    ImageImport,
    Kernel,
    KernelImport,
    Operation,
    OperationState,
    Progress,
)
from api.models.vms import (
    Disk,
    DiskCreate,
    DiskPatch,
    Nic,
    NicCreate,
    NicPatch,
    StopRequest,
    Vm,
    VmAction,
    VmCreate,
    VmPatch,
    VmState,
    VmStats,
)
from api.ports import Call, ConsoleChunk, DetachQuery, DeviceKind, ListQuery, StoredReply

T = TypeVar("T", Vm, Kernel, Image)

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
ACTIONS = {
    VmState.STOPPED: {VmAction.START: VmState.RUNNING},
    VmState.PAUSED: {VmAction.RESUME: VmState.RUNNING, VmAction.KILL: VmState.STOPPED},
    VmState.RUNNING: {
        VmAction.PAUSE: VmState.PAUSED,
        VmAction.STOP: VmState.STOPPED,
        VmAction.KILL: VmState.STOPPED,
        VmAction.RESET: VmState.RUNNING,
        VmAction.CTRL_ALT_DEL: VmState.RUNNING,
    },
}


class FakeService:
    """Everything at once and in memory; `create_gate` and the like let a test hold it up."""

    def __init__(self) -> None:
        self.vms: dict[str, Vm] = {}
        self.kernels: dict[str, Kernel] = {}
        self.images: dict[str, Image] = {}
        self.operations: dict[str, Operation] = {}
        self.events: list[Event] = []
        self.consoles: dict[str, bytearray] = {}
        self.typed: dict[str, bytearray] = {}
        self.keys: dict[str, tuple[str, StoredReply | None]] = {}
        self.calls: list[Call] = []
        self.stops: list[StopRequest | None] = []
        self.uploads: list[int] = []
        self.broken_uploads: list[str] = []
        self.followers = 0
        self.creates = 0
        self.create_gate: asyncio.Event | None = None
        self.is_slow = False
        self.defect: Exception | None = None
        self.typed_per_call = 1 << 20
        self.writes = 0
        self.does_echo = False
        self.kept_devices: set[str] = set()
        self._news = asyncio.Condition()
        self._ids = 0

    def _new_id(self) -> str:
        self._ids += 1
        return f"{self._ids:032x}"

    async def happen(self, kind: str, ref: ObjectRef, actor: str | None = None) -> None:
        """Record an event and wake whoever follows."""
        event = Event(
            id=len(self.events) + 1, at=EPOCH, type=kind, object=ref, actor=actor, data={}
        )
        self.events.append(event)
        async with self._news:
            self._news.notify_all()

    async def say(self, ref: str, data: bytes) -> None:
        """Let the guest print."""
        self.consoles[self._vm(ref).id] += data
        async with self._news:
            self._news.notify_all()

    def _vm(self, ref: str) -> Vm:
        return _find(self.vms, ref, "vm")

    def _checked(self, ref: str, call: Call) -> Vm:
        self.calls.append(call)
        vm = self._vm(ref)
        if call.if_match not in (None, vm.version):
            raise PreconditionFailed("version_changed", f"version {vm.version}, not that one")
        return vm

    def _keep(self, vm: Vm, **changes: object) -> Vm:
        state = changes.get("state", vm.state)
        assert isinstance(state, VmState)
        changes["actions"] = list(ACTIONS.get(state, {}))
        changes["version"] = vm.version + 1
        kept = vm.model_copy(update=changes)
        self.vms[vm.id] = kept
        return kept

    def operation(self, kind: str, ref: ObjectRef) -> Operation:
        """Make an operation that runs on."""
        made = Operation(
            id=self._new_id(),
            kind=kind,
            object=ref,
            state=OperationState.RUNNING,
            progress=Progress(done=0, total=None, unit="steps"),
            result=None,
            error=None,
            log=["begun"],
            may_cancel=True,
            created_at=EPOCH,
            finished_at=None,
        )
        self.operations[made.id] = made
        return made

    async def finish(self, operation_id: str, state: OperationState) -> None:
        """End an operation."""
        update = {"state": state, "may_cancel": False, "finished_at": EPOCH}
        self.operations[operation_id] = self.operations[operation_id].model_copy(update=update)
        async with self._news:
            self._news.notify_all()

    async def host(self) -> Host:
        if self.defect is not None:
            raise self.defect
        return Host(
            hostname="test",
            version="0.1.0",
            tier="direct",
            kernel="6.1.0",
            cpu_count=2,
            memory_bytes=1 << 30,
            memory_available_bytes=1 << 29,
            vm_count=len(self.vms),
            vm_running_count=0,
            api_extensions=[],
            checks=[
                Check(name="kvm", status="ok", detail="API version 12", remedy=None),
                Check(name="tun", status="missing", detail="no tun", remedy="modprobe tun"),
            ],
        )

    async def metrics(self) -> bytes:
        return b"# HELP hostel_vms VMs.\n# TYPE hostel_vms gauge\nhostel_vms 0\n"

    async def list_vms(self, query: ListQuery) -> Page[Vm]:
        vms = [vm for vm in self.vms.values() if query.state in (None, vm.state)]
        if query.label is not None:
            key, _, value = query.label.partition("=")
            vms = [vm for vm in vms if key in vm.labels and value in ("", vm.labels[key])]
        return _page(vms, query)

    async def create_vm(self, request: VmCreate, call: Call) -> Vm | Operation:
        self.calls.append(call)
        self.creates += 1
        if self.create_gate is not None:
            await self.create_gate.wait()
        if any(vm.name == request.name for vm in self.vms.values()):
            raise Conflict("name_taken", f"VM {request.name} exists", field="name")
        state = VmState.RUNNING if request.start else VmState.STOPPED
        vm = Vm(
            id=self._new_id(),
            state=state,
            reason=None,
            actions=list(ACTIONS[state]),
            disks=[_disk(disk) for disk in request.disks],
            nics=[_nic(nic) for nic in request.nics],
            vsock=None if request.vsock is None else _vsock(request.vsock),
            pmem=[Pmem(**pmem.model_dump(), size_bytes=2 << 20) for pmem in request.pmem],
            ports=[
                Port(**port.model_dump(), path=f"/run/hostel/vms/1/ports/{port.name}")
                for port in request.ports
            ],
            pid=1 if request.start else None,
            boot_time_us=None,
            created_at=EPOCH,
            started_at=EPOCH if request.start else None,
            version=1,
            **request.model_dump(exclude={"disks", "nics", "vsock", "ports", "pmem", "start"}),
        )
        self.vms[vm.id] = vm
        self.consoles[vm.id], self.typed[vm.id] = bytearray(), bytearray()
        await self.happen("vm.created", _ref("vm", vm), call.actor)
        if self.is_slow:
            return self.operation("vm.create", _ref("vm", vm))
        return vm

    async def get_vm(self, ref: str) -> Vm:
        return self._vm(ref)

    async def patch_vm(self, ref: str, patch: VmPatch, call: Call) -> Vm:
        return self._keep(self._checked(ref, call), **patch.model_dump(exclude_none=True))

    async def delete_vm(self, ref: str, force: bool, call: Call) -> Operation | None:
        vm = self._checked(ref, call)
        if vm.state is not VmState.STOPPED and not force:
            raise Conflict(
                "wrong_state", f"VM {vm.name} is {vm.state}", state=vm.state, allowed=["kill"]
            )
        if self.is_slow:
            return self.operation("vm.delete", _ref("vm", vm))
        del self.vms[vm.id]
        await self.happen("vm.deleted", _ref("vm", vm), call.actor)
        return None

    async def act_on_vm(
        self, ref: str, action: VmAction, stop: StopRequest | None, call: Call
    ) -> Vm | Operation:
        vm = self._checked(ref, call)
        self.stops.append(stop)
        following = ACTIONS[vm.state].get(action)
        if following is None:
            raise Conflict(
                "wrong_state",
                f"VM {vm.name} is {vm.state}: {action} is not allowed",
                state=vm.state,
                allowed=list(ACTIONS[vm.state]),
            )
        if self.is_slow:
            return self.operation(f"vm.{action}", _ref("vm", vm))
        changed = self._keep(vm, state=following)
        await self.happen(f"vm.{action}", _ref("vm", vm), call.actor)
        if call.wait_s == 0:
            operation = self.operation(f"vm.{action}", _ref("vm", vm))
            await self.finish(operation.id, OperationState.SUCCEEDED)
            return operation
        return changed

    async def patch_disk(self, ref: str, disk_id: str, patch: DiskPatch, call: Call) -> Vm:
        vm = self._checked(ref, call)
        if disk_id not in [disk.id for disk in vm.disks]:
            raise NotFound("disk_not_found", f"VM {vm.name} has no disk {disk_id}")
        changes: dict[str, object] = {}
        if patch.size_mib is not None:
            changes["size_bytes"] = patch.size_mib << 20
        if "rate_limit" in patch.model_fields_set:
            changes["rate_limit"] = patch.rate_limit
        if patch.path is not None:
            changes |= {"path": patch.path, "image": None}
        disks = [d.model_copy(update=changes) if d.id == disk_id else d for d in vm.disks]
        return self._keep(vm, disks=disks)

    async def patch_rate_group(
        self, ref: str, group_id: str, patch: RateGroupPatch, call: Call
    ) -> Vm:
        vm = self._checked(ref, call)
        if group_id not in [group.id for group in vm.rate_groups]:
            raise NotFound("rate_group_not_found", f"VM {vm.name} has no rate group {group_id}")
        changed = RateGroup(id=group_id, rate_limit=patch.rate_limit)
        groups = [changed if group.id == group_id else group for group in vm.rate_groups]
        return self._keep(vm, rate_groups=groups)

    async def patch_nic(self, ref: str, nic_id: str, patch: NicPatch, call: Call) -> Vm:
        vm = self._checked(ref, call)
        if nic_id not in [nic.id for nic in vm.nics]:
            raise NotFound("nic_not_found", f"VM {vm.name} has no network interface {nic_id}")
        changes = {name: getattr(patch, name) for name in patch.model_fields_set}
        nics = [n.model_copy(update=changes) if n.id == nic_id else n for n in vm.nics]
        return self._keep(vm, nics=nics)

    async def attach(self, ref: str, wanted: DiskCreate | NicCreate, call: Call) -> Vm:
        vm = self._checked(ref, call)
        if wanted.id in [*(disk.id for disk in vm.disks), *(nic.id for nic in vm.nics)]:
            raise Conflict("device_taken", f"VM {vm.name} has a device {wanted.id}", field="id")
        if isinstance(wanted, DiskCreate):
            return self._keep(vm, disks=[*vm.disks, _disk(wanted)])
        return self._keep(vm, nics=[*vm.nics, _nic(wanted)])

    async def detach(
        self, ref: str, device: tuple[DeviceKind, str], how: DetachQuery, call: Call
    ) -> Vm:
        vm = self._checked(ref, call)
        kind, device_id = device
        devices = vm.disks if kind == "disk" else vm.nics
        if device_id not in [found.id for found in devices]:
            raise NotFound(f"{kind}_not_found", f"VM {vm.name} has no {kind} {device_id}")
        if device_id in self.kept_devices and not how.force:
            raise Conflict("guest_keeps_device", "not in time", state=vm.state)
        rest = [found for found in devices if found.id != device_id]
        return self._keep(vm, **{f"{kind}s": rest})

    async def vm_stats(self, ref: str) -> VmStats:
        vm = self._vm(ref)
        return VmStats(
            vcpu_exits={"pio": 1},
            disks={disk.id: {"read_bytes": 512} for disk in vm.disks},
            nics={},
            memory_rss_bytes=1,
            console_dropped_bytes=0,
        )

    async def read_console(self, ref: str, offset: int, limit: int) -> ConsoleChunk:
        log = self.consoles[self._vm(ref).id]
        start = max(0, len(log) + offset) if offset < 0 else min(offset, len(log))
        return ConsoleChunk(start, bytes(log[start : start + limit]), len(log))

    async def follow_console(self, ref: str, offset: int) -> AsyncIterator[ConsoleChunk]:
        vm_id = self._vm(ref).id
        self.followers += 1
        try:
            while vm_id in self.vms:
                log = self.consoles[vm_id]
                if len(log) > offset:
                    data = bytes(log[offset : offset + 65536])
                    yield ConsoleChunk(offset, data, len(log))
                    offset += len(data)
                    continue
                async with self._news:
                    await self._news.wait()
        finally:
            self.followers -= 1

    async def write_console(self, ref: str, data: bytes) -> int:
        vm = self._vm(ref)
        if vm.state is not VmState.RUNNING:
            raise Conflict("wrong_state", f"VM {vm.name} is {vm.state}", state=vm.state)
        self.writes += 1
        taken = data[: self.typed_per_call]
        self.typed[vm.id] += taken
        if self.does_echo:
            await self.say(vm.id, taken)
        return len(taken)

    async def list_kernels(self, query: ListQuery) -> Page[Kernel]:
        return _page(list(self.kernels.values()), query)

    async def get_kernel(self, ref: str) -> Kernel:
        return _find(self.kernels, ref, "kernel")

    def _add_kernel(self, name: str, digest: str, size: int) -> Kernel:
        if any(kernel.name == name for kernel in self.kernels.values()):
            raise Conflict("name_taken", f"kernel {name} exists", field="name")
        kernel = Kernel(
            id=self._new_id(),
            name=name,
            sha256=digest,
            size_bytes=size,
            format="elf",
            compression=None,
            entry="pvh",
            banner=None,
            created_at=EPOCH,
            version=1,
        )
        self.kernels[kernel.id] = kernel
        return kernel

    async def import_kernel(self, request: KernelImport, call: Call) -> Kernel | Operation:
        self.calls.append(call)
        return self._add_kernel(request.name, request.sha256 or "0" * 64, 1)

    async def upload_kernel(
        self, name: str, sha256: str | None, body: AsyncIterator[bytes], call: Call
    ) -> Kernel | Operation:
        self.calls.append(call)
        digest, size = await self._receive(sha256, body)
        return self._add_kernel(name, digest, size)

    async def _receive(self, sha256: str | None, body: AsyncIterator[bytes]) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        try:
            async for chunk in body:
                digest.update(chunk)
                size += len(chunk)
        except ApiError as err:
            self.broken_uploads.append(err.code)
            raise
        self.uploads.append(size)
        if sha256 not in (None, digest.hexdigest()):
            raise Invalid("digest_differs", "the body has another sha256", field="sha256")
        return digest.hexdigest(), size

    async def delete_kernel(self, ref: str, call: Call) -> None:
        self.calls.append(call)
        del self.kernels[_find(self.kernels, ref, "kernel").id]

    async def list_images(self, query: ListQuery) -> Page[Image]:
        return _page(list(self.images.values()), query)

    async def get_image(self, ref: str) -> Image:
        return _find(self.images, ref, "image")

    def _add_image(
        self, name: str, kind: Literal["disk", "initrd"], digest: str, size: int
    ) -> Image:
        if any(image.name == name for image in self.images.values()):
            raise Conflict("name_taken", f"image {name} exists", field="name")
        image = Image(
            id=self._new_id(),
            name=name,
            kind=kind,
            sha256=digest,
            size_bytes=size,
            created_at=EPOCH,
            version=1,
        )
        self.images[image.id] = image
        return image

    async def import_image(self, request: ImageImport, call: Call) -> Image | Operation:
        self.calls.append(call)
        if self.is_slow:
            image = self._add_image(request.name, request.kind, "0" * 64, 1)
            return self.operation("image.import", _ref("image", image))
        return self._add_image(request.name, request.kind, request.sha256 or "0" * 64, 1)

    async def upload_image(
        self,
        name: str,
        kind: Literal["disk", "initrd"],
        sha256: str | None,
        body: AsyncIterator[bytes],
        call: Call,
    ) -> Image | Operation:
        self.calls.append(call)
        digest, size = await self._receive(sha256, body)
        return self._add_image(name, kind, digest, size)

    async def delete_image(self, ref: str, call: Call) -> None:
        self.calls.append(call)
        del self.images[_find(self.images, ref, "image").id]

    async def list_operations(self, query: ListQuery) -> Page[Operation]:
        newest = list(self.operations.values())[::-1]
        return Page[Operation](items=newest[: query.limit])

    async def get_operation(self, operation_id: str, wait_s: float) -> Operation:
        if operation_id not in self.operations:
            raise NotFound("operation_not_found", f"operation {operation_id} is not there")
        try:
            async with asyncio.timeout(wait_s), self._news:
                while self.operations[operation_id].state is OperationState.RUNNING:
                    await self._news.wait()
        except TimeoutError:
            pass
        return self.operations[operation_id]

    async def cancel_operation(self, operation_id: str, call: Call) -> Operation:
        self.calls.append(call)
        operation = await self.get_operation(operation_id, 0)
        if not operation.may_cancel:
            raise Conflict("has_ended", f"operation {operation_id} has ended")
        await self.finish(operation_id, OperationState.CANCELLED)
        return self.operations[operation_id]

    async def list_events(self, after: int, limit: int) -> list[Event]:
        return self.events[after : after + limit]

    async def follow_events(self, after: int | None) -> AsyncIterator[Event]:
        at = len(self.events) if after is None else after
        self.followers += 1
        try:
            while True:
                if at < len(self.events):
                    yield self.events[at]
                    at += 1
                    continue
                async with self._news:
                    await self._news.wait()
        finally:
            self.followers -= 1

    async def claim_key(self, key: str, fingerprint: str) -> StoredReply | None:
        if key not in self.keys:
            self.keys[key] = (fingerprint, None)
            return None
        known, reply = self.keys[key]
        if known != fingerprint:
            raise Invalid("idempotency_key_reused", f"key {key} was used for another request")
        if reply is None:
            raise Conflict("idempotency_key_in_use", f"the first request with key {key} runs")
        return reply

    async def settle_key(self, key: str, reply: StoredReply | None) -> None:
        fingerprint, _ = self.keys.pop(key)
        if reply is not None:
            self.keys[key] = (fingerprint, reply)


class BusyService(FakeService):
    """One that has no time."""

    async def list_vms(self, query: ListQuery) -> Page[Vm]:
        raise Busy("too_busy", "try again")


def _ref(kind: Literal["vm", "image"], thing: Vm | Image) -> ObjectRef:
    return ObjectRef(kind=kind, id=thing.id, name=thing.name)


def _find(objects: dict[str, T], ref: str, kind: str) -> T:
    for found in objects.values():
        if ref in (found.id, found.name):
            return found
    raise NotFound(f"{kind}_not_found", f"{kind} {ref} is not there")


def _page(objects: list[T], query: ListQuery) -> Page[T]:
    ordered = sorted(objects, key=lambda each: each.name)
    later = [each for each in ordered if query.cursor is None or each.name > query.cursor]
    items = later[: query.limit]
    cursor = items[-1].name if len(later) > len(items) else None
    return Page(items=items, next_cursor=cursor)


def _disk(wanted: DiskCreate) -> Disk:
    return Disk(
        id=wanted.id,
        path=wanted.path or wanted.nbd or f"/state/{wanted.image}",
        image=wanted.image,
        format="nbd" if wanted.nbd else wanted.format,
        read_only=wanted.read_only,
        size_bytes=(wanted.size_mib or 1) << 20,
        cache=wanted.cache,
        io_engine=wanted.io_engine,
        rate_limit=wanted.rate_limit,
        rate_group=wanted.rate_group,
    )


def _vsock(wanted: VsockCreate) -> Vsock:
    if wanted.backend == "vhost":
        return Vsock(cid=wanted.cid or 1000, backend="vhost", path=None)
    return Vsock(cid=wanted.cid or 1000, backend="unix", path="/run/hostel/vsock/1/v.sock")


def _nic(wanted: NicCreate) -> Nic:
    return Nic(
        id=wanted.id,
        tap=None if wanted.socket else wanted.tap or "tap0",
        mac=wanted.mac or "02:00:00:00:00:01",
        mtu=wanted.mtu,
        bridge=wanted.bridge,
        socket=wanted.socket,
        backend=wanted.backend,
        queues=wanted.queues or 1,
        link=wanted.link,
        rx_limit=wanted.rx_limit,
        tx_limit=wanted.tx_limit,
    )
