# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""vhost: a thread of the kernel serves virtqueues on behalf of this process.

It takes kicks from the ioeventfds and interrupts by the irqfds that an engine of ours would use, so
nothing that a guest sends comes by here. It has an owner, whose memory it works on.

Source: Linux include/uapi/linux/vhost.h, drivers/vhost/vhost.c, net.c and vsock.c.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ._kvm import ffi
from .engine import DataPath, EngineFault
from .errors import KvmError
from .ioctl import ioctl_int, ioctl_ptr, new_array
from .virtqueue import VirtqueueState

if TYPE_CHECKING:
    from ._kvm import CData
    from .eventfd import EventFd
    from .memory import GuestMemory
    from .types import SupportsFd
    from .virtqueue import Virtqueue

NO_FD: Final = -1


@dataclass(frozen=True, slots=True)
class Vring:
    """A virtqueue with both of its notifications; ``irq`` is None when the driver polls."""

    queue: Virtqueue
    kick: EventFd
    irq: SupportsFd | None


class VhostDevice:
    """One open vhost device; the descriptor stays the caller's.

    Every method raises KvmError, named after the ioctl, when the kernel refuses.

    Threads: any, one at a time.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def features(self) -> int:
        """Return the feature bits that the kernel's side of the rings can do."""
        features = ffi.new("uint64_t *")
        ioctl_ptr(self.fd, "VHOST_GET_FEATURES", features)
        return int(features[0])

    def own(self) -> None:
        """Become its owner: its thread works on this process's memory from now on."""
        ioctl_int(self.fd, "VHOST_SET_OWNER")

    def set_up(self, memory: GuestMemory, features: int) -> None:
        """Tell it where guest RAM is and what was negotiated.

        Args:
            memory: must stay open until release().
            features: bits of features() only.
        """
        ioctl_ptr(self.fd, "VHOST_SET_FEATURES", ffi.new("uint64_t *", features))
        count = len(memory.regions)
        table, header, entries = new_array(
            "struct vhost_memory", "struct vhost_memory_region", count
        )
        header.nregions = count
        for entry, region in zip((entries[i] for i in range(count)), memory.regions, strict=True):
            entry.guest_phys_addr = region.gpa
            entry.memory_size = region.size_bytes
            entry.userspace_addr = region.hva
        ioctl_ptr(self.fd, "VHOST_SET_MEM_TABLE", table)

    def set_vring(self, index: int, vring: Vring, error: SupportsFd) -> None:
        """Describe a ring that does not run.

        Args:
            index: of the ring in this vhost device.
            vring: the ring; its addresses were checked when it was made.
            error: signalled when the driver breaks the ring.
        """
        queue = vring.queue
        self._set_state("VHOST_SET_VRING_NUM", index, queue.size)
        self._set_state("VHOST_SET_VRING_BASE", index, queue.state.next_avail)
        address = ffi.new("struct vhost_vring_addr *")
        address.index = index
        address.desc_user_addr = _hva(queue.raw.desc)
        address.avail_user_addr = _hva(queue.raw.avail)
        address.used_user_addr = _hva(queue.raw.used)
        ioctl_ptr(self.fd, "VHOST_SET_VRING_ADDR", address)
        self.set_file("VHOST_SET_VRING_ERR", index, error.fd)
        self.set_file("VHOST_SET_VRING_CALL", index, NO_FD if vring.irq is None else vring.irq.fd)
        self.set_file("VHOST_SET_VRING_KICK", index, vring.kick.fd)

    def set_file(self, request: str, index: int, fd: int) -> None:
        """Give a ring a descriptor, or with NO_FD take one away."""
        ioctl_ptr(self.fd, request, ffi.new("struct vhost_vring_file *", [index, fd]))

    def take_back(self, index: int, vring: Vring) -> None:
        """Have the queue of a ring that does not run go on where vhost stopped."""
        state = ffi.new("struct vhost_vring_state *", [index, 0])
        ioctl_ptr(self.fd, "VHOST_GET_VRING_BASE", state)
        # vhost has nothing in flight then, so both indices are the same.
        vring.queue.restore(VirtqueueState(int(state.num), int(state.num)))

    def release(self) -> None:
        """End its thread and forget everything; the descriptor can be used again."""
        ioctl_int(self.fd, "VHOST_RESET_OWNER")

    def _set_state(self, request: str, index: int, value: int) -> None:
        ioctl_ptr(self.fd, request, ffi.new("struct vhost_vring_state *", [index, value]))


class VhostNet(DataPath):
    """One pair of virtio-net queues, served by vhost-net on a tap.

    Args:
        fd: /dev/vhost-net, without an owner; stays the caller's, as does the tap.
        memory: the guest's RAM; must stay open until close().
        tap_fd: prepared by configure_tap().
        features: negotiated bits that VhostDevice.features() has.
        vrings: the receive and the transmit queue.
        fault: signalled when the driver breaks a ring (vhost goes on with the next kick), and
            when the tap is found gone.

    Raises:
        KvmError: the kernel refused; there is no owner then.
    """

    def __init__(
        self,
        fd: int,
        memory: GuestMemory,
        tap_fd: int,
        *,
        features: int,
        vrings: Sequence[Vring],
        fault: EventFd,
    ) -> None:
        self._device = VhostDevice(fd)
        self._tap_fd = tap_fd
        self._vrings = tuple(vrings)
        self._fault = fault
        self._keepalive_memory = memory
        self._device.own()
        self._is_owned = True
        self._has_tap = True
        try:
            self._device.set_up(memory, features)
            for index, vring in enumerate(self._vrings):
                self._device.set_vring(index, vring, fault)
        except BaseException:
            self.close()
            raise

    @property
    def fault(self) -> EngineFault:
        """BACKEND when the tap was lost, else RING: vhost signals for nothing else, once asked."""
        return EngineFault.RING if self._has_tap else EngineFault.BACKEND

    def quiesce(self) -> None:
        """Take the tap away: what is in flight is finished in the ioctl, kicks wait."""
        for index, vring in enumerate(self._vrings):
            self._device.set_file("VHOST_NET_SET_BACKEND", index, NO_FD)
            self._device.take_back(index, vring)

    def resume(self) -> None:
        """Give the tap back; vhost looks at it, and for the kick at the ring."""
        try:
            for index, vring in enumerate(self._vrings):
                self._device.set_file("VHOST_NET_SET_BACKEND", index, self._tap_fd)
                vring.kick.signal()
        except KvmError:
            # Deleted meanwhile: the VM goes on without it, as with an engine of ours.
            self._has_tap = False
            self._fault.signal()

    def stop(self) -> None:
        """Serve no more; when this returns, vhost touches guest memory no more."""
        self.quiesce()

    def close(self) -> None:
        """Give the device up; a second call does nothing."""
        if self._is_owned:
            self._is_owned = False
            self._device.release()


class VhostVsock(DataPath):
    """The receive and the transmit queue of a vsock device, served by vhost-vsock.

    vhost-vsock cannot be given up as vhost-net can: the process that owns it owns it until the
    descriptor is closed. So the next one of the same process takes it over as it is.

    Args:
        fd: /dev/vhost-vsock, which knows the guest's CID; stays the caller's.
        memory: the guest's RAM; must stay open until stop().
        features: negotiated bits that VhostDevice.features() has.
        vrings: the receive and the transmit queue.
        fault: signalled when the driver breaks a ring; vhost goes on with the next kick.

    Raises:
        KvmError: the kernel refused.
    """

    def __init__(
        self,
        fd: int,
        memory: GuestMemory,
        *,
        features: int,
        vrings: Sequence[Vring],
        fault: EventFd,
    ) -> None:
        self._device = VhostDevice(fd)
        self._vrings = tuple(vrings)
        self._keepalive = (memory, fault)
        try:
            self._device.own()
        except KvmError as err:
            if err.errno != errno.EBUSY:
                raise
        self._device.set_up(memory, features)
        for index, vring in enumerate(self._vrings):
            self._device.set_vring(index, vring, fault)

    @property
    def fault(self) -> EngineFault:
        """RING: vhost signals for nothing else, once asked."""
        return EngineFault.RING

    def quiesce(self) -> None:
        """Have the kernel stop: the packet in hand is finished in the ioctl, the others wait."""
        self._set_running(0)
        for index, vring in enumerate(self._vrings):
            self._device.take_back(index, vring)

    def resume(self) -> None:
        """Let the kernel go on, with what came meanwhile from either side."""
        self._set_running(1)
        for vring in self._vrings:
            vring.kick.signal()

    def stop(self) -> None:
        """Serve no more; when this returns, vhost touches guest memory no more."""
        self._set_running(0)

    def close(self) -> None:
        """Do nothing: the descriptor is the caller's, and closing it is what ends vhost."""

    def _set_running(self, is_running: int) -> None:
        ioctl_ptr(self._device.fd, "VHOST_VSOCK_SET_RUNNING", ffi.new("int *", is_running))


def _hva(pointer: CData) -> int:
    return int(ffi.cast("uintptr_t", pointer))
