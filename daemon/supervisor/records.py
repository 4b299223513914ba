# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What the database keeps of each object, and the statements that keep it.

Records are immutable: a change makes a new one, which takes the old one's place once it is
committed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal

from api.models.resources import Kernel
from api.models.vms import VmState

from ..protocol import DISK_SLOTS, NIC_SLOTS
from .procfs import Identity
from .store import Statement

DiskFormat = Literal["raw", "qcow2", "vmdk", "vhdx", "nbd"]
OnReboot = Literal["reset", "stop"]
Cache = Literal["writeback", "none"]
IoEngine = Literal["auto", "io_uring", "threads"]
OnPanic = Literal["keep", "reset", "stop"]
# One for each vCPU as long as their threads and buffers stay small beside a guest's own.
MAX_AUTO_PAIRS: Final = 4

Link = Literal["up", "down"]
WatchdogAction = Literal["reset", "poweroff", "pause", "none"]
Backend = Literal["auto", "vhost", "tap"]


def now() -> datetime:
    """Return the time as every record carries it."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """A VM's disk.

    Attributes:
        path: of a file or block device, with format "nbd" the URI.
        is_own: it goes with the VM.
        rate_limit: what is limited.
        rate_group: the rate group of the VM that it shares limits with.
        slot: its PCI slot.
        format: as api.models.vms.Disk has it; all but "raw" are served by a back end.
        swaps: a number that the file at ``path`` has, and no other that the disk has had.
        other: {"path", "image_id", "size_bytes", "swaps"} of the file that the worker may have
            instead: the one before, or one that it was to have and did not take.
    """

    id: str
    path: str
    image_id: str | None
    is_own: bool
    read_only: bool
    size_bytes: int
    cache: Cache = "writeback"
    io_engine: IoEngine = "auto"
    rate_limit: dict[str, int] = field(default_factory=dict)
    slot: int | None = None
    format: DiskFormat = "raw"
    swaps: int = 0
    other: dict[str, Any] | None = None
    rate_group: str | None = None

    def with_file(self, path: str, size_bytes: int) -> DiskRecord:
        """Return the disk with another file, which the worker is to take."""
        swaps = max(self.swaps, self.other["swaps"] if self.other else 0) + 1
        return replace(
            self,
            path=path,
            image_id=None,
            size_bytes=size_bytes,
            swaps=swaps,
            other=self._file(),
        )

    def with_other(self) -> DiskRecord:
        """Return the disk with the file that it has instead."""
        assert self.other is not None
        return replace(self, **self.other, other=self._file())

    def _file(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("path", "image_id", "size_bytes", "swaps")}


@dataclass(frozen=True, slots=True)
class NicRecord:
    """A VM's network interface; ``slot`` is its PCI slot, of which guests make its name.

    One with a ``socket`` has an empty tap.
    """

    id: str
    tap: str
    mac: str
    mtu: int | None
    bridge: str | None
    backend: Backend = "auto"
    queues: int | None = None  # pairs; None: as the vCPUs are
    link: Link = "up"
    rx_limit: dict[str, int] = field(default_factory=dict)
    tx_limit: dict[str, int] = field(default_factory=dict)
    slot: int | None = None
    socket: str | None = None

    def n_pairs(self, vcpus: int) -> int:
        """Return how many pairs of queues it has in a VM of so many vCPUs."""
        return self.queues or min(vcpus, MAX_AUTO_PAIRS)


@dataclass(frozen=True, slots=True)
class ShareRecord:
    """A directory of the host that a VM may mount."""

    tag: str
    path: str
    read_only: bool

    @property
    def device_id(self) -> str:
        """Its device's id, which no disk and no interface can have."""
        return f"share:{self.tag}"


@dataclass(frozen=True, slots=True)
class VsockRecord:
    """A VM's vsock device; ``path`` is that of the socket for programs of the host, if any."""

    cid: int
    backend: Literal["unix", "vhost"]
    path: str | None


@dataclass(frozen=True, slots=True)
class PmemRecord:
    """A file or block device that a VM has as persistent memory."""

    id: str
    path: str
    read_only: bool
    size_bytes: int


@dataclass(frozen=True, slots=True)
class PortRecord:
    """A port of a VM's console device; ``path`` is that of its socket while the VM runs."""

    name: str
    console: bool
    path: str


@dataclass(frozen=True, slots=True)
class ReasonRecord:
    """Why a VM is in its state."""

    code: str
    message: str
    at: datetime
    detail: dict[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class VmRecord:
    """A VM as it is kept; see api.models.vms.Vm for the fields' meaning."""

    id: str
    name: str
    state: VmState
    reason: ReasonRecord | None
    vcpus: int
    memory_mib: int
    kernel_id: str
    initrd_id: str | None
    cmdline: str
    disks: tuple[DiskRecord, ...]
    nics: tuple[NicRecord, ...]
    rng: bool
    on_reboot: OnReboot
    on_panic: OnPanic
    labels: dict[str, str]
    boot_time_us: int | None
    created_at: datetime
    started_at: datetime | None
    version: int
    # How a later hosteld recognises the worker when that does not answer on its socket.
    worker: Identity | None = None
    vsock: VsockRecord | None = None
    # Disks of its own that it has no more, or not yet, whose files are to be removed.
    doomed: tuple[str, ...] = ()
    shares: tuple[ShareRecord, ...] = ()
    watchdog: WatchdogAction | None = None
    # How often it has expired since the start, as far as events have told.
    watchdog_expired: int = 0
    # How many errors of each disk's file in the worker's life have been told.
    disk_errors: dict[str, int] = field(default_factory=dict)
    ports: tuple[PortRecord, ...] = ()
    pmem: tuple[PmemRecord, ...] = ()
    # What is limited, by id.
    rate_groups: dict[str, dict[str, int]] = field(default_factory=dict)

    def encode(self) -> str:
        """Return the record as JSON text."""
        return _encode(_as_dict(self))

    @classmethod
    def decode(cls, text: str) -> VmRecord:
        """Build the record from encode()'s text."""
        doc = json.loads(text)
        doc["state"] = VmState(doc["state"])
        doc["created_at"] = datetime.fromisoformat(doc["created_at"])
        if doc["started_at"] is not None:
            doc["started_at"] = datetime.fromisoformat(doc["started_at"])
        if (reason := doc["reason"]) is not None:
            reason["at"] = datetime.fromisoformat(reason["at"])
            doc["reason"] = ReasonRecord(**reason)
        worker = doc.get("worker")  # records of before did not have it
        doc["worker"] = None if worker is None else Identity(**worker)
        vsock = doc.get("vsock")
        doc["vsock"] = None if vsock is None else VsockRecord(**vsock)
        doc["doomed"] = tuple(doc.get("doomed", ()))
        # Before slots were kept, devices filled them in their order.
        doc["disks"] = tuple(
            DiskRecord(**{"slot": slot, **disk})
            for slot, disk in zip(DISK_SLOTS, doc["disks"], strict=False)
        )
        doc["nics"] = tuple(
            NicRecord(**{"slot": slot, **nic})
            for slot, nic in zip(NIC_SLOTS, doc["nics"], strict=False)
        )
        doc["shares"] = tuple(ShareRecord(**share) for share in doc.get("shares", ()))
        doc["pmem"] = tuple(PmemRecord(**pmem) for pmem in doc.get("pmem", ()))
        doc["ports"] = tuple(PortRecord(**port) for port in doc.get("ports", ()))
        return cls(**doc)


@dataclass(frozen=True, slots=True)
class KernelRecord:
    """An imported kernel: as clients see it, and the hex of its setup header, empty for ELF."""

    model: Kernel
    setup_header: str

    def encode(self) -> str:
        """Return the record as JSON text."""
        return _encode(
            {"model": self.model.model_dump(mode="json"), "setup_header": self.setup_header}
        )

    @classmethod
    def decode(cls, text: str) -> KernelRecord:
        """Build the record from encode()'s text."""
        doc = json.loads(text)
        return cls(Kernel.model_validate(doc["model"]), doc["setup_header"])


def save_vm(record: VmRecord) -> Statement:
    """Insert or update a VM; the name's uniqueness is the database's to enforce."""
    return Statement(
        "INSERT INTO vms (id, name, state, doc) VALUES (?1, ?2, ?3, ?4) ON CONFLICT (id) DO UPDATE"
        " SET name = ?2, state = ?3, doc = ?4",
        (record.id, record.name, record.state.value, record.encode()),
    )


def delete_vm(vm_id: str) -> Statement:
    """Delete a VM's row."""
    return Statement("DELETE FROM vms WHERE id = ?", (vm_id,))


def _as_dict(record: object) -> dict[str, Any]:
    # dataclasses.asdict() copies deeply, which costs half a millisecond at every commit.
    return {name: getattr(record, name) for name in type(record).__slots__}  # type: ignore[attr-defined]


def _encode_other(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else _as_dict(value)


_encode: Final = json.JSONEncoder(separators=(",", ":"), default=_encode_other).encode
