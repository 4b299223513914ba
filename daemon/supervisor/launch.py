# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Open all that a worker may touch, and say in a MachineSpec which descriptor is what."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from api.errors import ApiError, HostFailure, Internal

from ..protocol import (
    DiskSpec,
    MachineSpec,
    NicSpec,
    NicWishes,
    PmemSpec,
    PortSpec,
    ShareSpec,
    VsockSpec,
)
from .backends import Backends, connect_switch
from .disks import open_locked
from .pmem import open_pmem
from .ports import open_ports
from .records import (
    DiskRecord,
    KernelRecord,
    NicRecord,
    PmemRecord,
    PortRecord,
    ShareRecord,
    VmRecord,
    VsockRecord,
)
from .taps import open_taps, open_vhost
from .vsock import SOCKET_NAME, open_vsock

MIB: Final = 1 << 20


@dataclass
class FdBag:
    """Descriptors that are closed together; the worker gets duplicates.

    Attributes:
        first: the index of the first one; above 0 for a worker that has some already.
    """

    fds: list[int] = field(default_factory=list)
    first: int = 0

    def add(self, fd: int) -> int:
        """Take a descriptor over and return its index."""
        self.fds.append(fd)
        return self.first + len(self.fds) - 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        while self.fds:
            os.close(self.fds.pop())


@dataclass(frozen=True, slots=True)
class Boot:
    """What a VM boots: the kernel's record and file, and the initrd's file."""

    kernel: KernelRecord
    kernel_path: Path
    initrd_path: Path | None


async def prepare(
    record: VmRecord,
    boot: Boot,
    *,
    kvm_device: str,
    requested_ns: int,
    bag: FdBag,
    backends: Backends,
) -> MachineSpec:
    """Open everything for a VM into ``bag``: KVM, kernel, initrd, disks with locks, taps, vsock.

    Back ends that its devices need are started; on failure the caller ends them.

    Args:
        record: the VM.
        boot: its kernel and initrd.
        kvm_device: path of /dev/kvm.
        requested_ns: CLOCK_MONOTONIC of the request to start.
        bag: owns what was opened, on failure too.
        backends: starts what serves formats and shares.

    Raises:
        ApiError: something is missing, not permitted, or in use; says what to do.
    """
    kvm_fd = bag.add(open_kvm(kvm_device))
    kernel_fd = bag.add(_open_kept(boot.kernel_path))
    initrd_fd = None if boot.initrd_path is None else bag.add(_open_kept(boot.initrd_path))
    disks = [
        await _serve_disk(record.id, disk, index, bag, backends)
        for index, disk in enumerate(record.disks)
    ]
    nics = [await open_nic(nic, index, record.vcpus, bag) for index, nic in enumerate(record.nics)]
    shares = [
        await _open_share(record.id, share, f"shares.{index}", bag, backends)
        for index, share in enumerate(record.shares)
    ]
    return MachineSpec(
        vm_id=record.id,
        vcpus=record.vcpus,
        memory_bytes=record.memory_mib * MIB,
        cmdline=record.cmdline,
        entry=boot.kernel.model.entry,
        setup_header=boot.kernel.setup_header,
        kvm_fd=kvm_fd,
        kernel_fd=kernel_fd,
        initrd_fd=initrd_fd,
        disks=tuple(disks),
        nics=tuple(nics),
        rng=record.rng,
        on_reboot=record.on_reboot,
        on_panic=record.on_panic,
        requested_ns=requested_ns,
        vsock=await _open_vsock(record.vsock, bag),
        shares=tuple(shares),
        watchdog=record.watchdog,
        ports=await _open_ports(record.ports, bag),
        rate_groups=record.rate_groups,
        pmem=tuple([await _open_pmem(pmem, n, bag) for n, pmem in enumerate(record.pmem)]),
    )


def nic_wishes(nic: NicRecord) -> NicWishes:
    """Return what may change of an interface while it runs."""
    return NicWishes(nic.link == "up", nic.rx_limit, nic.tx_limit)


async def open_disk(disk: DiskRecord, index: int, bag: FdBag) -> DiskSpec:
    """Open what is behind a raw disk, locked; raises as prepare()."""
    (fd,) = await _in_thread(bag, partial(_open_disk, disk, index))
    return DiskSpec(
        disk.id,
        fd,
        disk.read_only,
        disk.io_engine,
        disk.rate_limit,
        disk.slot,
        swaps=disk.swaps,
        rate_group=disk.rate_group,
    )


def _open_disk(disk: DiskRecord, index: int) -> list[int]:
    return [open_locked(disk, f"disks.{index}.path")]


async def _serve_disk(
    vm_id: str, disk: DiskRecord, index: int, bag: FdBag, backends: Backends
) -> DiskSpec:
    disk_fd = None
    if disk.format != "nbd":
        spec = await open_disk(disk, index, bag)
        if disk.format == "raw":
            return spec
        # The worker gets this descriptor too, for the lock on it.
        disk_fd = bag.fds[spec.fd - bag.first]
    served = await backends.serve_disk(vm_id, disk, f"disks.{index}.path", disk_fd)
    fd = bag.add(served.sock.detach())
    return DiskSpec(disk.id, fd, disk.read_only, slot=disk.slot, vhost_user=True)


async def open_nic(nic: NicRecord, index: int, vcpus: int, bag: FdBag) -> NicSpec:
    """Open what is behind a network interface of a VM of ``vcpus``; raises as prepare()."""
    wishes = nic_wishes(nic)
    if nic.socket is not None:
        sock = await connect_switch(nic.socket, nic.id, f"nics.{index}.socket")
        fds = (bag.add(sock.detach()),)
        return NicSpec(nic.id, fds, (), nic.mac, nic.mtu, wishes, nic.slot, vhost_user=True)
    tap_fds = await _in_thread(bag, partial(open_taps, nic, index, nic.n_pairs(vcpus)))
    vhost_fds = await _in_thread(bag, partial(open_vhost, nic, index, len(tap_fds)))
    return NicSpec(nic.id, tap_fds, vhost_fds, nic.mac, nic.mtu, wishes, nic.slot)


async def _open_share(
    vm_id: str, share: ShareRecord, field: str, bag: FdBag, backends: Backends
) -> ShareSpec:
    served = await backends.serve_share(vm_id, share, field)
    fd = bag.add(served.sock.detach())
    return ShareSpec(share.device_id, share.tag, fd, served.is_libvhost)


async def _open_vsock(vsock: VsockRecord | None, bag: FdBag) -> VsockSpec | None:
    if vsock is None:
        return None
    fds = await _in_thread(bag, partial(open_vsock, vsock))
    return VsockSpec(vsock.cid, fds, None if vsock.path is None else SOCKET_NAME)


async def _open_pmem(pmem: PmemRecord, index: int, bag: FdBag) -> PmemSpec:
    (fd,) = await _in_thread(bag, lambda: [open_pmem(pmem, index)])
    # It may have another size by now.
    size_bytes = os.lseek(bag.fds[fd - bag.first], 0, os.SEEK_END)
    return PmemSpec(pmem.id, fd, size_bytes, pmem.read_only)


async def _open_ports(ports: Sequence[PortRecord], bag: FdBag) -> tuple[PortSpec, ...]:
    fds = await _in_thread(bag, partial(open_ports, ports)) if ports else ()
    return tuple(PortSpec(port.name, port.console, fd) for port, fd in zip(ports, fds, strict=True))


async def _in_thread(bag: FdBag, opener: Callable[[], list[int]]) -> tuple[int, ...]:
    """Run what may block in a thread; its descriptors are kept even if the caller is cancelled."""
    future = asyncio.get_running_loop().run_in_executor(None, opener)
    try:
        return tuple(bag.add(fd) for fd in await asyncio.shield(future))
    except asyncio.CancelledError:
        future.add_done_callback(_close_late)
        raise


def _close_late(future: asyncio.Future[list[int]]) -> None:
    if future.exception() is None:
        for fd in future.result():
            os.close(fd)


def open_kvm(path: str) -> int:
    """Open the KVM device.

    Raises:
        HostFailure: absent, or not permitted; says what to do.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as err:
        raise kvm_error(path, err) from err


def kvm_error(path: str, err: OSError) -> ApiError:
    """Return why a KVM device cannot be opened, with the remedy."""
    if err.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return HostFailure(
            "kvm_missing",
            f"{path}: {err.strerror}: this host has no KVM; turn VT-x or AMD-V on in the firmware"
            " (nested virtualization in a VM) and load it with: modprobe kvm_intel, or kvm_amd",
        )
    if err.errno in (errno.EACCES, errno.EPERM):
        return HostFailure(
            "kvm_permission",
            f"{path}: {err.strerror} for uid {os.geteuid()}; let that user in with:"
            " usermod -a -G kvm USER, then log in again",
        )
    return HostFailure("kvm_unavailable", f"{path}: {err.strerror}")


def _open_kept(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        raise Internal(
            "file_lost", f"{path}: {err.strerror}: it was imported and is gone; import it again"
        ) from err
