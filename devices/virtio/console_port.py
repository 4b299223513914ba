# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What is between the two queues of a console port and its socket on the host.

Whole buffers are moved, and little is kept: one piece from the host that the guest has no room
for, and one write of the guest that the socket has no room for. While that lasts, the rest waits
where it is: in the socket, and in the guest's ring. Nobody connected, a guest's writes are
dropped; a console's last ones are kept, since Linux spins until a console has taken them.
"""

from __future__ import annotations

import logging
import select
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from devices.ratelimit import GuestLog
from kvm_ffi.errors import BadDescriptorChain

if TYPE_CHECKING:
    from devices.event_loop import EventLoop
    from kvm_ffi.timer import Timer
    from kvm_ffi.virtqueue import DescriptorChain

    from .queue import EnabledQueue

log = logging.getLogger(__name__)

PIECE_BYTES: Final = 16 * 1024
# Linux writes 32 KiB at a time, and splices what a pipe may hold at most, which is this.
MAX_WRITE_BYTES: Final = 1 << 20
CONSOLE_BACKLOG_BYTES: Final = 64 * 1024
# After so many chains the other devices get their turn.
MAX_CHAINS_A_TURN: Final = 64
# A connection that cannot be taken for want of descriptors or memory is tried again after this.
ACCEPT_RETRY_NS: Final = 1_000_000_000
COUNTERS: Final = ("connections", "received_bytes", "sent_bytes", "dropped_bytes")

Guard = Callable[[Callable[[], None]], None]


@dataclass(frozen=True, slots=True)
class PortConfig:
    """A port to be: its name, and whether it is the console."""

    name: str
    is_console: bool


class Port:
    """One port; one program of the host at a time is connected to it, others wait.

    Args:
        number: of the port in its device.
        config: what the guest is told of it; Linux makes a console a terminal, hvc0.
        listener_fd: a listening stream socket; owned from now on.
        retry: a timer that is not set; owned from now on.
        guard: calls what it is given under the device's lock, unless the device rests.
        tell_open: called with whether a program of the host is connected.

    Threads: under the device's lock, all of it.
    """

    def __init__(
        self,
        number: int,
        config: PortConfig,
        listener_fd: int,
        retry: Timer,
        *,
        guard: Guard,
        tell_open: Callable[[Port, bool], None],
    ) -> None:
        self.number = number
        self.name = config.name
        self.is_console = config.is_console
        self._guard = guard
        self._tell_open = tell_open
        self._listener = socket.socket(fileno=listener_fd)
        self._listener.setblocking(False)
        self._retry = retry
        self._is_backing_off = False
        self._log = GuestLog(log)
        self._loop: EventLoop | None = None
        self._watched: dict[int, int] = {}  # events by descriptor
        self._is_held = False
        self._connection: socket.socket | None = None
        self._has_hung_up = False  # the program is gone, and the guest still reads what it left
        self._is_input_over = False
        self._is_guest_open = False
        self._in = memoryview(b"")
        self._out = bytearray()
        self._counts: Counter[str] = Counter()

    @property
    def is_connected(self) -> bool:
        """Whether a program of the host is connected."""
        return self._connection is not None

    def stats(self) -> dict[str, int]:
        """Return counters since the machine was made; received is what the guest was given."""
        return {name: self._counts[name] for name in COUNTERS}

    # --- life

    def start(self, loop: EventLoop, rx: EnabledQueue, tx: EnabledQueue) -> None:
        """Take the queues, which a driver has enabled, and connections."""
        self._loop, self._rx, self._tx = loop, rx, tx
        self._watch()

    def stop(self) -> None:
        """Give the queues back, and hang up."""
        if self._loop is None:
            return
        self._unwatch_all()
        self._loop = None
        self._is_held = self._is_guest_open = self._is_backing_off = False
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._forget()
        self._out.clear()

    def hold(self) -> None:
        """Leave sockets alone."""
        self._is_held = True
        self._watch()

    def release(self) -> None:
        """Go on after hold()."""
        self._is_held = False
        self._watch()

    def close(self) -> None:
        """Close the listener, once it has stopped."""
        self._listener.close()
        self._retry.close()

    # --- what happens

    def set_guest_open(self, is_open: bool) -> None:
        """Take note of whether a program of the guest has the port open (guest-controlled)."""
        self._is_guest_open = is_open
        if not is_open:
            self._in = memoryview(b"")
            if self._has_hung_up:
                self._hang_up()
        self.pump()

    def pump(self) -> None:
        """Move what can be moved, both ways.

        Raises:
            GuestError: a ring or a chain is malformed.
        """
        if self._loop is None:
            return
        self._pump_in()
        self._flush()
        self._pump_out()
        self._watch()

    def _on_listener(self) -> None:
        if self._loop is None or self._connection is not None:
            return
        try:
            self._connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it did not wait
        except OSError as err:
            # EMFILE, ENFILE, ENOMEM: the listener stays readable, and would be told of at once.
            self._log.warning("port %s takes no connection error=%s", self.name, err.strerror)
            self._is_backing_off = True
            self._retry.set(ACCEPT_RETRY_NS)
            self._watch()
            return
        self._connection.setblocking(False)
        self._counts["connections"] += 1
        self._tell_open(self, True)
        self.pump()

    def _on_retry(self) -> None:
        self._retry.drain()
        self._is_backing_off = False
        self._watch()

    def _on_socket(self, connection: socket.socket) -> None:
        if connection is not self._connection:
            return  # closed a moment before
        if not self._wants_input and not self._out:
            # Nothing was asked for, so it says that the other end is gone.
            self._lose()
        self.pump()

    # --- from the host to the guest

    @property
    def _wants_input(self) -> bool:
        return self._is_guest_open and not self._is_input_over and not self._in

    def _pump_in(self) -> None:
        """Guest-controlled: how much room the chains have."""
        rx = self._rx
        for _ in range(MAX_CHAINS_A_TURN):
            if not self._in and not self._receive():
                break
            chain = _pop(rx)
            if chain is None:
                break
            if not chain.writable_len:
                raise BadDescriptorChain(f"port {self.name}: a buffer to receive has no room")
            written = chain.write(self._in)
            self._in = self._in[written:]
            self._counts["received_bytes"] += written
            rx.queue.add_used(chain, written)
        else:
            rx.kick.signal()
        _publish(rx)

    def _receive(self) -> bool:
        """Take a piece from the socket; whether there was one."""
        if self._connection is None or not self._wants_input:
            return False
        try:
            piece = self._connection.recv(PIECE_BYTES)
        except BlockingIOError:
            if self._has_hung_up:
                self._hang_up()  # it does not read, and what it may still write is not waited for
            return False
        except OSError:
            self._hang_up()
            return False
        self._in = memoryview(piece)
        if not piece:
            self._is_input_over = True
            if self._has_hung_up:
                self._hang_up()
        return bool(piece)

    # --- from the guest to the host

    def _pump_out(self) -> None:
        """Guest-controlled: the chains, and what is in them."""
        tx = self._tx
        for _ in range(MAX_CHAINS_A_TURN):
            if self._out and not self.is_console:
                break  # until the socket has room
            chain = _pop(tx)
            if chain is None:
                break
            self._take(chain)
            tx.queue.add_used(chain, 0)
        else:
            tx.kick.signal()
        _publish(tx)

    def _take(self, chain: DescriptorChain) -> None:
        if chain.readable_len > MAX_WRITE_BYTES:
            raise BadDescriptorChain(
                f"port {self.name}: a write of {chain.readable_len} bytes: at most"
                f" {MAX_WRITE_BYTES} are taken"
            )
        is_read = self._connection is not None and not self._has_hung_up
        if not is_read and not self.is_console:
            self._counts["dropped_bytes"] += chain.readable_len
            return
        self._out += chain.read(chain.readable_len)
        self._flush()
        if self.is_console and len(self._out) > CONSOLE_BACKLOG_BYTES:
            self._drop_out(len(self._out) - CONSOLE_BACKLOG_BYTES)

    def _flush(self) -> None:
        while self._out and self._connection is not None and not self._has_hung_up:
            try:
                sent = self._connection.send(self._out)
            except BlockingIOError:
                return
            except OSError:
                self._lose()
                return
            self._counts["sent_bytes"] += sent
            del self._out[:sent]

    def _drop_out(self, count: int) -> None:
        self._counts["dropped_bytes"] += count
        del self._out[:count]

    # --- the connection

    def _lose(self) -> None:
        """The program is gone; what it wrote before is the guest's still."""
        if not self._is_guest_open or self._is_input_over:
            self._hang_up()
            return
        self._has_hung_up = True
        self._drop_unread()
        self._rx.kick.signal()  # for what is left in the socket

    def _hang_up(self) -> None:
        """Be ready for the next program."""
        assert self._connection is not None
        self._unwatch(self._connection.fileno())
        self._connection.close()
        self._connection = None
        self._forget()
        self._drop_unread()
        self._tell_open(self, False)

    def _drop_unread(self) -> None:
        if not self.is_console:
            self._drop_out(len(self._out))

    def _forget(self) -> None:
        self._has_hung_up = self._is_input_over = False
        self._in = memoryview(b"")

    def _watch(self) -> None:
        """Watch for what can be used, and nothing else: it would be told again and again."""
        wanted: dict[int, tuple[int, Callable[[], None]]] = {}
        if self._loop is None or self._is_held:
            self._unwatch_all()
            return
        if self._is_backing_off:
            wanted[self._retry.fd] = (select.EPOLLIN, self._on_retry)
        elif self._connection is None:
            wanted[self._listener.fileno()] = (select.EPOLLIN, self._on_listener)
        elif not self._has_hung_up:
            can_read = select.EPOLLIN if self._wants_input else 0
            # With neither, epoll(7) tells a hang-up still.
            events = can_read | (select.EPOLLOUT if self._out else 0)
            wanted[self._connection.fileno()] = (events, partial(self._on_socket, self._connection))
        for fd, events in list(self._watched.items()):
            if fd not in wanted or wanted[fd][0] != events:
                self._unwatch(fd)
        for fd, (events, act) in wanted.items():
            if fd not in self._watched:
                self._loop.watch(fd, events, partial(self._guard, act))
                self._watched[fd] = events

    def _unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None and self._loop is not None:
            self._loop.unwatch(fd)

    def _unwatch_all(self) -> None:
        for fd in list(self._watched):
            self._unwatch(fd)


def _pop(enabled: EnabledQueue) -> DescriptorChain | None:
    """Take a chain, or have the driver kick when there is one."""
    chain = enabled.queue.pop()
    if chain is None and enabled.queue.enable_kick():
        chain = enabled.queue.pop()
    return chain


def _publish(enabled: EnabledQueue) -> None:
    if enabled.queue.publish() and enabled.irq is not None:
        enabled.irq.signal()
