# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a machine tells of its devices: counters as the API has them, and its part of a Status."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from devices.virtio.blk import VirtioBlk
from devices.virtio.console import VirtioConsole
from devices.virtio.device import VirtioDevice
from devices.virtio.net import VirtioNet
from devices.virtio.pmem import VirtioPmem
from devices.virtio.vhost_user.device import VhostUserBlk, VhostUserNet
from devices.virtio.vsock import VirtioVsock

from ..protocol import MachineSpec
from .device_makers import MachineFds

_KINDS: Final[dict[type[VirtioDevice], str]] = {
    VirtioBlk: "disks",
    VhostUserBlk: "disks",
    VirtioNet: "nics",
    VhostUserNet: "nics",
    VirtioPmem: "pmem",
}


def device_stats(devices: Iterable[VirtioDevice]) -> dict[str, Any]:
    """Return counters as the fields of api/models/vms.py's VmStats; any thread."""
    groups = ("disks", "nics", "pmem", "disk_details", "nic_details")
    stats: dict[str, Any] = {name: {} for name in groups}
    for device in devices:
        if kind := _KINDS.get(type(device)):
            stats[kind][device.name] = device.stats()
        if isinstance(device, VirtioBlk):
            stats["disk_details"][device.name] = device.details()
        elif isinstance(device, VirtioNet):
            stats["nic_details"][device.name] = device.details()
        elif isinstance(device, VirtioVsock):
            stats["vsock"] = device.stats()
        elif isinstance(device, VirtioConsole):
            stats["ports"] = device.port_stats()
    return stats


def device_status(spec: MachineSpec, fds: MachineFds) -> dict[str, Any]:
    """Return what a Status has of the devices and their descriptors."""
    return {
        "devices": (*(disk.id for disk in spec.disks), *(nic.id for nic in spec.nics)),
        "next_fd": len(fds),
        "backends_lost": fds.backends.lost(),
        "swaps": {disk.id: disk.swaps for disk in spec.disks if not disk.vhost_user},
    }
