# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The state and the runtime directory: how they are made, checked and locked."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .config import ConfigError

log = logging.getLogger(__name__)

# Those whose runtime directory is the system's, and not a user's own.
_SYSTEM_UIDS: Final = frozenset({0})


class DirectoryInUse(ConfigError):
    """Another hosteld runs on this state directory."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies.

    Under ``state``: hostel.db, kernels/, images/, and for each VM vms/<id>/ with console.log,
    worker.log and disks/. Under ``runtime``: vms/<id>/ with control.sock and last_words
    while the VM has a worker, and vsock/<id>/ for as long as there is a VM with a vsock device.
    """

    state: Path
    runtime: Path

    @property
    def database(self) -> Path:
        """The SQLite database."""
        return self.state / "hostel.db"

    @property
    def kernels(self) -> Path:
        """Imported kernels."""
        return self.state / "kernels"

    @property
    def images(self) -> Path:
        """Imported images."""
        return self.state / "images"

    def vm_state(self, vm_id: str) -> Path:
        """A VM's part of the state directory."""
        return self.state / "vms" / vm_id

    def vm_runtime(self, vm_id: str) -> Path:
        """A VM's part of the runtime directory."""
        return self.runtime / "vms" / vm_id

    def vm_vsock(self, vm_id: str) -> Path:
        """The directory of a VM's vsock sockets, those of the operator's programs among them."""
        return self.runtime / "vsock" / vm_id


def prepare(layout: Layout) -> None:
    """Make both directories with all that belongs in them.

    Raises:
        ConfigError: a directory cannot be made, belongs to another user, or lets others write.
    """
    _make_private(layout.state, 0o700)
    # The system's runtime directory may be entered by all, so that members of socket_group reach
    # the API socket; vms/ below it stays hosteld's own.
    _make_private(layout.runtime, 0o755 if os.geteuid() in _SYSTEM_UIDS else 0o700)
    for path in (
        layout.kernels,
        layout.images,
        layout.state / "vms",
        layout.runtime / "vms",
        layout.runtime / "vsock",
    ):
        _make(path, 0o700, parents=False)


def _make_private(path: Path, mode: int) -> None:
    """Make a directory that only its owner may write, or check that it is one.

    A directory below /tmp may have been put there by someone else: lstat, not stat, so that a
    symbolic link is seen as what it is.
    """
    _make(path, mode, parents=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode):
        raise ConfigError(f"{path}: is not a directory")
    if info.st_uid != os.geteuid():
        raise ConfigError(f"{path}: belongs to uid {info.st_uid}, hosteld runs as {os.geteuid()}")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{path}: mode {stat.S_IMODE(info.st_mode):04o} lets others write; run chmod go-w on it"
        )


def _make(path: Path, mode: int, *, parents: bool) -> None:
    try:
        try:
            path.mkdir(mode=mode, parents=parents)
        except FileExistsError:
            if not path.is_dir():
                raise
        else:
            path.chmod(mode)  # the umask has taken from it
    except OSError as err:
        raise ConfigError(f"{path}: cannot be made: {_what(err)}") from err


def _what(err: OSError) -> str:
    if err.errno == errno.EROFS:
        return f"{err.strerror}: mount it read-write, or name another directory"
    return str(err.strerror)


def claim_runtime(layout: Layout) -> None:
    """Note whose runtime directory it is; another state directory's workers are not ours to end.

    The caller holds the lock of both directories.

    Raises:
        ConfigError: workers of another state directory may run in it.
    """
    note = layout.runtime / "state_dir"
    ours = str(layout.state.resolve())
    try:
        # Empty is what a power failure may leave.
        theirs = (note.read_text() if note.exists() else "") or ours
        if theirs != ours and any((layout.runtime / "vms").iterdir()):
            raise ConfigError(
                f"{layout.runtime} belongs to the VMs of state directory {theirs}; give this one a"
                " runtime_dir of its own"
            )
        fresh = layout.runtime / "state_dir.new"
        fresh.write_text(ours)
        fresh.rename(note)
    except OSError as err:
        raise ConfigError(f"{note}: {_what(err)}") from err


def lock(directory: Path) -> int:
    """Take a directory for this process; the lock lives as long as the returned fd.

    Call it after the zygote has been forked: a descriptor that it inherits would go on to every
    worker, and keep the lock for as long as they live.

    Raises:
        DirectoryInUse: another hosteld has it; the text names its pid.
        ConfigError: the lock file cannot be opened.
    """
    path = directory / "lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as err:
        raise ConfigError(f"{path}: {_what(err)}") from err
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as err:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise DirectoryInUse(f"{directory}: hosteld with pid {holder} runs on it already") from err
    except OSError as err:
        os.close(fd)
        raise ConfigError(f"{path}: {_what(err)}") from err
    return fd


class Reserve:
    """Some space in the state directory, kept so that a delete works on a full file system."""

    SIZE_BYTES: Final = 1 << 20

    def __init__(self, state: Path) -> None:
        self._path = state / "reserve"
        self.hold()

    def hold(self) -> None:
        """Take the space, if it is not taken and there is that much."""
        if self._path.exists():
            return
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, self.SIZE_BYTES)
            finally:
                os.close(fd)
        except OSError as err:
            log.warning("no space kept for deletes path=%s error=%s", self._path, err.strerror)
            self.release()

    def release(self) -> None:
        """Give the space back."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
