# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""One vhost-user back end: connected, lost, connected again.

    Link(socket) -> connected --- hangs up, garbage, too slow ---> lost
                        ^----------- attach(new socket) ------------+

A link outlives the devices on it: a reset of the machine builds new ones, the negotiation stays.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from devices.errors import BackendError
from devices.virtio.ids import VIRTIO_F_VERSION_1

from . import wire
from .wire import BackendRequests, Conversation

if TYPE_CHECKING:
    from devices.event_loop import EventLoop

log = logging.getLogger(__name__)

_WANTED: Final = (
    wire.PROTOCOL_F_MQ
    | wire.PROTOCOL_F_REPLY_ACK
    | wire.PROTOCOL_F_BACKEND_REQ
    | wire.PROTOCOL_F_CONFIG
    | wire.PROTOCOL_F_INFLIGHT_SHMFD
)


def _nobody() -> None:
    pass


class Link:
    """A connection to a back end, and what was agreed on with it.

    Args:
        name: of the device, for errors.
        sock: connected to the back end; owned from now on, on failure too.
        config_bytes: how much config space the back end has to serve; 0 when it serves none.
        is_libvhost: the back end is built on libvhost-user, which keeps track of what is in flight
            in shared memory when it is given some, although few programs on it offer that; and
            virtiofsd's seccomp filter ends it when it is asked to make that memory.

    Attributes:
        features: virtio feature bits of the back end.
        config: its config space as it was last read, of ``config_bytes``.
        lost: why there is no connection now; None while there is one.
        generation: counts the connections.
        on_lost: called when that happens, on any thread, with the lock held: it only takes note.
        on_config: called when the config space has changed, on any thread, without the lock.

    Raises:
        BackendError: the back end is not usable.

    Threads: any; ``lock`` is taken for each conversation.
    """

    def __init__(
        self, name: str, sock: socket.socket, *, config_bytes: int, is_libvhost: bool = False
    ) -> None:
        self.name = name
        self.lock = threading.RLock()
        self.features = 0
        self.config = b""
        self.lost: str | None = "not connected yet"
        self.on_lost: Callable[[], None] = _nobody
        self.on_config: Callable[[], None] = _nobody
        self.generation = 0
        self._config_bytes = config_bytes
        self.is_libvhost = is_libvhost
        self._protocol_features = 0
        self._conversation: Conversation | None = None
        self._requests: BackendRequests | None = None
        self._event_loop: EventLoop | None = None
        self.attach(sock)

    @property
    def has_inflight(self) -> bool:
        """Whether what is in flight is noted in shared memory."""
        return bool(self._protocol_features & wire.PROTOCOL_F_INFLIGHT_SHMFD)

    # --- connection

    def attach(self, sock: socket.socket, *, needed: int = 0) -> None:
        """Go on with a back end on a new connection; the one before is dropped.

        Args:
            sock: connected; owned from now on, on failure too.
            needed: feature bits without which the device cannot go on.

        Raises:
            BackendError: it does not answer, or is not what was here before; the link is lost.
        """
        with self.lock:
            self._hang_up()
            self._conversation = Conversation(sock, self.name)
            before = self.config
            try:
                self._shake_hands(self._conversation, needed)
            except BackendError as err:
                self._hang_up()
                self.lost = str(err)
                raise
            self.lost = None
            self.generation += 1
            self._watch()
        if before and before != self.config:
            self.on_config()

    def drop(self, reason: str) -> None:
        """End the conversation; whoever runs the back end brings a new connection."""
        with self.lock:
            if self.lost is not None:
                return
            self._hang_up()
            self.lost = reason
            log.warning("back end lost device=%s: %s", self.name, reason)
            self.on_lost()

    def close(self) -> None:
        """Hang up for good."""
        with self.lock:
            self._hang_up()
            self.lost = "closed"

    def talk(self) -> Conversation:
        """Return the conversation; the caller holds the lock.

        Raises:
            BackendError: the back end is lost.
        """
        if self._conversation is None:
            raise BackendError(self.name, f"is lost: {self.lost}")
        return self._conversation

    def _hang_up(self) -> None:
        self._unwatch()
        for end in (self._conversation, self._requests):
            if end is not None:
                end.close()
        self._conversation = self._requests = None

    def _shake_hands(self, talk: Conversation, needed: int) -> None:
        features = talk.ask_u64(wire.GET_FEATURES)
        needed |= VIRTIO_F_VERSION_1
        if needed & ~features:
            lacking = needed & ~features
            raise BackendError(self.name, f"lacks the features {lacking:#x} of {features:#x}")
        self._protocol_features = 0
        if features & wire.VHOST_USER_F_PROTOCOL_FEATURES:
            self._agree_on_protocol(talk)
        talk.tell(wire.SET_OWNER)
        self.config = self._read_config(talk)
        self.features = features

    def _agree_on_protocol(self, talk: Conversation) -> None:
        offered = talk.ask_u64(wire.GET_PROTOCOL_FEATURES)
        agreed = offered & _WANTED
        if self.is_libvhost:
            agreed |= wire.PROTOCOL_F_INFLIGHT_SHMFD
        talk.tell(wire.SET_PROTOCOL_FEATURES, wire.U64.pack(agreed))
        self._protocol_features = agreed
        talk.has_reply_ack = bool(agreed & wire.PROTOCOL_F_REPLY_ACK)
        if agreed & wire.PROTOCOL_F_BACKEND_REQ:
            self._requests = BackendRequests(self.name)
            talk.tell(wire.SET_BACKEND_REQ_FD, fds=[self._requests.theirs.fileno()])
            self._requests.theirs.close()

    # --- config space

    def _read_config(self, talk: Conversation) -> bytes:
        """Read the config space.

        Raises:
            BackendError: the back end serves none, or another size.
        """
        if not self._config_bytes:
            return b""
        if not self._protocol_features & wire.PROTOCOL_F_CONFIG:
            raise BackendError(self.name, "serves no config space")
        size = wire.CONFIG.size + self._config_bytes
        payload = wire.CONFIG.pack(0, self._config_bytes, 0) + bytes(self._config_bytes)
        answer = talk.ask(wire.GET_CONFIG, payload, sizes=(size, size))
        return answer[wire.CONFIG.size :]

    # --- what the back end does by itself

    def watch(self, event_loop: EventLoop | None) -> None:
        """Notice on this loop when the back end hangs up or asks for something; None: no more."""
        with self.lock:
            self._unwatch()
            self._event_loop = event_loop
            self._watch()

    def _watch(self) -> None:
        if self._event_loop is None or self._conversation is None:
            return
        # Not EPOLLIN: that would be answers, which whoever asked reads.
        hung_up = partial(self._on_hangup, self._conversation)
        self._event_loop.watch(self._conversation.fileno(), select.EPOLLRDHUP, hung_up)
        if self._requests is not None:
            on_request = partial(self._on_request, self._requests)
            self._event_loop.watch(self._requests.fileno(), select.EPOLLIN, on_request)

    def _unwatch(self) -> None:
        if self._event_loop is not None:
            for end in (self._conversation, self._requests):
                if end is not None:
                    self._event_loop.unwatch(end.fileno())

    def _on_hangup(self, conversation: Conversation) -> None:
        with self.lock:
            if self._conversation is conversation:
                self.drop(f"{self.name}: hung up")

    def _on_request(self, requests: BackendRequests) -> None:
        with self.lock:
            if self._requests is not requests:
                return  # of a connection that has been dropped meanwhile
            try:
                if not requests.receive():
                    return
                before, self.config = self.config, self._read_config(self.talk())
            except BackendError as err:
                self.drop(str(err))
                return
        if before != self.config:
            self.on_config()
