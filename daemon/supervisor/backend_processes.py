# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Processes that serve devices: started, found again, ended.

Each carries in its environment whose it is. So a later hosteld finds those that live on, and
those that were started a moment before hosteld was killed, without a note that could be missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .backend_tools import Command

log = logging.getLogger(__name__)

_MARK: Final = "HOSTEL_BACKEND"
# Between SIGTERM, at which images are closed, and SIGKILL.
TERM_GRACE_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Owner:
    """The device that a process serves.

    Attributes:
        runtime: of the VM, in hosteld's runtime directory.
    """

    runtime: Path
    device_id: str

    @property
    def mark(self) -> str:
        """The variable's value; a device id has no '/' in it, so it is unique."""
        return f"{self.runtime}/{self.device_id}"


class BackendProcess:
    """A process, with its group, until it ends.

    Attributes:
        owner: what it serves.
        ended: its wait status, None when it is not our child; never fails.

    Threads: the event loop's.
    """

    def __init__(self, owner: Owner, pid: int, pidfd: int, *, is_child: bool) -> None:
        self.owner = owner
        self.pid = pid
        self._pidfd = pidfd
        self._is_child = is_child
        self._loop = asyncio.get_running_loop()
        self._killer: asyncio.TimerHandle | None = None
        self.ended: asyncio.Future[int | None] = self._loop.create_future()
        self._loop.add_reader(pidfd, self._on_end)

    def end(self) -> None:
        """Send SIGTERM, later SIGKILL."""
        if not self.ended.done() and self._killer is None:
            self._signal(signal.SIGTERM)
            self._killer = self._loop.call_later(TERM_GRACE_S, self._signal, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._is_child:
                # Not reaped yet, so the number is still its group's.
                os.killpg(self.pid, number)
            else:
                signal.pidfd_send_signal(self._pidfd, number)

    def _on_end(self) -> None:
        status = None
        if self._is_child:
            self._signal(signal.SIGKILL)  # what it has forked
            _, status = os.waitpid(self.pid, os.WNOHANG)
        self.release()
        log.info("back end ended mark=%s pid=%d status=%s", self.owner.mark, self.pid, status)
        self.ended.set_result(status)

    def release(self) -> None:
        """Let it live on without this hosteld."""
        if self._killer is not None:
            self._killer.cancel()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


def spawn(owner: Owner, command: Command, log_fd: int) -> BackendProcess:
    """Start a program in a session of its own, with nothing but its descriptors and its log.

    Raises:
        OSError: it cannot be started.
    """
    child = subprocess.Popen(
        command.argv,
        stdin=subprocess.DEVNULL,
        stdout=log_fd,
        stderr=log_fd,
        pass_fds=command.fds,
        cwd="/",
        env={"PATH": f"{os.defpath}:/usr/sbin:/sbin", "LANG": "C.UTF-8", _MARK: owner.mark},
        start_new_session=True,
    )
    with contextlib.suppress(OSError):
        resource.prlimit(child.pid, resource.RLIMIT_CORE, (0, 0))  # guest memory is in it
    try:
        pidfd = os.pidfd_open(child.pid)
    except OSError:
        child.kill()
        child.wait()
        raise
    child.returncode = 0  # it is reaped below, and not when this object goes
    return BackendProcess(owner, child.pid, pidfd, is_child=True)


def find_all(runtime: Path) -> list[BackendProcess]:
    """Find the back ends that earlier hostelds of this runtime directory left."""
    return [
        BackendProcess(owner, pid, pidfd, is_child=False)
        for owner, pid, pidfd in _marked(runtime / "vms")
    ]


def _marked(vms: Path) -> Iterator[tuple[Owner, int, int]]:
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        pid = int(entry.name)
        try:
            if entry.stat().st_uid != os.geteuid():
                continue
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        # Read with the pidfd open, so that the signal goes to whoever was looked at.
        owner = _owner(pid, vms)
        if owner is None:
            os.close(pidfd)
        else:
            yield owner, pid, pidfd


def _owner(pid: int, vms: Path) -> Owner | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    prefix = f"{_MARK}={vms}/".encode()
    marked = next((value for value in variables if value.startswith(prefix)), None)
    if marked is None:
        return None
    vm_id, _, device_id = os.fsdecode(marked[len(prefix) :]).partition("/")
    return Owner(vms / vm_id, device_id)
