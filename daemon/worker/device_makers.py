# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""From a spec and the descriptors that came with it to virtio devices."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

from devices.virtio.blk import VirtioBlk
from devices.virtio.console import VirtioConsole
from devices.virtio.console_port import PortConfig
from devices.virtio.device import VirtioDevice
from devices.virtio.net import VirtioNet
from devices.virtio.pmem import VirtioPmem
from devices.virtio.rng import VirtioRng
from devices.virtio.vhost_user.device import VhostUserBlk, VhostUserFs, VhostUserNet
from devices.virtio.vsock import UnixVirtioVsock, VhostVirtioVsock, VirtioVsock
from kvm_ffi.blk_engine import IoEngine
from kvm_ffi.net_tap import Tap
from kvm_ffi.rate_limiter import RateGroup, RateLimit

from ..errors import ProtocolError
from ..protocol import (
    DISK_SLOTS,
    NIC_SLOTS,
    OTHER_SLOTS,
    DiskSpec,
    MachineSpec,
    NicSpec,
    PmemSpec,
    PortSpec,
    ShareSpec,
    VsockSpec,
)
from . import layout
from .backends import Backends

_RELEASED: Final = -1
# struct flock on x86-64: l_type, l_whence, l_start, l_len, l_pid; all of the file.
_UNLOCK: Final = struct.pack("hhqqi4x", fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0)


def unlock(fd: int) -> None:
    """Give up the lock of an open file description: fcntl(2)."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _UNLOCK)


class MachineFds:
    """The descriptors that a launch brought; they outlive a reset of the machine.

    Attributes:
        backends: the vhost-user back ends that some of them are connected to.
    """

    def __init__(self, fds: tuple[int, ...]) -> None:
        self._fds = list(fds)
        self.backends = Backends()

    def __len__(self) -> int:
        return len(self._fds)

    def __getitem__(self, index: int) -> int:
        """Return a descriptor by the index that a spec names.

        Raises:
            ProtocolError: the spec names one that the message did not bring.
        """
        if not 0 <= index < len(self._fds) or self._fds[index] == _RELEASED:
            raise ProtocolError(f"the spec names descriptor {index} of {len(self._fds)}")
        return self._fds[index]

    def extend(self, fds: tuple[int, ...]) -> None:
        """Take over the descriptors of a device that is attached."""
        self._fds.extend(fds)

    def replace(self, index: int, fd: int) -> None:
        """Put another file, of which the caller keeps ``fd``, in the place of a disk's.

        The old one's lock ends here: the kernel may hold on to the file itself for a moment.
        """
        unlock(self[index])
        # Under the same number, by which the devices know it.
        os.dup2(fd, self[index], inheritable=False)

    def release(self, fds: tuple[int, ...]) -> None:
        """Close those of a device that is detached; indexes stay what they are."""
        for fd in fds:
            self._fds[self._fds.index(fd)] = _RELEASED
            os.close(fd)

    def close(self) -> None:
        """Close them all."""
        self.backends.close()
        self.release(tuple(fd for fd in self._fds if fd != _RELEASED))
        self._fds.clear()


DeviceMaker = Callable[[list[int]], VirtioDevice]


def make_rate_groups(spec: MachineSpec) -> dict[str, RateGroup]:
    """Return the rate groups of a machine by id."""
    return {name: RateGroup(RateLimit(**limits)) for name, limits in spec.rate_groups.items()}


def virtio_devices(
    spec: MachineSpec, fds: MachineFds, groups: Mapping[str, RateGroup]
) -> Iterator[tuple[DeviceMaker, tuple[int, ...], Sequence[int]]]:
    """Yield how to make each device, the descriptors behind it, and where it may go."""
    for disk in spec.disks:
        where = _slots(disk.slot, DISK_SLOTS)
        if disk.vhost_user:
            yield partial(_make_vhost_user_blk, disk, fds), (), where
        else:
            yield (
                partial(_make_disk, disk, spec.vcpus, _group(disk, groups)),
                (fds[disk.fd],),
                where,
            )
    for nic in spec.nics:
        where = _slots(nic.slot, NIC_SLOTS)
        if nic.vhost_user:
            yield partial(_make_vhost_user_net, nic, fds), (), where
        else:
            nic_fds = tuple(fds[index] for index in (*nic.tap_fds, *nic.vhost_fds))
            yield partial(_make_nic, nic), nic_fds, where
    for share in spec.shares:
        yield partial(_make_vhost_user_fs, share, fds), (), OTHER_SLOTS
    gpas = layout.pmem_gpas(spec.memory_bytes, [pmem.size_bytes for pmem in spec.pmem])
    for pmem, gpa in zip(spec.pmem, gpas, strict=True):
        yield partial(_make_pmem, pmem, gpa), (fds[pmem.fd],), OTHER_SLOTS
    if spec.vsock is not None:
        vsock = spec.vsock
        yield partial(_make_vsock, vsock), tuple(fds[i] for i in vsock.fds), OTHER_SLOTS
    if spec.ports:
        port_fds = tuple(fds[port.fd] for port in spec.ports)
        yield partial(_make_console, spec.ports), port_fds, OTHER_SLOTS
    if spec.rng:
        yield lambda _: VirtioRng(), (), OTHER_SLOTS


def _slots(wanted: int | None, free: range) -> Sequence[int]:
    return free if wanted is None else (wanted,)


def _group(disk: DiskSpec, groups: Mapping[str, RateGroup]) -> RateGroup | None:
    if disk.rate_group is None:
        return None
    if disk.rate_group not in groups:
        raise ProtocolError(f"disk {disk.id} is of a rate group {disk.rate_group!r}, of none")
    return groups[disk.rate_group]


def _make_disk(disk: DiskSpec, vcpus: int, group: RateGroup | None, fds: list[int]) -> VirtioBlk:
    # The serial is the id, so that a guest finds its disk as /dev/disk/by-id/virtio-ID.
    return VirtioBlk(
        disk.id,
        fds[0],
        path=disk.id,
        is_read_only=disk.read_only,
        serial=disk.id,
        n_queues=vcpus,
        io_engine=IoEngine(disk.io_engine),
        limit=RateLimit(**disk.rate_limit),
        group=group,
    )


def _make_nic(nic: NicSpec, fds: list[int]) -> VirtioNet:
    n_pairs = len(nic.tap_fds)
    mac = bytes.fromhex(nic.mac.replace(":", ""))
    return VirtioNet(
        nic.id,
        Tap(fds[:n_pairs]),
        path=nic.id,
        mac=mac,
        mtu=nic.mtu,
        is_link_up=nic.wishes.is_link_up,
        rx_limit=RateLimit(**nic.wishes.rx_limit),
        tx_limit=RateLimit(**nic.wishes.tx_limit),
        vhost_fds=fds[n_pairs:],
    )


def _make_vsock(vsock: VsockSpec, fds: list[int]) -> VirtioVsock:
    if vsock.socket_name is None:
        return VhostVirtioVsock("vsock0", vsock.cid, *fds)
    return UnixVirtioVsock("vsock0", vsock.cid, *fds, socket_name=vsock.socket_name)


def _make_pmem(pmem: PmemSpec, gpa: int, fds: list[int]) -> VirtioPmem:
    return VirtioPmem(
        pmem.id, fds[0], gpa=gpa, size_bytes=pmem.size_bytes, is_read_only=pmem.read_only
    )


def _make_console(ports: tuple[PortSpec, ...], fds: list[int]) -> VirtioConsole:
    return VirtioConsole([PortConfig(port.name, port.is_console) for port in ports], fds)


def _make_vhost_user_blk(disk: DiskSpec, fds: MachineFds, _: list[int]) -> VirtioDevice:
    # qemu-storage-daemon is built on it.
    link = fds.backends.link(disk.id, fds[disk.fd], VhostUserBlk.CONFIG_BYTES, is_libvhost=True)
    return VhostUserBlk(disk.id, link)


def _make_vhost_user_net(nic: NicSpec, fds: MachineFds, _: list[int]) -> VirtioDevice:
    link = fds.backends.link(
        nic.id, fds[nic.tap_fds[0]], VhostUserNet.CONFIG_BYTES, is_libvhost=False
    )
    return VhostUserNet(nic.id, link, mac=bytes.fromhex(nic.mac.replace(":", "")), mtu=nic.mtu)


def _make_vhost_user_fs(share: ShareSpec, fds: MachineFds, _: list[int]) -> VirtioDevice:
    link = fds.backends.link(
        share.id, fds[share.fd], VhostUserFs.CONFIG_BYTES, is_libvhost=share.is_libvhost
    )
    return VhostUserFs(share.id, link, tag=share.tag)


def make_with_copies(make: DeviceMaker, fds: tuple[int, ...]) -> VirtioDevice:
    """Make a device with descriptors of its own: it will close them, and a reset needs them."""
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))
        return make(copies)
    except BaseException:
        for copy in copies:
            os.close(copy)
        raise
