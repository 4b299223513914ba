# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A hosteld under test: its API, tiny kernels for it, and what of it must not be left behind."""

from __future__ import annotations

import fcntl
import itertools
import os
import secrets
import signal
import struct
import time
from collections.abc import Sequence
from pathlib import Path

from lab.hosteld import Hosteld, is_running
from lab.rest import Api, Json
from tests.support import tiny_kernel

MIN_MEMORY_MIB = 16
WORKERS_LIMIT_S = 10.0
POLL_S = 0.02
# struct flock on x86-64: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK = struct.Struct("hhqqi4x")


class Hostel:
    """One hosteld and the API to it."""

    def __init__(
        self, directory: Path, options: Sequence[str] = (), runtime_dir: Path | None = None
    ) -> None:
        self.directory = directory
        self.daemon = Hosteld(directory, options, runtime_dir)
        self.api = Api(self.daemon.socket)
        self._names = itertools.count()
        self._token = secrets.token_hex(3)

    def start(self) -> None:
        """Start it."""
        self.daemon.start()

    def restart(self) -> None:
        """Kill it like a crash does, and start it again."""
        self.daemon.kill()
        self.daemon.start()

    def end(self) -> None:
        """End it and its workers."""
        self.daemon.end()

    def tap(self, name: str) -> str:
        """Return a tap's name that no other run of these tests has; 6 letters are the most."""
        return f"h{self._token}-{name}"

    def kernel(self, code: bytes, *, pvh: bool = False) -> str:
        """Import a tiny kernel and return its name."""
        name = f"tiny-{next(self._names)}"
        path = tiny_kernel.write_elf(self.directory / name, code, pvh=pvh)
        self.api.post("/v1/kernels?wait=60", {"name": name, "path": str(path)})
        return name

    def create(self, code: bytes, *, name: str | None = None, **options: object) -> str:
        """Create a VM that runs ``code``, stopped unless told otherwise; return its name."""
        name = name or f"vm-{next(self._names)}"
        body: Json = {
            "name": name,
            "kernel": self.kernel(code),
            "memory_mib": MIN_MEMORY_MIB,
            "rng": False,
            **options,
        }
        self.api.post("/v1/vms?wait=60", body)
        return name

    def run(self, code: bytes, **options: object) -> str:
        """Create and start a VM that runs ``code``; return its name."""
        name = self.create(code, name=None, **options)
        self.api.act(name, "start")
        return name

    def console(self, name: str) -> str:
        """Return a VM's console log."""
        return self.api.request("GET", f"/v1/vms/{name}/console/log").body.decode()

    def delete(self, name: str) -> None:
        """Delete a VM, whatever it does."""
        self.api.delete(f"/v1/vms/{name}", force=True)

    def workers(self) -> set[int]:
        """Return the processes that came of this hosteld: not itself, its zygote, or the spare.

        A worker is a fork of the zygote, which is a fork of hosteld: all have its command line.
        The zygote of a hosteld that was killed counts too, for the moment that it still lives.
        """
        assert self.daemon.process is not None
        marker, hosteld = os.fsencode(self.daemon.runtime_dir), self.daemon.process.pid
        found = set()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                is_spare = (path / "comm").read_text() == "vm-spare\n"
            except (FileNotFoundError, ProcessLookupError):
                continue
            if marker in words and hosteld not in (int(path.name), parent) and not is_spare:
                found.add(int(path.name))
        return found

    def wait_workers(self, *wanted: int) -> None:
        """Wait until exactly these workers are there; one that was killed takes its moment.

        Raises:
            TimeoutError: others are there, or some are missing.
        """
        deadline = time.monotonic() + WORKERS_LIMIT_S
        while self.workers() != set(wanted):
            if time.monotonic() > deadline:
                raise TimeoutError(f"workers {self.workers()}, not {set(wanted)}")
            time.sleep(POLL_S)


def spare_of(hostel: Hostel) -> int:
    """Return the worker that waits for a VM.

    Raises:
        TimeoutError: there is none.
    """
    deadline = time.monotonic() + WORKERS_LIMIT_S
    while time.monotonic() < deadline:
        for pid in children_of(zygote_of(hostel)):
            if is_running(pid) and name_of(pid) == "vm-spare":
                return pid
        time.sleep(POLL_S)
    raise TimeoutError("no spare worker")


def zygote_of(hostel: Hostel) -> int:
    """Return the one child of hosteld."""
    assert hostel.daemon.process is not None
    (zygote,) = children_of(hostel.daemon.process.pid)
    return zygote


def children_of(pid: int) -> list[int]:
    """Return a process's children; zombies too."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def name_of(pid: int) -> str:
    """Return a process's name as top shows it, "" when it has gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def kill(pid: int) -> None:
    """End a process as the kernel's out-of-memory killer would."""
    os.kill(pid, signal.SIGKILL)


def is_locked(path: Path) -> bool:
    """Tell whether someone holds a lock of an open file description on a file: fcntl(2)."""
    with path.open("rb+") as file:
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, wanted)
        except BlockingIOError:
            return True
    return False


def has_tap(name: str) -> bool:
    """Tell whether the host has a network interface of this name."""
    return Path("/sys/class/net", name).exists()
