# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a transport hands to a device at DRIVER_OK."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from devices.errors import BadQueueConfig

if TYPE_CHECKING:
    from devices.event_loop import EventLoop
    from kvm_ffi.eventfd import EventFd
    from kvm_ffi.memory import GuestMemory
    from kvm_ffi.virtqueue import Virtqueue


@dataclass(frozen=True)
class EnabledQueue:
    """A virtqueue that the driver enabled, with both of its notifications."""

    queue: Virtqueue
    kick: EventFd  # guest -> device
    irq: EventFd | None  # device -> guest; None when the driver gave the queue no vector


@dataclass(frozen=True)
class Activation:
    """Everything a device needs to run, from DRIVER_OK to the next reset.

    Attributes:
        features: what was negotiated.
        queues: by queue index; a queue that the driver did not enable is missing.
        fault: to be signalled when a ring broke; the transport then asks fault_reason().
        event_loop: serves kicks of devices that have no engine.
        memory: guest RAM, for engines.
    """

    features: int
    queues: Mapping[int, EnabledQueue]
    fault: EventFd
    event_loop: EventLoop
    memory: GuestMemory

    def require(self, queue_index: int) -> EnabledQueue:
        """Return a queue without which the device cannot work.

        Raises:
            BadQueueConfig: the driver did not enable it.
        """
        queue = self.queues.get(queue_index)
        if queue is None:
            raise BadQueueConfig(f"DRIVER_OK without queue {queue_index}")
        return queue
