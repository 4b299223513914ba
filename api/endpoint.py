# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Where the daemon is: what a client finds in its environment, and the defaults.

First that is set: ``HOSTEL_URL``, ``HOSTEL_SOCKET``, the user's own socket, the system's socket.
The user's own is ``$XDG_RUNTIME_DIR/hostel/hostel.sock``, without that variable
``/tmp/hostel-UID/hostel.sock`` in a directory that only this user can write, as hosteld makes it;
root's is the system's, ``/run/hostel/hostel.sock``.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SYSTEM_SOCKET: Final = Path("/run/hostel/hostel.sock")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One way to a daemon: a Unix socket, or a URL with a bearer token."""

    socket: str | None = None
    url: str | None = None
    token: str | None = None

    def __str__(self) -> str:
        return self.url if self.url is not None else f"socket {self.socket}"

    @property
    def base_url(self) -> str:
        """The URL that paths are appended to."""
        return "http://localhost" if self.url is None else self.url.rstrip("/")


def find_endpoint(
    environ: Mapping[str, str],
    uid: int,
    *,
    socket: str | None = None,
    url: str | None = None,
    system_socket: Path = SYSTEM_SOCKET,
) -> Endpoint:
    """Return where the daemon is.

    Args:
        environ: the process's environment.
        uid: the caller's effective user id.
        socket: a path that goes before the environment.
        url: a URL that goes before the environment.
        system_socket: where the system's daemon listens.
    """
    token = environ.get("HOSTEL_TOKEN") or None
    if url is not None:
        return Endpoint(url=url, token=token)
    if socket is not None:
        return Endpoint(socket=socket)
    if environ.get("HOSTEL_URL"):
        return Endpoint(url=environ["HOSTEL_URL"], token=token)
    if environ.get("HOSTEL_SOCKET"):
        return Endpoint(socket=environ["HOSTEL_SOCKET"])
    if uid == 0:
        return Endpoint(socket=str(system_socket))
    own = _own_socket(environ, uid)
    if not _is_socket(own) and _is_socket(system_socket):
        return Endpoint(socket=str(system_socket))
    return Endpoint(socket=str(own))


def _own_socket(environ: Mapping[str, str], uid: int) -> Path:
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        return Path(runtime, "hostel", "hostel.sock")
    return Path(f"/tmp/hostel-{uid}/hostel.sock")  # noqa: S108 - hosteld owns it, mode 0700


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False
