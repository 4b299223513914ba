# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a worker's status says against its VM's record.

hosteld may die between the two. A device is in the record before the worker is asked to attach it,
and until the worker has detached it. So what the worker lacks was never attached, or is detached
already; and what only the worker has was given up on. Likewise the file behind a disk.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from api.models.vms import VmState

from ..protocol import Status
from .endings import reason_of
from .records import DiskRecord, NicRecord, ReasonRecord, VmRecord
from .store import NewEvent
from .vm_table import VmEntry

_STATES: Final = {
    "running": VmState.RUNNING,
    "paused": VmState.PAUSED,
    "crashed": VmState.CRASHED,
}


@dataclass(frozen=True, slots=True)
class Difference:
    """What a status says against a record.

    Attributes:
        lost: devices that the worker has not.
        strays: ids that the record has not.
    """

    lost: tuple[DiskRecord | NicRecord, ...] = ()
    strays: tuple[str, ...] = ()


def compare(record: VmRecord, status: Status) -> Difference:
    """Compare a record with what its worker has told."""
    if status.devices is None:
        return Difference()  # a worker of before, which cannot change them
    devices: tuple[DiskRecord | NicRecord, ...] = (*record.disks, *record.nics)
    ids = [device.id for device in devices]
    return Difference(
        tuple(device for device in devices if device.id not in status.devices),
        tuple(name for name in status.devices if name not in ids),
    )


def without(record: VmRecord, ids: Collection[str]) -> dict[str, Any]:
    """Return what changes in a record when devices go; a disk of the VM's own is doomed."""
    going = [disk for disk in record.disks if disk.id in ids]
    return {
        "disks": tuple(disk for disk in record.disks if disk.id not in ids),
        "nics": tuple(nic for nic in record.nics if nic.id not in ids),
        "doomed": (*record.doomed, *(disk.path for disk in going if disk.is_own)),
    }


def take_over(entry: VmEntry, status: Status) -> tuple[dict[str, Any], list[NewEvent]]:
    """Return what a worker's status changes in its VM's record, and events about its devices."""
    record = entry.record
    changes, lost = news(record, status), compare(record, status).lost
    if lost:
        changes |= without(record, {device.id for device in lost})
    events = [
        entry.event(f"{kind_of(device)}_detached", **{kind_of(device): device.id})
        for device in lost
    ]
    disks = changes.get("disks", record.disks)
    exchanged, swapped = _exchange(entry, disks, status)
    if exchanged != disks:
        changes["disks"] = exchanged
    return changes, [*events, *swapped]


def _exchange(
    entry: VmEntry, disks: tuple[DiskRecord, ...], status: Status
) -> tuple[tuple[DiskRecord, ...], list[NewEvent]]:
    """Return the disks with the files that their worker uses, and events about these.

    It may have taken one after hosteld gave up on it, or not taken one that was in the record
    before it was asked.
    """
    events: list[NewEvent] = []
    exchanged: list[DiskRecord] = []
    for disk in disks:
        fresh = disk
        if disk.other and status.swaps.get(disk.id) == disk.other["swaps"]:
            fresh = disk.with_other()
            if fresh.swaps > disk.swaps:
                events.append(entry.event("disk_swapped", disk=disk.id, path=fresh.path))
        exchanged.append(fresh)
    return tuple(exchanged), events


def kind_of(device: DiskRecord | NicRecord) -> str:
    """Return "disk" or "nic", as events name it."""
    return "disk" if isinstance(device, DiskRecord) else "nic"


def news(record: VmRecord, status: Status) -> dict[str, Any]:
    """Return what a worker's status changes in a VM's record."""
    changes: dict[str, Any] = {}
    state = _STATES.get(status.state)
    is_waiting = record.state is VmState.STOPPING and state is VmState.RUNNING
    if state is not None and state is not record.state and not is_waiting:
        changes["state"] = state
    told = reason_of(status.reason)
    known = record.reason
    if _differs(told, known) and state is not None:
        changes["reason"] = told
    return changes


def last_told(entry: VmEntry, status: Status | None) -> tuple[list[NewEvent], dict[str, Any]]:
    """Return what a worker that has ended had noted: as counted(), and the files that it used."""
    events, changes = counted(entry, status)
    if status is not None:
        exchanged, swapped = _exchange(entry, entry.record.disks, status)
        events += swapped
        if exchanged != entry.record.disks:
            changes["disks"] = exchanged
    return events, changes


def counted(entry: VmEntry, status: Status | None) -> tuple[list[NewEvent], dict[str, Any]]:
    """Return what a worker has noted that is told whatever became of it since.

    Returns:
        Events, and what changes in the record.
    """
    events: list[NewEvent] = []
    changes: dict[str, Any] = {}
    record = entry.record
    if status is None:
        return events, changes
    if status.boot_time_us not in (None, record.boot_time_us):
        changes["boot_time_us"] = status.boot_time_us
        events.append(entry.event("booted", boot_time_us=status.boot_time_us))
    if status.watchdog_expired > record.watchdog_expired:
        changes["watchdog_expired"] = status.watchdog_expired
        count = status.watchdog_expired - record.watchdog_expired
        data: dict[str, Any] = {"action": record.watchdog, "count": count}
        if (error := _watchdog_failure(status)) is not None:
            data["error"] = error
        events.append(entry.event("watchdog", **data))
    counts = {disk_id: told["count"] for disk_id, told in status.disk_errors.items()}
    for disk_id, told in status.disk_errors.items():
        if fresh := told["count"] - record.disk_errors.get(disk_id, 0):
            changes["disk_errors"] = counts
            error = told["error"]
            events.append(entry.event("disk_error", disk=disk_id, error=error, count=fresh))
    return events, changes


def _watchdog_failure(status: Status) -> str | int | None:
    """Return why what a watchdog is for could not be done."""
    why = reason_of(status.reason)
    return why.detail.get("error") if why is not None and why.code == "watchdog" else None


def _differs(told: ReasonRecord | None, known: ReasonRecord | None) -> bool:
    if told is None or known is None:
        return told is not known
    return (told.code, told.message, told.detail) != (known.code, known.message, known.detail)
