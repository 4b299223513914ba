# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""virtio-vsock: streams carried in C to Unix sockets (vsock_engine), or by vhost to AF_VSOCK.

The event queue has nothing to tell yet; its buffers stay with the device.

Source: VIRTIO 1.2, 5.10 "Socket Device".
"""

from __future__ import annotations

import abc
import os
import struct
from typing import TYPE_CHECKING, ClassVar, Final

from devices.errors import BackendError
from kvm_ffi.errors import HostError
from kvm_ffi.vhost import VhostDevice, VhostVsock, Vring
from kvm_ffi.vsock_engine import VsockEngine

from .device import TRANSPORT_FEATURES, EngineDevice
from .ids import VIRTIO_F_VERSION_1, VIRTIO_ID_VSOCK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvm_ffi.engine import DataPath

    from .queue import Activation

RX_QUEUE: Final = 0
TX_QUEUE: Final = 1
QUEUE_SIZE: Final = 256
EVENT_QUEUE_SIZE: Final = 16
# 5.10.4: 0, 1, 2 and 0xffffffff have a meaning of their own; the upper half is reserved.
MIN_CID: Final = 3
MAX_CID: Final = 0xFFFFFFFE

# struct virtio_vsock_config of 5.10.4.
_CONFIG: Final = struct.Struct("<Q")


class VirtioVsock(EngineDevice, abc.ABC):
    """A socket device: streams between the guest and programs of the host.

    Args:
        name: e.g. "vsock0"; also the name of the engine's thread.
        cid: the guest's address, MIN_CID..MAX_CID.

    Raises:
        ValueError: the CID is out of range.
    """

    DEVICE_ID: ClassVar[int] = VIRTIO_ID_VSOCK
    PCI_CLASS: ClassVar[int] = 0x078000
    QUEUE_SIZES: tuple[int, ...] = (QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE)

    def __init__(self, name: str, cid: int) -> None:
        super().__init__(name)
        if not MIN_CID <= cid <= MAX_CID:
            raise ValueError(f"cid={cid}: must be {MIN_CID}..{MAX_CID}")
        self._cid = cid

    def config_space(self) -> bytes:
        """Return struct virtio_vsock_config."""
        return _CONFIG.pack(self._cid)


class UnixVirtioVsock(VirtioVsock):
    """One over Unix sockets of the host.

    Args:
        name, cid: as for every VirtioVsock.
        listener_fd: a listening Unix stream socket; owned from now on.
        directory_fd: where the sockets lie that the guest connects to; owned from now on.
        socket_name: of these sockets, up to the "_".
    """

    def __init__(
        self, name: str, cid: int, listener_fd: int, directory_fd: int, *, socket_name: str
    ) -> None:
        super().__init__(name, cid)
        self._listener_fd = listener_fd
        self._directory_fd = directory_fd
        self._socket_name = socket_name

    def make_engines(self, activation: Activation) -> Sequence[DataPath]:
        """Build the engine of both data queues."""
        rx, tx = activation.require(RX_QUEUE), activation.require(TX_QUEUE)
        return [
            VsockEngine(
                activation.memory,
                guest_cid=self._cid,
                listener_fd=self._listener_fd,
                directory_fd=self._directory_fd,
                name=self._socket_name,
                rx=rx.queue,
                tx=tx.queue,
                rx_kick=rx.kick,
                tx_kick=tx.kick,
                rx_irq=rx.irq,
                tx_irq=tx.irq,
                fault=activation.fault,
            ),
        ]

    def engine_stats(self, engine: DataPath) -> dict[str, int]:
        """Return the vsock engine's counters."""
        assert isinstance(engine, VsockEngine)
        return engine.stats()

    def close(self) -> None:
        """Stop for good and close both descriptors."""
        super().close()
        os.close(self._listener_fd)
        os.close(self._directory_fd)


class VhostVirtioVsock(VirtioVsock):
    """One that the kernel serves; nothing is counted.

    Args:
        name, cid: as for every VirtioVsock.
        vhost_fd: /dev/vhost-vsock, which knows the CID; owned from now on.

    Raises:
        BackendError: the descriptor is no such device.
    """

    def __init__(self, name: str, cid: int, vhost_fd: int) -> None:
        super().__init__(name, cid)
        self._vhost_fd = vhost_fd
        try:
            self._ring_features = VhostDevice(vhost_fd).features() & TRANSPORT_FEATURES
        except HostError as err:
            raise BackendError(name, f"not a vhost device: {err}") from err
        if not self._ring_features & VIRTIO_F_VERSION_1:
            raise BackendError(name, "this vhost-vsock knows only virtio 0.9")

    @property
    def features(self) -> int:
        """The bits that the kernel's side has as well."""
        return self._ring_features

    def make_engines(self, activation: Activation) -> Sequence[DataPath]:
        """Give both data queues to the kernel."""
        queues = [activation.require(index) for index in (RX_QUEUE, TX_QUEUE)]
        return [
            VhostVsock(
                self._vhost_fd,
                activation.memory,
                features=activation.features,
                vrings=[Vring(each.queue, each.kick, each.irq) for each in queues],
                fault=activation.fault,
            ),
        ]

    def engine_stats(self, engine: DataPath) -> dict[str, int]:
        """Return none."""
        return {}

    def close(self) -> None:
        """Stop for good and close the device."""
        super().close()
        os.close(self._vhost_fd)
