# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""From what a client asks for to a VM's record: references resolved, everything checked.

Nothing here changes anything; what passes may still fail later, since the host goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from api.errors import ApiError, Conflict, Invalid
from api.models.devices import MAX_CID, PortCreate, ShareCreate, VsockCreate
from api.models.limits import RateLimit
from api.models.resources import Image
from api.models.vms import (
    OWN_DEVICES,
    DiskCreate,
    NicCreate,
    VmCreate,
    VmPatch,
    VmState,
)

from ..protocol import DISK_SLOTS, NIC_SLOTS
from . import backend_tools, disks, lifecycle, pmem, procfs, taps
from .backends import Backends
from .dirs import Layout
from .launch import MIB
from .library import Library
from .records import (
    DiskRecord,
    NicRecord,
    PmemRecord,
    PortRecord,
    ShareRecord,
    VmRecord,
    VsockRecord,
    now,
)
from .vm_table import VmEntry, VmTable
from .vsock import SOCKET_NAME

# What a patch may change in any state; the rest needs a VM at rest.
_FREE_FIELDS: Final = frozenset({"name", "labels"})
# CIDs that hosteld chooses start here, out of the way of those that people choose: 3, 4, 5.
FIRST_CID: Final = 1000


class Planner:
    """Checks requests against the host, the library and the other VMs.

    Threads: the event loop's; looking at files happens in others.
    """

    def __init__(
        self, table: VmTable, library: Library, layout: Layout, backends: Backends
    ) -> None:
        self._table = table
        self._backends = backends
        self._library = library
        self._layout = layout

    async def plan_create(self, request: VmCreate) -> VmRecord:
        """Return the record of a new VM, in state stopped.

        Raises:
            ApiError: a value is out of range, or names something that is not there.
        """
        _check_memory(request.memory_mib)
        _check_groups(request.disks, [group.id for group in request.rate_groups])
        kernel = self._library.kernels.resolve(request.kernel, "kernel")
        initrd = self._initrd(request.initrd)
        vm_id = str(uuid.uuid4())
        record = VmRecord(
            id=vm_id,
            name=request.name,
            state=VmState.STOPPED,
            reason=None,
            vcpus=request.vcpus,
            memory_mib=request.memory_mib,
            kernel_id=kernel.id,
            initrd_id=None if initrd is None else initrd.id,
            cmdline=request.cmdline,
            disks=await self._plan_disks(vm_id, request.disks),
            rate_groups={group.id: limits_of(group.rate_limit) for group in request.rate_groups},
            nics=self._plan_nics(vm_id, request.nics),
            shares=self._plan_shares(request.shares),
            # After what is awaited: the caller holds the CID before anyone else can ask for one.
            vsock=self._plan_vsock(vm_id, request.vsock),
            rng=request.rng,
            on_reboot=request.on_reboot,
            on_panic=request.on_panic,
            pmem=await self._plan_pmem(request),
            ports=self._plan_ports(vm_id, request.ports),
            watchdog=None if request.watchdog is None else request.watchdog.action,
            labels=request.labels,
            boot_time_us=None,
            created_at=now(),
            started_at=None,
            version=1,
        )
        self.check_fit(record)
        return record

    def plan_patch(self, entry: VmEntry, patch: VmPatch) -> dict[str, Any]:
        """Return what a patch changes in a VM's record.

        Raises:
            ApiError: the state does not allow it, or as plan_create().
        """
        record = entry.record
        # Null stands for "as it is", but for the initrd, which a VM may be without.
        changes: dict[str, Any] = {
            name: value
            for name in patch.model_fields_set - {"initrd"}
            if (value := getattr(patch, name)) is not None
        }
        if "initrd" in patch.model_fields_set:
            image = self._initrd(patch.initrd)
            changes["initrd_id"] = None if image is None else image.id
        if "kernel" in changes:
            kernel = self._library.kernels.resolve(changes.pop("kernel"), "kernel")
            changes["kernel_id"] = kernel.id
        changes = {key: value for key, value in changes.items() if value != getattr(record, key)}
        for key in changes.keys() - _FREE_FIELDS:
            lifecycle.check_reshape(record.name, record.state, key.removesuffix("_id"))
        if "memory_mib" in changes:
            _check_memory(changes["memory_mib"])
        return changes

    async def plan_disk(self, record: VmRecord, wanted: DiskCreate) -> DiskRecord:
        """Return the record of one more disk of a VM.

        Raises:
            ApiError: as plan_create(), its id is taken, or there are too many.
        """
        _check_device(record, wanted.id)
        _check_groups([wanted], record.rate_groups)
        slot = _free_slot(record, DISK_SLOTS, [disk.slot for disk in record.disks], "disks")
        await _check_twice((*record.disks, *record.pmem), wanted)
        (disk,) = await self._plan_disks(record.id, [wanted])
        if disk.is_own:
            # A name of its own: the file of an earlier disk of that id may be on its way out.
            path = Path(disk.path).with_name(f"{disk.id}-{uuid.uuid4().hex[:8]}.raw")
            return replace(disk, path=str(path), slot=slot)
        return replace(disk, slot=slot)

    async def plan_swap(self, record: VmRecord, disk: DiskRecord, path: str) -> DiskRecord:
        """Return the record of a disk that is to use another file; raises as plan_disk()."""
        wanted = DiskCreate(id=disk.id, path=path, read_only=disk.read_only, cache=disk.cache)
        others = [other for other in record.disks if other.id != disk.id]
        await _check_twice((*others, *record.pmem), wanted)
        (found,) = await self._plan_disks(record.id, [wanted])
        return disk.with_file(path, found.size_bytes)

    def plan_nic(self, record: VmRecord, wanted: NicCreate) -> NicRecord:
        """Return the record of one more network interface of a VM; raises as plan_disk()."""
        _check_device(record, wanted.id)
        slot = _free_slot(record, NIC_SLOTS, [nic.slot for nic in record.nics], "nics")
        (nic,) = self._plan_nics(record.id, [wanted], slot)
        return nic

    def check_fit(self, record: VmRecord) -> None:
        """Refuse a VM whose kernel, initrd and command line do not fit its memory.

        Raises:
            FitError: they do not.
            Invalid: the kernel's files are gone.
        """
        # Imported here: it brings the KVM binding along, which the rest of hosteld does without.
        from ..worker.boot import check_fit

        kernel = self._library.kernels.get(record.kernel_id)
        elf = self._library.elf(kernel)
        if elf is None:
            raise Invalid(
                "kernel_lost",
                f"the files of kernel {kernel.name} are gone; delete and import it again",
                field="kernel",
            )
        initrd_bytes = 0
        if record.initrd_id is not None:
            initrd_bytes = self._library.images.get(record.initrd_id).size_bytes
        check_fit(
            elf,
            initrd_bytes=initrd_bytes,
            memory_bytes=record.memory_mib * MIB,
            cmdline=record.cmdline,
            setup_header=bytes.fromhex(self._library.setup_header(kernel.id)),
        )

    def _initrd(self, ref: str | None) -> Image | None:
        if ref is None:
            return None
        image = self._library.images.resolve(ref, "initrd")
        if image.kind != "initrd":
            raise Invalid(
                "image_kind",
                f"image {image.name} is a {image.kind}; import it with kind initrd",
                field="initrd",
            )
        return image

    # --- disks

    async def _plan_disks(self, vm_id: str, wanted: list[DiskCreate]) -> tuple[DiskRecord, ...]:
        records = []
        seen: dict[tuple[int, int], DiskCreate] = {}
        for index, disk in enumerate(wanted):
            slot = DISK_SLOTS[index]
            if disk.nbd is not None:
                nbd = await self._plan_nbd(vm_id, disk, disk.nbd, index)
                records.append(replace(nbd, slot=slot))
                continue
            if disk.path is None:
                records.append(replace(self._image_disk(vm_id, disk, index), slot=slot))
                continue
            field = f"disks.{index}.path"
            is_direct = disk.cache == "none"
            look = partial(
                disks.inspect, disk.path, field, read_only=disk.read_only, is_direct=is_direct
            )
            found = await asyncio.to_thread(look)
            self._check_foreign(disk.path, field)
            twin = seen.setdefault(found.identity, disk)
            if twin is not disk and not (twin.read_only and disk.read_only):
                raise Invalid(
                    "disk_twice",
                    f"disks {twin.id} and {disk.id} are the same file; only read_only ones may be",
                    field=field,
                )
            record = DiskRecord(
                *(disk.id, disk.path, None, False, disk.read_only, found.size_bytes),
                **_io_of(disk),
                slot=slot,
                format=disk.format,
            )
            records.append(await self._with_format(vm_id, record, field))
        return tuple(records)

    async def _with_format(self, vm_id: str, disk: DiskRecord, field: str) -> DiskRecord:
        """Return a disk with its image's own size, after a look into the image."""
        if disk.format == "raw":
            return disk
        probe = replace(disk, read_only=True)
        fd = await asyncio.to_thread(disks.open_unlocked, probe, field)
        try:
            size_bytes = await self._backends.measure(vm_id, probe, field, fd)
        finally:
            os.close(fd)
        return replace(disk, size_bytes=size_bytes)

    async def _plan_nbd(self, vm_id: str, disk: DiskCreate, uri: str, index: int) -> DiskRecord:
        field = f"disks.{index}.nbd"
        try:
            backend_tools.parse_nbd(uri)
        except ValueError as err:
            raise Invalid("nbd_uri", str(err), field=field) from err
        record = DiskRecord(disk.id, uri, None, False, disk.read_only, 0, format="nbd")
        probe = replace(record, read_only=True)
        return replace(record, size_bytes=await self._backends.measure(vm_id, probe, field, None))

    def _plan_shares(self, wanted: list[ShareCreate]) -> tuple[ShareRecord, ...]:
        for index, share in enumerate(wanted):
            field = f"shares.{index}.path"
            backend_tools.check_share(share.path, field)
            self._check_foreign(share.path, field)
            shared, state = os.path.realpath(share.path), os.path.realpath(self._layout.state)
            if os.path.commonpath([shared, state]) == shared:
                raise Invalid(
                    "share_holds_state_dir",
                    f"{share.path} holds hosteld's own directory {self._layout.state}",
                    field=field,
                )
        return tuple(ShareRecord(share.tag, share.path, share.read_only) for share in wanted)

    async def _plan_pmem(self, request: VmCreate) -> tuple[PmemRecord, ...]:
        records = []
        paths = [disk.path for disk in request.disks if disk.path is not None]
        for index, wanted in enumerate(request.pmem):
            field = f"pmem.{index}.path"
            look = partial(pmem.measure, wanted.path, field, read_only=wanted.read_only)
            size_bytes = await asyncio.to_thread(look)
            self._check_foreign(wanted.path, field)
            for other in paths:
                if await asyncio.to_thread(_is_same_file, other, wanted.path):
                    raise Invalid("pmem_twice", f"{wanted.path} is used twice", field=field)
            paths.append(wanted.path)
            records.append(PmemRecord(wanted.id, wanted.path, wanted.read_only, size_bytes))
        return tuple(records)

    def _check_foreign(self, path: str, field: str) -> None:
        """Refuse hosteld's own files, by whatever path: the database, images, other VMs' disks."""
        state = os.path.realpath(self._layout.state)
        if os.path.commonpath([state, os.path.realpath(path)]) == state:
            raise Invalid(
                "disk_in_state_dir",
                f"{path} lies in hosteld's own directory {state}: move it, or import it",
                field=field,
            )

    def _image_disk(self, vm_id: str, disk: DiskCreate, index: int) -> DiskRecord:
        assert disk.image is not None
        image = self._library.images.resolve(disk.image, f"disks.{index}.image")
        if image.kind != "disk":
            raise Invalid(
                "image_kind",
                f"image {image.name} is an {image.kind}, no disk",
                field=f"disks.{index}.image",
            )
        if disk.read_only:
            path = self._library.image_path(image)
            size_bytes = image.size_bytes
            return DiskRecord(disk.id, path, image.id, False, True, size_bytes, **_io_of(disk))
        size_bytes = image.size_bytes if disk.size_mib is None else disk.size_mib * MIB
        if size_bytes < image.size_bytes:
            raise Invalid(
                "disk_too_small",
                f"size_mib={disk.size_mib}: image {image.name} needs"
                f" {-(-image.size_bytes // MIB)} or more",
                field=f"disks.{index}.size_mib",
            )
        sectors = -(-size_bytes // disks.SECTOR_BYTES)
        path = str(self._layout.vm_state(vm_id) / "disks" / f"{disk.id}.raw")
        size_bytes = sectors * disks.SECTOR_BYTES
        return DiskRecord(disk.id, path, image.id, True, False, size_bytes, **_io_of(disk))

    # --- network interfaces

    def _plan_nics(
        self, vm_id: str, wanted: list[NicCreate], first_slot: int = NIC_SLOTS[0]
    ) -> tuple[NicRecord, ...]:
        records: list[NicRecord] = []
        for index, nic in enumerate(wanted):
            slot = first_slot + index
            mac = nic.mac or derive_mac(vm_id, nic.id)
            if nic.socket is not None:
                alone = NicRecord(nic.id, "", mac, nic.mtu, None, queues=1, slot=slot)
                records.append(replace(alone, socket=nic.socket))
                continue
            tap = nic.tap or f"ht{vm_id[:8]}n{slot - NIC_SLOTS[0]}"
            self._check_tap(tap, index, records)
            if nic.bridge is not None:
                taps.check_bridge(nic.bridge, f"nics.{index}.bridge")
            limits = limits_of(nic.rx_limit), limits_of(nic.tx_limit)
            own = nic.backend, nic.queues, nic.link
            records.append(NicRecord(nic.id, tap, mac, nic.mtu, nic.bridge, *own, *limits, slot))
        return tuple(records)

    def _check_tap(self, tap: str, index: int, siblings: list[NicRecord]) -> None:
        field = f"nics.{index}.tap"
        if tap in (".", ".."):
            raise Invalid("tap_name", f"{tap} cannot be the name of an interface", field=field)
        if any(other.tap == tap for other in siblings):
            raise Invalid("tap_taken", f"tap {tap} is named twice", field=field)
        owner = next((name for name, other in self._taps() if other == tap), None)
        if owner is not None:
            raise Conflict("tap_taken", f"tap {tap} belongs to VM {owner}", field=field)
        taps.check_name(tap, field)

    # --- vsock, ports

    def _plan_ports(self, vm_id: str, wanted: list[PortCreate]) -> tuple[PortRecord, ...]:
        directory = self._layout.vm_runtime(vm_id) / "ports"
        return tuple(
            PortRecord(port.name, port.console, str(directory / port.name)) for port in wanted
        )

    def _plan_vsock(self, vm_id: str, wanted: VsockCreate | None) -> VsockRecord | None:
        if wanted is None:
            return None
        taken = self._table.cids()
        cid = wanted.cid
        if cid is None:
            cid = next(cid for cid in range(FIRST_CID, MAX_CID) if cid not in taken)
        elif cid in taken:
            raise Conflict("cid_taken", f"cid {cid} belongs to VM {taken[cid]}", field="vsock.cid")
        if wanted.backend == "vhost":
            return VsockRecord(cid, "vhost", None)
        # auto is unix: it needs no module and no privilege, the socket's path names the VM, file
        # permissions say who may talk to it, and a guest reaches what its own directory holds, and
        # nothing else that listens on the host. And what the host's programs have to speak must
        # not depend on which modules are loaded.
        return VsockRecord(cid, "unix", str(self._layout.vm_vsock(vm_id) / SOCKET_NAME))

    def _taps(self) -> Iterator[tuple[str, str]]:
        for entry in self._table:
            for nic in entry.record.nics:
                if nic.socket is None:
                    yield entry.record.name, nic.tap


def _io_of(disk: DiskCreate) -> dict[str, Any]:
    return {
        "cache": disk.cache,
        "io_engine": disk.io_engine,
        "rate_limit": limits_of(disk.rate_limit),
        "rate_group": disk.rate_group,
    }


def limits_of(rate_limit: RateLimit | None) -> dict[str, int]:
    """Return the limits that are set."""
    return {} if rate_limit is None else rate_limit.model_dump(exclude_none=True)


def _check_groups(disks: list[DiskCreate], groups: Iterable[str]) -> None:
    for index, disk in enumerate(disks):
        if disk.rate_group not in (None, *groups):
            raise Invalid(
                "rate_group_unknown",
                f"disk {disk.id}: the VM has no rate group {disk.rate_group}; it has:"
                f" {', '.join(groups) or 'none'}",
                field=f"disks.{index}.rate_group",
            )


def _check_device(record: VmRecord, device_id: str) -> None:
    ids = [*(disk.id for disk in record.disks), *(nic.id for nic in record.nics)]
    ids += [pmem.id for pmem in record.pmem]
    if device_id in (*OWN_DEVICES, *ids):
        raise Conflict(
            "device_taken", f"VM {record.name} has a device {device_id} already", field="id"
        )


def _free_slot(record: VmRecord, slots: range, taken: list[int | None], what: str) -> int:
    slot = next((slot for slot in slots if slot not in taken), None)
    if slot is None or len(taken) >= len(slots):
        raise Conflict(
            "too_many_devices", f"VM {record.name} has {len(taken)} {what}, the most that it may"
        )
    return slot


async def _check_twice(others: Iterable[DiskRecord | PmemRecord], wanted: DiskCreate) -> None:
    """Refuse a file that is another disk, or persistent memory, of the VM already.

    Raises:
        Invalid: it is.
    """
    for other in others:
        if wanted.path is None or (other.read_only and wanted.read_only):
            continue
        if await asyncio.to_thread(_is_same_file, other.path, wanted.path):
            raise Invalid(
                "disk_twice",
                f"{other.id} and {wanted.id} are the same file; only read_only ones may be",
                field="path",
            )


@contextlib.contextmanager
def own_fields() -> Iterator[None]:
    """Name fields as in a request for one device, and not as in one for a whole VM."""
    try:
        yield
    except ApiError as err:
        if err.field is not None:
            err.field = err.field.rpartition(".")[2]
        raise


def _is_same_file(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)  # noqa: PTH121 - the paths are kept as strings
    except OSError:
        return False  # whichever is missing, its opener says so


def derive_mac(vm_id: str, nic_id: str) -> str:
    """Return a locally administered unicast address that stays the same for this interface."""
    digest = hashlib.sha256(f"{vm_id}/{nic_id}".encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest[:5]))


def _check_memory(memory_mib: int) -> None:
    total_mib = procfs.memory_total() // MIB
    if memory_mib > total_mib:
        raise Invalid(
            "memory_too_large",
            f"memory_mib={memory_mib}: this host has {total_mib} MiB in all",
            field="memory_mib",
        )
