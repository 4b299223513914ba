# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The virtio devices of a machine, each in its PCI slot: they come and go while the guest runs.

A device goes in three steps: the guest is asked, lets go of it (that takes it out of its slot, on
the vCPU's thread, so that the guest never finds it again), and the main thread closes it.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from devices.acpi.pci_hotplug import PciHotplug
from devices.acpi.power import GenericEventDevice
from devices.bus import Bus
from devices.pci.host import PciHost
from devices.virtio.device import VirtioDevice
from devices.virtio.pci import VirtioPci

from ..errors import WorkerError


@dataclass(frozen=True, slots=True)
class _Occupant:
    """What is in a slot; ``fds`` are those that the device has copies of."""

    transport: VirtioPci
    slot: int
    fds: tuple[int, ...]


class VirtioSlots:
    """Devices by name.

    Args:
        pci: has the slots.
        events: tells the guest.
        pio: where the hotplug registers are claimed.
        wrap: puts a device, which it owns from then on, behind PCI.
        on_ejected: called on a vCPU's thread when collect() has something to do.

    Threads: the worker's main thread.
    """

    def __init__(
        self,
        pci: PciHost,
        events: GenericEventDevice,
        pio: Bus,
        wrap: Callable[[VirtioDevice], VirtioPci],
        on_ejected: Callable[[], None],
    ) -> None:
        self._pci = pci
        self._wrap = wrap
        self._on_ejected = on_ejected
        self._occupants: dict[str, _Occupant] = {}
        self._ejected: collections.deque[VirtioPci] = collections.deque()
        self._hotplug = PciHotplug(events, self._eject)
        self._hotplug.attach(pio)

    def __iter__(self) -> Iterator[VirtioDevice]:
        """Yield the devices."""
        return iter([occupant.transport.device for occupant in self._occupants.values()])

    def get(self, name: str) -> VirtioDevice | None:
        """Return a device by name."""
        occupant = self._occupants.get(name)
        return None if occupant is None else occupant.transport.device

    def add(self, device: VirtioDevice, slots: Iterable[int], fds: tuple[int, ...]) -> None:
        """Put a device, owned from now on, into the first free one of ``slots``.

        Raises:
            ValueError: its name is taken, or none of the slots is free.
            HostError: the host has no room for it.
        """
        try:
            if device.name in self._occupants:
                raise ValueError(f"there is a device {device.name} already")
            slot = next((slot for slot in slots if self._pci.is_free(slot)), None)
            if slot is None:
                raise ValueError(f"no PCI slot is free for {device.name}")
            transport = self._wrap(device)
        except BaseException:
            device.close()
            raise
        try:
            self._pci.attach(transport, slot)
        except BaseException:
            transport.close()
            raise
        self._occupants[device.name] = _Occupant(transport, slot, fds)

    def tell_added(self, name: str) -> None:
        """Have a running guest look at the slot of a new device."""
        self._hotplug.tell_changed(self._occupants[name].slot)

    def ask_to_eject(self, name: str) -> None:
        """Ask the guest to let go of a device.

        Raises:
            WorkerError: there is none.
        """
        self._hotplug.ask_to_eject(self._occupant(name).slot)

    def keep(self, name: str) -> None:
        """Take ask_to_eject() back; nothing happens where the guest was faster."""
        if (occupant := self._occupants.get(name)) is not None:
            self._hotplug.keep(occupant.slot)

    def pull(self, name: str) -> tuple[int, ...]:
        """Take a device out without asking, tell the guest, and return its descriptors.

        Raises:
            WorkerError: there is none.
        """
        occupant = self._occupant(name)
        with contextlib.suppress(ValueError):  # ejected in this very moment
            self._pci.pull(occupant.slot)
        self._hotplug.tell_gone(occupant.slot)
        return self._remove(name)

    def collect(self) -> dict[str, tuple[int, ...]]:
        """Close what the guest has ejected; return the names and the descriptors behind them."""
        gone = {}
        while self._ejected:
            transport = self._ejected.popleft()
            name = transport.device.name
            occupant = self._occupants.get(name)
            if occupant is not None and occupant.transport is transport:
                gone[name] = self._remove(name)
        return gone

    def close(self) -> None:
        """Close every device, the last one first."""
        for name in reversed(list(self._occupants)):
            self._remove(name)

    def _occupant(self, name: str) -> _Occupant:
        occupant = self._occupants.get(name)
        if occupant is None:
            raise WorkerError("no_such_device", f"the VM has no device {name!r}")
        return occupant

    def _remove(self, name: str) -> tuple[int, ...]:
        occupant = self._occupants.pop(name)
        occupant.transport.close()
        return occupant.fds

    def _eject(self, slot: int) -> None:
        """Empty a slot that the guest has let go of; on a vCPU's thread.

        The device itself is closed elsewhere: that may wait for a slow disk.
        """
        with contextlib.suppress(ValueError):  # pulled in this very moment
            transport = self._pci.detach(slot)
            assert isinstance(transport, VirtioPci)
            self._ejected.append(transport)
            self._on_ejected()
