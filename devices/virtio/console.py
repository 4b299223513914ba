# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""virtio-console with several ports: a terminal for the guest, and named channels to the host.

Port 0 is the console, if there is one. The others have names, which Linux shows below
/dev/virtio-ports/. What each port is to the host is in console_port.py.

Source: VIRTIO 1.2, 5.3 "Console Device".
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

from kvm_ffi.errors import BadDescriptorChain
from kvm_ffi.timer import Timer

from .console_port import Port, PortConfig
from .device import KickedDevice, serve_slowly
from .ids import VIRTIO_CONSOLE_F_MULTIPORT, VIRTIO_ID_CONSOLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm_ffi.virtqueue import DescriptorChain

    from .queue import Activation, EnabledQueue

MAX_PORTS: Final = 8
# A queue for each port takes a page of the guest's for each entry that it receives into.
QUEUE_SIZE: Final = 64
CONTROL_RX: Final = 2  # to the guest
CONTROL_TX: Final = 3

_CONFIG: Final = struct.Struct("<HHII")  # cols, rows, max_nr_ports, emerg_wr
_CONTROL: Final = struct.Struct("<IHH")  # id, event, value
DEVICE_READY: Final = 0
DEVICE_ADD: Final = 1
PORT_READY: Final = 3
CONSOLE_PORT: Final = 4
PORT_OPEN: Final = 6
PORT_NAME: Final = 7


def _timers(count: int) -> list[Timer]:
    """Make so many, or none: nothing else that a port takes over can fail after them."""
    timers: list[Timer] = []
    with contextlib.ExitStack() as undo:
        for _ in range(count):
            timers.append(Timer())
            undo.callback(timers[-1].close)
        undo.pop_all()
    return timers


class VirtioConsole(KickedDevice):
    """The ports and the control queues.

    Args:
        ports: 1 to MAX_PORTS, at most one of them the console.
        listener_fds: a listening stream socket for each port; owned from now on.

    Raises:
        ValueError: there are too many ports, or too many consoles.
        OSError: no descriptors are left; the listeners stay the caller's, as on any failure.
    """

    DEVICE_ID: ClassVar[int] = VIRTIO_ID_CONSOLE
    PCI_CLASS: ClassVar[int] = 0x078000
    FEATURES: ClassVar[int] = VIRTIO_CONSOLE_F_MULTIPORT

    def __init__(
        self, ports: Sequence[PortConfig], listener_fds: Sequence[int], name: str = "console0"
    ) -> None:
        super().__init__(name)
        consoles = [port for port in ports if port.is_console]
        if not 1 <= len(ports) <= MAX_PORTS or len(consoles) > 1:
            raise ValueError(
                f"{len(ports)} ports, {len(consoles)} of them consoles: must be 1..{MAX_PORTS} and"
                " at most one"
            )
        numbers = iter(range(1, MAX_PORTS + 1))
        self._ports = {
            number: Port(
                number,
                config,
                fd,
                retry,
                guard=self._act,
                tell_open=self._tell_open,
            )
            for config, fd, retry in zip(ports, listener_fds, _timers(len(ports)), strict=True)
            for number in [0 if config.is_console else next(numbers)]
        }
        self._max_ports = max(self._ports) + 1
        self.QUEUE_SIZES = (QUEUE_SIZE,) * (2 + 2 * self._max_ports)
        self._ready: set[int] = set()
        # What the driver is to be told, each thing once however often it asks.
        self._news: dict[tuple[int, int], bytes] = {}

    def config_space(self) -> bytes:
        """Return struct virtio_console_config; the size of the terminal is not known."""
        return _CONFIG.pack(0, 0, self._max_ports, 0)

    # --- life

    def activate(self, activation: Activation) -> None:
        """Take the queues and connections."""
        with self._lock:
            super().activate(activation)
            has_control = bool(activation.features & VIRTIO_CONSOLE_F_MULTIPORT)
            if has_control:
                activation.require(CONTROL_RX)
                activation.require(CONTROL_TX)
            for port in self._ports.values():
                queues = [activation.queues.get(index) for index in _queues_of(port.number)]
                rx, tx = queues
                if rx is None or tx is None or not (has_control or port.is_console):
                    continue
                port.start(activation.event_loop, rx, tx)
                if not has_control:
                    port.set_guest_open(True)
            self._hold_if_resting()

    def reset(self) -> None:
        """Give the queues back, and hang up on the host's programs."""
        super().reset()
        with self._lock:
            for port in self._ports.values():
                port.stop()
            self._ready.clear()
            self._news.clear()

    def quiesce(self) -> None:
        """Let kicks and sockets wait."""
        super().quiesce()
        with self._lock:
            self._hold_if_resting()

    def resume(self) -> None:
        """Serve both again."""
        with self._lock:
            super().resume()
            if self._fault is None:
                for port in self._ports.values():
                    port.release()

    def close(self) -> None:
        """Stop for good and close the listeners."""
        super().close()
        for port in self._ports.values():
            port.close()

    def port_stats(self) -> dict[str, dict[str, int]]:
        """Return each port's counters, by its name."""
        with self._lock:
            return {port.name: port.stats() for port in self._ports.values()}

    def _act(self, work: Callable[[], None]) -> None:
        """Do what a socket asks for, unless the device rests."""
        self.guarded(lambda _: work())
        with self._lock:
            self._hold_if_resting()

    def _hold_if_resting(self) -> None:
        if self._is_quiesced or self._fault is not None:
            for port in self._ports.values():
                port.hold()

    # --- queues

    def serve(self, queue_index: int, enabled: EnabledQueue) -> dict[str, int]:
        """Serve one queue; what moves in a port's queues is in that port's own counters."""
        if queue_index == CONTROL_TX:
            return serve_slowly(enabled, partial(self.handle, queue_index))
        if queue_index == CONTROL_RX:
            self._send_news()
        elif (port := self._ports.get(_port_of(queue_index))) is not None:
            port.pump()
        return {}

    def handle(self, queue_index: int, chain: DescriptorChain) -> int:
        """Take a control message of the driver.

        Raises:
            BadDescriptorChain: it is too short for one.
        """
        raw = chain.read(_CONTROL.size)
        if len(raw) < _CONTROL.size:
            raise BadDescriptorChain(f"{self.name}: a control message of {len(raw)} bytes")
        number, event, value = _CONTROL.unpack(raw)
        if event == DEVICE_READY and value:
            for each in self._ports:
                self._tell(each, DEVICE_ADD, 0)
        elif (port := self._ports.get(number)) is not None:
            if event == PORT_READY and value:
                self._introduce(port)
            elif event == PORT_OPEN:
                port.set_guest_open(bool(value))
        return 0

    def _introduce(self, port: Port) -> None:
        self._ready.add(port.number)
        if port.is_console:
            self._tell(port.number, CONSOLE_PORT, 1)
        self._tell(port.number, PORT_NAME, 1, port.name.encode())
        # A console is there whether somebody looks or not.
        self._tell_open(port, port.is_connected)

    def _tell_open(self, port: Port, is_open: bool) -> None:
        if port.number in self._ready:
            self._tell(port.number, PORT_OPEN, int(is_open or port.is_console))

    def _tell(self, number: int, event: int, value: int, text: bytes = b"") -> None:
        self._news.pop((number, event), None)  # the newest goes last
        self._news[number, event] = _CONTROL.pack(number, event, value) + text
        self._send_news()

    def _send_news(self) -> None:
        """Guest-controlled: how much room the driver's buffers have."""
        if self._activation is None:
            return
        enabled = self._activation.require(CONTROL_RX)
        while self._news:
            chain = enabled.queue.pop()
            if chain is None:
                if enabled.queue.enable_kick():
                    continue
                break
            key, message = next(iter(self._news.items()))
            if chain.writable_len < len(message):
                raise BadDescriptorChain(
                    f"{self.name}: a control buffer of {chain.writable_len} bytes:"
                    f" {len(message)} are needed"
                )
            del self._news[key]
            enabled.queue.add_used(chain, chain.write(message))
        if enabled.queue.publish() and enabled.irq is not None:
            enabled.irq.signal()


def _queues_of(number: int) -> tuple[int, int]:
    """Return a port's queues, to the guest and from it: 5.3.2."""
    first = 0 if number == 0 else 2 + 2 * number
    return first, first + 1


def _port_of(queue_index: int) -> int:
    return 0 if queue_index < CONTROL_RX else queue_index // 2 - 1
