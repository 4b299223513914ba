# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The vhost-user back ends of one VM. They outlive a reset of its machine; hosteld runs them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from devices.virtio.vhost_user.link import Link

if TYPE_CHECKING:
    from devices.event_loop import EventLoop


class Backends:
    """Links by device id.

    Threads: the worker's main thread; ``on_lost`` is called on any.
    """

    def __init__(self) -> None:
        self._links: dict[str, Link] = {}

    def link(self, device_id: str, fd: int, config_bytes: int, *, is_libvhost: bool) -> Link:
        """Return the link of a device, made at its first use.

        Args:
            device_id: of the device.
            fd: a connected socket; the caller keeps it.
            config_bytes, is_libvhost: as Link has them.

        Raises:
            BackendError: the back end is not usable.
        """
        link = self._links.get(device_id)
        if link is None:
            sock = socket.socket(fileno=os.dup(fd))
            link = Link(device_id, sock, config_bytes=config_bytes, is_libvhost=is_libvhost)
            self._links[device_id] = link
        return link

    def attach(self, device_id: str, sock: socket.socket, needed: int) -> None:
        """Connect a device's link again; ``sock`` is owned from now on.

        Raises:
            KeyError: there is no such link; the socket is closed.
            BackendError: the back end is not usable.
        """
        link = self._links.get(device_id)
        if link is None:
            sock.close()
            raise KeyError(device_id)
        link.attach(sock, needed=needed)

    def lost(self) -> dict[str, str]:
        """Return why links have no connection, by device id."""
        return {name: link.lost for name, link in self._links.items() if link.lost is not None}

    def serve(self, event_loop: EventLoop, on_lost: Callable[[], None]) -> None:
        """Watch all links on a machine's loop."""
        for link in self._links.values():
            link.on_lost = on_lost
            link.watch(event_loop)

    def rest(self) -> None:
        """Stop watching: the machine is going."""
        for link in self._links.values():
            link.watch(None)

    def close(self) -> None:
        """Hang up on all."""
        for link in self._links.values():
            link.close()
        self._links = {}
