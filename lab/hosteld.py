# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Starts a hosteld of one's own and ends it without a trace: for the demo, benchmarks and tests.

Workers outlive hosteld by design. So that none outlives its user here, this process becomes the
reaper of its descendants: a worker whose hosteld and zygote have ended becomes our child, and is
found by that, whatever went wrong before.
"""

import contextlib
import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lab.errors import LabError

ROOT: Final = Path(__file__).resolve().parents[1]
PR_SET_CHILD_SUBREAPER: Final = 36
# An emulated CPU imports FastAPI in some 15 s.
START_LIMIT_S: Final = 120.0
STOP_LIMIT_S: Final = 30.0
POLL_S: Final = 0.02
ORPHAN_GRACE_S: Final = 1.0
# How hosteld, its zygote and so its workers were started.
PROGRAMS: Final = (b"/hosteld", b"daemon.supervisor.main", b"daemon.zygote")
# What the environment of a back end begins an entry with: daemon/supervisor/backend_processes.py.
BACK_END_MARK: Final = b"HOSTEL_BACKEND="
_UCRED: Final = struct.Struct("3i")  # of <linux/socket.h>: pid, uid, gid
_started: Final[set[int]] = set()  # our own hostelds, which are nobody's orphans


def program() -> list[str]:
    """Return how hosteld of this checkout is started: the installed script if there is one."""
    script = Path(sys.executable).with_name("hosteld")
    return [str(script)] if script.exists() else [sys.executable, "-m", "daemon.supervisor.main"]


class Hosteld:
    """One hosteld with its state, sockets and log below one directory.

    Args:
        directory: an existing directory; short, since a socket's path has at most 107 characters.
        options: further arguments of hosteld.
        runtime_dir: for sockets and such; below ``directory`` if not given.
    """

    def __init__(
        self, directory: Path, options: Sequence[str] = (), runtime_dir: Path | None = None
    ) -> None:
        self.directory = directory
        self.state_dir = directory / "state"
        self.runtime_dir = runtime_dir or directory / "run"
        self.log = directory / "hosteld.log"
        self.options = tuple(options)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """The API's Unix socket."""
        return self.runtime_dir / "hostel.sock"

    @property
    def argv(self) -> list[str]:
        """The command line that `start` runs."""
        dirs = ["--state-dir", str(self.state_dir), "--runtime-dir", str(self.runtime_dir)]
        return [*program(), *dirs, *self.options]

    def start(self, limit_s: float = START_LIMIT_S) -> None:
        """Start it and wait until its socket takes connections.

        Raises:
            LabError: it ended, or was not ready in time; holds the last lines of its log.
        """
        become_reaper()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C at the terminal is for our caller, who ends it in order.
                start_new_session=True,
            )
        _started.add(self.process.pid)
        deadline = time.monotonic() + limit_s
        while not self._answers():
            status = self.process.poll()
            if status is not None:
                raise LabError(f"hosteld ended with status {status}: {self.log_tail(3)}")
            if time.monotonic() > deadline:
                raise LabError(f"hosteld was not ready in {limit_s:g} s: {self.log_tail(3)}")
            time.sleep(POLL_S)

    def stop(self, limit_s: float = STOP_LIMIT_S) -> int:
        """End hosteld alone, in order, and return its exit status; its workers live on.

        Raises:
            LabError: it had to be killed.
        """
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired as err:
            self.kill()
            raise LabError(f"hosteld did not stop in {limit_s:g} s: {self.log_tail(3)}") from err

    def kill(self) -> None:
        """End hosteld alone by SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def end(self) -> list[int]:
        """End hosteld and all that came of it.

        Returns:
            The processes that had to be killed; their VMs had not been deleted.
        """
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(LabError):
                self.stop()
            _started.discard(self.process.pid)
        return end_orphans()

    def log_tail(self, lines: int) -> str:
        """Return the last lines of hosteld's log, as one line."""
        try:
            text = self.log.read_text(errors="replace")
        except FileNotFoundError:
            text = ""
        return " | ".join(text.strip().splitlines()[-lines:]) or "it logged nothing"

    def _answers(self) -> bool:
        assert self.process is not None
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(os.fspath(self.socket))
            except OSError:
                return False
            # A program that the last one was about to start has its socket for another moment.
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return bool(_UCRED.unpack(credentials)[0] == self.process.pid)


def become_reaper() -> None:
    """Have every descendant whose parent ends become a child of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def end_orphans(limit_s: float = 10.0) -> list[int]:
    """Kill the workers, zygotes and back ends that have become our children; return their ids.

    Each is given a moment first: a zygote ends by itself when its hosteld has ended.

    Raises:
        LabError: one of them cannot be killed.
    """
    killed: list[int] = []
    began = time.monotonic()
    while orphans := [pid for pid in _children() if pid not in _started and is_hosteld(pid)]:
        waited = time.monotonic() - began
        if waited > limit_s:
            raise LabError(f"processes {orphans} cannot be killed")
        if waited > ORPHAN_GRACE_S:
            for pid in set(orphans).difference(killed):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        time.sleep(POLL_S)
    for pid in killed:
        os.waitpid(pid, 0)
    return killed


def _children() -> list[int]:
    """Return our living children."""
    tasks = Path("/proc/self/task").glob("*/children")
    found = (int(pid) for task in tasks for pid in task.read_text().split())
    return [pid for pid in found if is_running(pid)]


def is_running(pid: int) -> bool:
    """Tell whether a process lives; a zombie does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


def is_hosteld(pid: int) -> bool:
    """Tell whether a process is hosteld, its zygote, a worker or a back end of one."""
    process = Path(f"/proc/{pid}")
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
        environment = (process / "environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False  # it has ended meanwhile
    return any(word.endswith(PROGRAMS) for word in words) or any(
        entry.startswith(BACK_END_MARK) for entry in environment
    )
