# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Virtio devices whose queues a vhost-user back end serves: disk, shared directory, network.

A back end that dies takes no request along, as far as the protocol can help: what was in flight
is noted in memory that both ends share (INFLIGHT_SHMFD), and its successor serves it again. Where
a back end keeps no such notes and requests were in flight, the device needs a reset, since serving
the wrong ones twice would be worse.

Source: QEMU docs/interop/vhost-user.rst, "Starting and stopping rings", "Inflight I/O tracking".
"""

from __future__ import annotations

import logging
import os
import struct
import time
from typing import TYPE_CHECKING, ClassVar, Final

from devices.errors import BackendError
from devices.virtio.device import TRANSPORT_FEATURES, VirtioDevice
from devices.virtio.ids import (
    VIRTIO_BLK_F_CONFIG_WCE,
    VIRTIO_BLK_F_MQ,
    VIRTIO_ID_BLOCK,
    VIRTIO_ID_FS,
    VIRTIO_ID_NET,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_OFFLOADS,
    VIRTIO_NET_S_LINK_UP,
)
from kvm_ffi.eventfd import EventFd
from kvm_ffi.types import Gpa

from . import wire

if TYPE_CHECKING:
    from devices.virtio.queue import Activation, EnabledQueue
    from kvm_ffi.memory import GuestMemory

    from .link import Link
    from .wire import Conversation

log = logging.getLogger(__name__)

# The same as an engine gets: kvm_ffi/engine.py.
QUIESCE_TIMEOUT_S: Final = 10.0
# A driver that resets its device with requests in flight is not kept waiting for longer.
RESET_TIMEOUT_S: Final = 2.0
_POLL_S: Final = 0.001
INFLIGHT_ENTRY_BYTES: Final = 16
INFLIGHT_HEADER_ENTRIES: Final = 8  # header, and rounding up to a cache line
# Four queues of 32768 take less.
MAX_INFLIGHT_BYTES: Final = 4 << 20
_DEVICE_BITS: Final = (1 << 24) - 1  # VIRTIO 1.2, 2.2: bits 0 to 23 are the device type's

QUEUE_SIZE: Final = 256


class VhostUserDevice(VirtioDevice):
    """A device on a link.

    Args:
        name: e.g. the disk's id.
        link: to its back end; the caller owns it, since it outlives the device.

    Threads: as VirtioDevice. The device's lock comes before the link's.
    """

    # Device bits that come from the back end, if it has them; those the front end adds itself.
    BACKEND_FEATURES: ClassVar[int] = _DEVICE_BITS
    # Whether requests end in the order in which they were made available, so that the used index
    # alone tells what was in flight.
    IS_IN_ORDER: ClassVar[bool] = False

    def __init__(self, name: str, link: Link) -> None:
        super().__init__(name)
        self._link = link
        self._offered = link.features & (self.BACKEND_FEATURES | TRANSPORT_FEATURES)
        self._bases: dict[int, int] = {}
        self._is_quiesced = False
        self._is_serving = False  # a back end has been given the rings of this activation
        self._generation = 0  # of the link's connection that got them last
        self._inflight: tuple[int, int, int] | None = None
        self._fault: str | None = None
        self._reconnects = 0
        link.on_config = self._on_config

    @property
    def features(self) -> int:
        """What the back end offers and this kind of device has, and what the front end adds."""
        return self._offered | self.FEATURES

    def config_space(self) -> bytes:
        """Return the back end's config space."""
        return self._link.config

    def _on_config(self) -> None:
        self.config_changed()

    # --- life

    def activate(self, activation: Activation) -> None:
        """Give the rings to the back end; to one that is away, once it is back.

        Raises:
            BadQueueConfig: a queue is missing.
        """
        for index in range(len(self.QUEUE_SIZES)):
            activation.require(index)
        with self._lock:
            self._activation = activation
            self._bases = dict.fromkeys(activation.queues, 0)
            self._fault = None
            self._is_serving = False
            if not self._is_quiesced and self._link.lost is None:
                self._start_or_drop(activation)

    def reset(self) -> None:
        """Take the rings back; a back end that does not give them up is hung up on."""
        with self._lock:
            activation, self._activation = self._activation, None
            if activation is not None and self._is_serving and not self._is_quiesced:
                try:
                    self._stop(activation, RESET_TIMEOUT_S)
                except (BackendError, TimeoutError) as err:
                    self._link.drop(str(err))
            self._is_serving = False
            self._drop_inflight()
            self._fault = None

    def quiesce(self) -> None:
        """Have the back end finish what is in flight and let go of the rings.

        Raises:
            TimeoutError: it did not, or it is away with requests in flight; it goes on.
        """
        with self._lock:
            activation = self._activation
            if activation is not None and self._is_serving and not self._is_quiesced:
                try:
                    if self._link.lost is None or self._may_be_in_flight(activation):
                        self._bases = self._stop(activation, QUIESCE_TIMEOUT_S)
                    else:
                        self._bases = _used_indices(activation)
                except BackendError as err:
                    self._link.drop(str(err))
                    raise TimeoutError(f"{self.name}: {err}") from err
            self._is_quiesced = True

    def resume(self) -> None:
        """Give the rings back."""
        with self._lock:
            was_quiesced, self._is_quiesced = self._is_quiesced, False
            if was_quiesced and self._activation is not None and self._link.lost is None:
                self._start_or_drop(self._activation)

    def reattach(self) -> None:
        """Go on with the back end that the link has just been attached to.

        Raises:
            BackendError: it does not take the rings; the link is lost again.
        """
        with self._lock:
            self._reconnects += 1
            activation = self._activation
            if activation is None or self._is_quiesced or self._fault is not None:
                return
            if self._is_serving:
                if self._generation == self._link.generation:
                    return  # the driver started its device a moment ago
                self._bases = _used_indices(activation)
                if self._inflight is None and self._may_be_in_flight(activation):
                    self._fault = "its back end died, and what was in flight is not known"
                    activation.fault.signal()
                    return
            try:
                self._start(activation)
            except BackendError as err:
                self._link.drop(str(err))
                raise
            # The one before may have completed requests and died before it said so.
            for queue in activation.queues.values():
                if queue.irq is not None:
                    queue.irq.signal()

    @property
    def negotiated(self) -> int:
        """Feature bits that a new back end must have as well."""
        with self._lock:
            return self._offered

    def fault_reason(self) -> str | None:
        """Tell what the back end reported of a ring, or what was lost with it."""
        return self._fault or "its back end found a virtqueue broken"

    def stats(self) -> dict[str, int]:
        """Return how often the back end came back; it counts the requests, and tells nobody."""
        return {"reconnects": self._reconnects}

    # --- rings

    def _start_or_drop(self, activation: Activation) -> None:
        try:
            self._start(activation)
        except BackendError as err:
            self._link.drop(str(err))

    def _start(self, activation: Activation) -> None:
        with self._link.lock:
            talk = self._link.talk()
            features = activation.features & self._link.features
            features |= self._link.features & wire.VHOST_USER_F_PROTOCOL_FEATURES
            talk.tell(wire.SET_FEATURES, wire.U64.pack(features))
            _send_memory(talk, activation.memory)
            if self._link.has_inflight:
                self._share_inflight(talk, activation)
            self._generation = self._link.generation
            for index, queue in activation.queues.items():
                self._start_ring(talk, index, queue, activation)
            if self._link.features & wire.VHOST_USER_F_PROTOCOL_FEATURES:
                for index in activation.queues:
                    talk.tell(wire.SET_VRING_ENABLE, wire.VRING_STATE.pack(index, 1))
        self._is_serving = True
        # Kicks that came while nobody listened are still counted in the eventfd, but for those
        # that the one before had taken.
        for queue in activation.queues.values():
            queue.kick.signal()

    def _start_ring(
        self, talk: Conversation, index: int, enabled: EnabledQueue, activation: Activation
    ) -> None:
        queue = enabled.queue
        talk.tell(wire.SET_VRING_NUM, wire.VRING_STATE.pack(index, queue.size))
        talk.tell(wire.SET_VRING_BASE, wire.VRING_STATE.pack(index, self._bases[index]))
        addresses = (queue.desc_gpa, queue.used_gpa, queue.avail_gpa)
        talk.tell(wire.SET_VRING_ADDR, wire.VRING_ADDR.pack(index, 0, *addresses, 0))
        talk.tell(wire.SET_VRING_ERR, wire.U64.pack(index), [activation.fault.fd])
        # To a driver that polls, one that nobody hears: libvhost-user ends over having none, unless
        # the driver suppresses interrupts too, and a guest is not to end its back end.
        with EventFd() as unheard:
            call = enabled.irq or unheard
            talk.tell(wire.SET_VRING_CALL, wire.U64.pack(index), [call.fd])
        talk.tell(wire.SET_VRING_KICK, wire.U64.pack(index), [enabled.kick.fd])

    def _stop(self, activation: Activation, timeout_s: float) -> dict[int, int]:
        """Stop the rings with nothing in flight and return where they stand.

        Raises:
            BackendError: the back end is lost, told a nonsensical place, or keeps requests of a
                ring that it has stopped.
            TimeoutError: requests are still in flight, and the rings run on.
        """
        deadline = time.monotonic() + timeout_s
        if not self.IS_IN_ORDER:
            # Before, since libvhost-user answers at once and has nowhere to complete them to then.
            while self._has_work(activation):
                self._wait(deadline)
        bases = {}
        for index, enabled in activation.queues.items():
            with self._link.lock:
                answer = self._link.talk().ask(
                    wire.GET_VRING_BASE,
                    wire.VRING_STATE.pack(index, 0),
                    sizes=(wire.VRING_STATE.size, wire.VRING_STATE.size),
                )
            told, base = wire.VRING_STATE.unpack(answer)
            if told != index or base > 0xFFFF:
                raise BackendError(self.name, f"says that ring {told} of {index} is at {base}")
            try:
                while _used(enabled) != base:
                    self._wait(deadline)
            except TimeoutError as err:
                raise BackendError(self.name, f"keeps requests of ring {index}, at {base}") from err
            bases[index] = base
        return bases

    def _wait(self, deadline: float) -> None:
        if self._link.lost is not None:
            raise TimeoutError(f"{self.name}: its back end is lost, with requests in flight")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{self.name}: its back end still has requests in flight")
        time.sleep(_POLL_S)

    def _may_be_in_flight(self, activation: Activation) -> bool:
        """Whether a lost back end leaves requests of which nobody knows if they were done."""
        return not self.IS_IN_ORDER and self._has_work(activation)

    @staticmethod
    def _has_work(activation: Activation) -> bool:
        return any(_avail(queue) != _used(queue) for queue in activation.queues.values())

    # --- what is in flight

    def _share_inflight(self, talk: Conversation, activation: Activation) -> None:
        n_queues = len(activation.queues)
        if self._inflight is None and self._link.is_libvhost:
            self._inflight = _make_inflight(n_queues)
        elif self._inflight is None:
            self._inflight = self._ask_for_inflight(talk, n_queues)
        length, offset, fd = self._inflight
        described = wire.INFLIGHT.pack(length, offset, n_queues, QUEUE_SIZE)
        talk.tell(wire.SET_INFLIGHT_FD, described + wire.INFLIGHT_PADDING, [fd])

    def _ask_for_inflight(self, talk: Conversation, n_queues: int) -> tuple[int, int, int]:
        """Return (bytes, offset, descriptor) of memory that the back end makes."""
        asked = wire.INFLIGHT.pack(0, 0, n_queues, QUEUE_SIZE) + wire.INFLIGHT_PADDING
        size = wire.INFLIGHT.size
        answer, fd = talk.ask_for_fd(wire.GET_INFLIGHT_FD, asked, sizes=(size, len(asked)))
        length, offset, _, _ = wire.INFLIGHT.unpack_from(answer)
        if not 0 < length <= MAX_INFLIGHT_BYTES or offset + length > os.fstat(fd).st_size:
            os.close(fd)
            raise BackendError(self.name, f"in-flight memory of {length} bytes at {offset}")
        return length, offset, fd

    def _drop_inflight(self) -> None:
        if self._inflight is not None:
            os.close(self._inflight[2])
            self._inflight = None


def _make_inflight(n_queues: int) -> tuple[int, int, int]:
    """Return (bytes, offset, descriptor) of zeroed memory, enough for libvhost-user's notes.

    It takes a header of 16 bytes and 16 for each entry; a fresh back end begins with zeros.
    """
    length = n_queues * (QUEUE_SIZE + INFLIGHT_HEADER_ENTRIES) * INFLIGHT_ENTRY_BYTES
    fd = os.memfd_create("hostel-inflight", os.MFD_CLOEXEC)
    os.ftruncate(fd, length)
    return length, 0, fd


def _send_memory(talk: Conversation, memory: GuestMemory) -> None:
    """Send the memory table, with guest addresses where the front end's own would stand.

    They serve as keys only, and a back end need not learn where a worker has its memory.
    """
    regions = memory.regions
    if len(regions) > wire.MAX_MEM_REGIONS:
        raise BackendError(
            "guest memory", f"{len(regions)} regions, at most {wire.MAX_MEM_REGIONS}"
        )
    table = b"".join(
        wire.MEM_REGION.pack(region.gpa, region.size_bytes, region.gpa, region.file_offset)
        for region in regions
    )
    payload = wire.MEM_TABLE.pack(len(regions)) + table
    talk.tell(wire.SET_MEM_TABLE, payload, [region.fd for region in regions])


def _used_indices(activation: Activation) -> dict[int, int]:
    return {index: _used(queue) for index, queue in activation.queues.items()}


def _avail(enabled: EnabledQueue) -> int:
    queue = enabled.queue
    return int.from_bytes(queue.memory.read(Gpa(queue.avail_gpa + 2), 2), "little")


def _used(enabled: EnabledQueue) -> int:
    queue = enabled.queue
    return int.from_bytes(queue.memory.read(Gpa(queue.used_gpa + 2), 2), "little")


class VhostUserBlk(VhostUserDevice):
    """A disk in a format that a back end knows; VIRTIO 1.2, 5.2.

    The back end is to write through: one that is killed would take completed writes along that
    are in its memory only, such as the tables of a qcow2 file, and the flush that its successor
    gets could not bring them back. So the driver may not switch that off.
    """

    DEVICE_ID: ClassVar[int] = VIRTIO_ID_BLOCK
    PCI_CLASS: ClassVar[int] = 0x018000
    QUEUE_SIZES: tuple[int, ...] = (QUEUE_SIZE,)
    # There is one queue, and see above.
    BACKEND_FEATURES: ClassVar[int] = _DEVICE_BITS & ~(VIRTIO_BLK_F_MQ | VIRTIO_BLK_F_CONFIG_WCE)
    CONFIG_BYTES: ClassVar[int] = 60  # up to write_zeroes_may_unmap and its padding


class VhostUserFs(VhostUserDevice):
    """A shared directory; VIRTIO 1.2, 5.11. The config space is the front end's own.

    Args:
        name: of the device.
        link: to virtiofsd.
        tag: what the guest mounts, up to 36 bytes.

    Raises:
        ValueError: the tag is empty or too long.
    """

    DEVICE_ID: ClassVar[int] = VIRTIO_ID_FS
    PCI_CLASS: ClassVar[int] = 0x018000
    QUEUE_SIZES: tuple[int, ...] = (QUEUE_SIZE, QUEUE_SIZE)  # urgent ones, the rest
    BACKEND_FEATURES: ClassVar[int] = 0  # no notifications
    CONFIG_BYTES: ClassVar[int] = 0
    TAG_BYTES: ClassVar[int] = 36

    def __init__(self, name: str, link: Link, *, tag: str) -> None:
        raw = tag.encode()
        if not 0 < len(raw) <= self.TAG_BYTES:
            raise ValueError(f"tag={tag!r}: must be 1..{self.TAG_BYTES} bytes")
        super().__init__(name, link)
        self._config = struct.pack("<36sI", raw, 1)

    def config_space(self) -> bytes:
        """Return the tag and the number of request queues."""
        return self._config


class VhostUserNet(VhostUserDevice):
    """A network interface on a switch; VIRTIO 1.2, 5.1. The config space is the front end's own.

    Args:
        name: of the device.
        link: to the switch.
        mac: six bytes.
        mtu: told to the driver; None leaves its default.
    """

    DEVICE_ID: ClassVar[int] = VIRTIO_ID_NET
    PCI_CLASS: ClassVar[int] = 0x020000
    QUEUE_SIZES: tuple[int, ...] = (QUEUE_SIZE, QUEUE_SIZE)
    # No control queue, so nothing that needs one.
    BACKEND_FEATURES: ClassVar[int] = VIRTIO_NET_OFFLOADS
    FEATURES: ClassVar[int] = VIRTIO_NET_F_MAC | VIRTIO_NET_F_STATUS
    IS_IN_ORDER: ClassVar[bool] = True
    CONFIG_BYTES: ClassVar[int] = 0

    def __init__(self, name: str, link: Link, *, mac: bytes, mtu: int | None) -> None:
        super().__init__(name, link)
        self._mtu = mtu
        self._config = struct.pack("<6sHHH", mac, VIRTIO_NET_S_LINK_UP, 1, mtu or 0)

    @property
    def features(self) -> int:
        """What the switch and the front end offer."""
        return super().features | (0 if self._mtu is None else VIRTIO_NET_F_MTU)

    def config_space(self) -> bytes:
        """Return struct virtio_net_config."""
        return self._config
