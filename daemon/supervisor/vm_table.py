# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""All VMs in memory: the database's rows, their workers, their locks; and how both are kept.

Two ways to change a VM. commit() is for what is intended: it fails when it cannot be written, and
then nothing has changed. record() is for what has happened: it is true whatever the disk says, so
it never fails, and is written again and again until it is kept. What is lost with a crash in
between is found again at the next start, from the worker itself or from its last words.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from api.errors import Conflict, NotFound, PreconditionFailed
from api.models.common import ObjectRef, Page
from api.models.devices import Pmem, Port, Share, Vsock, Watchdog
from api.models.limits import RateGroup, RateLimit
from api.models.vms import Disk, Nic, StateReason, Vm
from api.ports import ListQuery

from . import lifecycle
from .records import NicRecord, ReasonRecord, VmRecord, delete_vm, now, save_vm
from .store import NewEvent, Store, StoreFull
from .tasks import Tasks
from .workers import Worker

log = logging.getLogger(__name__)

RETRY_S: Final = 2.0
# Events of one VM that wait for space; the oldest go first.
MAX_UNSAVED_EVENTS: Final = 64


@dataclass(eq=False)
class VmEntry:
    """One VM.

    Attributes:
        record: what is known of it; replaced, never changed.
        lock: held by whatever changes it, for the whole of that.
        worker: its process, while there is one.
        kill_requested: someone has asked for its end; whoever sees it end says "stopped".
        resets: how many of the worker's resets have been told; None before the first status.
        sync_pending: a task is on its way that takes over what the worker has told.
        gone: set when it has been deleted.
        unsaved: events that the database could not take yet; None when all is kept.
    """

    record: VmRecord
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    worker: Worker | None = None
    kill_requested: bool = False
    resets: int | None = None
    sync_pending: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    unsaved: list[NewEvent] | None = None

    @property
    def ref(self) -> ObjectRef:
        """The VM as events and operations name it."""
        return ObjectRef(kind="vm", id=self.record.id, name=self.record.name)

    def event(self, kind: str, actor: str | None = None, **data: object) -> NewEvent:
        """Return an event about the VM, such as ``vm.started``."""
        return NewEvent(f"vm.{kind}", self.ref, actor, dict(data))

    def check_present(self) -> None:
        """Refuse to go on with a VM that was deleted while the caller waited.

        Raises:
            NotFound: it was.
        """
        if self.gone.is_set():
            raise NotFound("vm_not_found", f"VM {self.record.name} has been deleted")

    def check_version(self, if_match: int | None) -> None:
        """Refuse a change of another version than the client has seen.

        Raises:
            PreconditionFailed: it has changed since.
        """
        if if_match is not None and if_match != self.record.version:
            raise PreconditionFailed(
                "version_changed",
                f"VM {self.record.name} has version {self.record.version}, not {if_match}: read it"
                " again",
            )


class VmTable:
    """The VMs by id and by name.

    Threads: the event loop's.
    """

    def __init__(self, store: Store, tasks: Tasks) -> None:
        self._store = store
        self._tasks = tasks
        self._by_id: dict[str, VmEntry] = {}
        self._by_name: dict[str, VmEntry] = {}
        self._reserved: set[str] = set()
        self._held_cids: dict[int, str] = {}
        self._retry: asyncio.Task[None] | None = None

    def __iter__(self) -> Iterator[VmEntry]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    async def load(self) -> None:
        """Read all VMs from the database.

        Raises:
            StoreFull: it cannot be read.
        """
        for (doc,) in await self._store.fetch("SELECT doc FROM vms"):
            self._add(VmEntry(VmRecord.decode(doc)))
        for entry in self:
            # From before such names were refused.
            if (twin := self._by_id.get(entry.record.name)) is not None and twin is not entry:
                log.warning(
                    "a VM's name is another one's id, so it stands for that one; rename it"
                    " name=%s vm=%s",
                    entry.record.name,
                    entry.record.id,
                )

    def get(self, ref: str) -> VmEntry:
        """Return a VM by id, which wins, or by name.

        Raises:
            NotFound: there is none.
        """
        entry = self._by_id.get(ref) or self._by_name.get(ref)
        if entry is None:
            raise NotFound("vm_not_found", f"no VM {ref}")
        return entry

    def find(self, vm_id: str) -> VmEntry | None:
        """Return a VM by id."""
        return self._by_id.get(vm_id)

    def page(self, query: ListQuery, names: dict[str, str]) -> Page[Vm]:
        """Return VMs in order of name; ``names`` maps ids of kernels and images to names."""
        start = query.cursor or ""
        found = [
            self._by_name[name]
            for name in sorted(self._by_name)
            if name > start and _matches(self._by_name[name].record, query)
        ]
        items = found[: query.limit]
        more = items[-1].record.name if len(found) > len(items) else None
        return Page[Vm](items=[to_model(entry, names) for entry in items], next_cursor=more)

    def reserve(self, name: str) -> None:
        """Keep a name for a VM that is being made; release() or insert() ends that.

        Raises:
            Conflict: it is taken.
        """
        if name in self._by_name or name in self._reserved:
            raise Conflict("name_taken", f"a VM {name} exists already", field="name")
        self._reserved.add(name)

    def release(self, name: str) -> None:
        """Give a reserved name back."""
        self._reserved.discard(name)

    def cids(self) -> dict[int, str]:
        """Return the CIDs that are taken, each with the name of its VM."""
        return self._held_cids | {
            entry.record.vsock.cid: entry.record.name for entry in self if entry.record.vsock
        }

    @contextlib.contextmanager
    def holding_cid(self, record: VmRecord) -> Iterator[None]:
        """Keep the CID of a VM that is being made."""
        if record.vsock is None:
            yield
            return
        self._held_cids[record.vsock.cid] = record.name
        try:
            yield
        finally:
            del self._held_cids[record.vsock.cid]

    # --- changes

    async def insert(self, entry: VmEntry, actor: str) -> None:
        """Commit a new VM, whose name is reserved, with its event.

        Raises:
            StoreFull: nothing has changed.
        """
        event = entry.event("created", actor)
        await self._store.commit(save_vm(entry.record), events=[event])
        self._add(entry)

    async def commit(
        self,
        entry: VmEntry,
        *events: NewEvent,
        **changes: Any,  # noqa: ANN401 - fields of VmRecord
    ) -> None:
        """Change what is intended; the caller holds the lock.

        Raises:
            StoreFull: nothing has changed.
            Conflict: the new name is taken.
        """
        record = _changed(entry.record, changes)
        waiting = entry.unsaved or []
        try:
            await self._store.commit(save_vm(record), events=[*waiting, *events])
        except sqlite3.IntegrityError as err:
            raise Conflict(
                "name_taken", f"a VM {record.name} exists already", field="name"
            ) from err
        entry.unsaved = None
        self._swap(entry, record)

    async def record(
        self,
        entry: VmEntry,
        *events: NewEvent,
        **changes: Any,  # noqa: ANN401 - fields of VmRecord
    ) -> None:
        """Take note of what has happened; the caller holds the lock. Never fails."""
        record = _changed(entry.record, changes)
        waiting = [*(entry.unsaved or []), *events]
        try:
            await self._store.commit(save_vm(record), events=waiting)
            entry.unsaved = None
        except (StoreFull, sqlite3.Error) as err:
            log.error("state not kept vm=%s state=%s error=%s", record.name, record.state, err)
            entry.unsaved = waiting[-MAX_UNSAVED_EVENTS:]
            if self._retry is None:
                self._retry = self._tasks.spawn(self._save_unsaved(), "save-unsaved")
        self._swap(entry, record)

    async def remove(self, entry: VmEntry, *events: NewEvent) -> None:
        """Commit that a VM is no more.

        Raises:
            StoreFull: nothing has changed.
        """
        await self._store.commit(
            delete_vm(entry.record.id), events=[*(entry.unsaved or []), *events]
        )
        entry.unsaved = None
        del self._by_id[entry.record.id]
        del self._by_name[entry.record.name]
        entry.gone.set()

    async def _save_unsaved(self) -> None:
        """Write what could not be written, until all is kept."""
        try:
            while late := [entry for entry in self if entry.unsaved is not None]:
                await asyncio.sleep(RETRY_S)
                for entry in late:
                    async with entry.lock:
                        if entry.unsaved is not None and not entry.gone.is_set():
                            await self._save_one(entry)
        finally:
            self._retry = None

    async def _save_one(self, entry: VmEntry) -> None:
        try:
            await self._store.commit(save_vm(entry.record), events=entry.unsaved or [])
        except (StoreFull, sqlite3.Error) as err:
            log.debug("state still not kept vm=%s error=%s", entry.record.name, err)
            return
        entry.unsaved = None
        log.info("state kept again vm=%s", entry.record.name)

    def _add(self, entry: VmEntry) -> None:
        self._by_id[entry.record.id] = entry
        self._by_name[entry.record.name] = entry
        self._reserved.discard(entry.record.name)

    def _swap(self, entry: VmEntry, record: VmRecord) -> None:
        if record.name != entry.record.name:
            del self._by_name[entry.record.name]
            self._by_name[record.name] = entry
            self._reserved.discard(record.name)
        entry.record = record


def _changed(record: VmRecord, changes: dict[str, Any]) -> VmRecord:
    if "state" in changes:
        lifecycle.check_outcome(record.state, changes["state"])
    return replace(record, version=record.version + 1, **changes)


def _matches(record: VmRecord, query: ListQuery) -> bool:
    if query.state is not None and record.state is not query.state:
        return False
    if query.label is None:
        return True
    key, equals, value = query.label.partition("=")
    return key in record.labels and (not equals or record.labels[key] == value)


def reason(code: str, message: str, detail: dict[str, Any] | None = None) -> ReasonRecord:
    """Return a reason as of now; ``detail`` is cut to strings and integers."""
    kept: dict[str, str | int] = {
        str(key): value if isinstance(value, int | str) else str(value)
        for key, value in (detail or {}).items()
    }
    return ReasonRecord(code, message, now(), kept)


def to_model(entry: VmEntry, names: dict[str, str]) -> Vm:
    """Return a VM as clients see it; ``names`` maps ids of kernels and images to names."""
    record = entry.record
    why, vsock = record.reason, record.vsock
    return Vm(
        id=record.id,
        name=record.name,
        state=record.state,
        reason=None
        if why is None
        else StateReason(code=why.code, message=why.message, at=why.at, detail=why.detail),
        actions=lifecycle.allowed_actions(record.state),
        vcpus=record.vcpus,
        memory_mib=record.memory_mib,
        kernel=names.get(record.kernel_id, record.kernel_id),
        initrd=record.initrd_id and names.get(record.initrd_id, record.initrd_id),
        cmdline=record.cmdline,
        disks=[
            Disk(
                id=disk.id,
                path=disk.path,
                image=disk.image_id and names.get(disk.image_id, disk.image_id),
                format=disk.format,
                read_only=disk.read_only,
                size_bytes=disk.size_bytes,
                cache=disk.cache,
                io_engine=disk.io_engine,
                rate_limit=_limit(disk.rate_limit),
                rate_group=disk.rate_group,
            )
            for disk in record.disks
        ],
        rate_groups=[
            RateGroup(id=group_id, rate_limit=_limit(limits))
            for group_id, limits in record.rate_groups.items()
        ],
        nics=[_nic(nic, record.vcpus) for nic in record.nics],
        vsock=None if vsock is None else Vsock(**asdict(vsock)),
        shares=[Share(**asdict(share)) for share in record.shares],
        pmem=[Pmem(**asdict(pmem)) for pmem in record.pmem],
        ports=[Port(**asdict(port)) for port in record.ports],
        rng=record.rng,
        on_reboot=record.on_reboot,
        on_panic=record.on_panic,
        watchdog=None if record.watchdog is None else Watchdog(action=record.watchdog),
        labels=record.labels,
        pid=None if entry.worker is None else entry.worker.pid,
        boot_time_us=record.boot_time_us,
        created_at=record.created_at,
        started_at=record.started_at,
        version=record.version,
    )


def _nic(nic: NicRecord, vcpus: int) -> Nic:
    return Nic(
        id=nic.id,
        tap=nic.tap or None,
        mac=nic.mac,
        mtu=nic.mtu,
        bridge=nic.bridge,
        backend=nic.backend,
        queues=nic.n_pairs(vcpus),
        link=nic.link,
        rx_limit=_limit(nic.rx_limit),
        tx_limit=_limit(nic.tx_limit),
        socket=nic.socket,
    )


def _limit(limits: dict[str, int]) -> RateLimit | None:
    return RateLimit(**limits) if limits else None
