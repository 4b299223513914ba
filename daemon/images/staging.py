# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Write aside, then put in place: a directory of a store is complete or it is not there.

A store holds one directory per object, named by the sha256 of its bytes. It is made under another
name in the same directory, with all its files on disk, and then renamed. What a killed daemon left
half done keeps that other name, and sweep_staging() removes it at the next start.

What has been put in place is unclaimed until claim(): whoever keeps a record of it calls that once
the record is kept. An unclaimed object without a record is one that a killed daemon left; a
claimed one is somebody's data, whatever the records say.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from daemon.images.errors import StorageError

if TYPE_CHECKING:
    from types import TracebackType

log = logging.getLogger(__name__)

STAGING_PREFIX: Final = ".staging-"
UNCLAIMED_NAME: Final = "unclaimed"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_REFUSED: Final = (errno.EROFS, errno.EACCES, errno.EPERM)


class StagingDirectory:
    """A directory on its way into a store; leaving the context without place() removes it.

    Threads: one at a time.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._fds: list[int] = []
        with storing(store):
            self.path = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=store))

    def create(self, name: str) -> int:
        """Create a file and return its descriptor, open for reading too; closed with the rest."""
        fd = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._fds.append(fd)
        return fd

    def place(self, name: str) -> bool:
        """Make every file durable and unwritable, then give the directory its name in the store.

        Returns:
            False if the store has that object already; this copy is removed then.

        Raises:
            StorageError: it cannot be written.
        """
        with storing(self._store):
            self.create(UNCLAIMED_NAME)
            for fd in self._fds:
                os.fchmod(fd, 0o400)
                os.fsync(fd)
            self._close_files()
            sync_directory(self.path)
            try:
                self.path.rename(self._store / name)
            except OSError as err:
                if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                self.discard()
                return False
            sync_directory(self._store)
        return True

    def discard(self) -> None:
        """Remove it, if it is still there; safe to call twice."""
        self._close_files()
        if self.path.exists():
            _remove(self.path)

    def _close_files(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()


@contextmanager
def storing(store: Path) -> Iterator[None]:
    """Turn an OSError of writing into a store into StorageError.

    Raises:
        StorageError: ``code`` is no_space, storage_refused or storage_failed.
    """
    try:
        yield
    except OSError as err:
        if err.errno in _FULL:
            code, advice = "no_space", "free some space there"
        elif err.errno in _REFUSED:
            code, advice = "storage_refused", "it must be writable"
        else:
            code, advice = "storage_failed", "see the host's kernel log"
        raise StorageError(code, f"{store}: {err.strerror}: {advice}", err.errno) from err


def sweep_staging(store: Path) -> int:
    """Remove what a killed daemon left half done; return how much that was.

    Call it at start, before any import: it cannot tell a dead import from a live one.

    Raises:
        StorageError: the directory cannot be listed.
    """
    with storing(store):
        leftovers = sorted(store.glob(STAGING_PREFIX + "*"))
    for path in leftovers:
        _remove(path)
    return len(leftovers)


def claim(store: Path, sha256: str) -> None:
    """Say that a record of an object is kept; if that is lost, claim it again at the next start.

    Raises:
        StorageError: the directory cannot be written.
    """
    with storing(store):
        (store / sha256 / UNCLAIMED_NAME).unlink(missing_ok=True)


def is_unclaimed(store: Path, sha256: str) -> bool:
    """Whether an object was put in place by an import that did not come to its end."""
    return (store / sha256 / UNCLAIMED_NAME).exists()


def remove_stored(store: Path, sha256: str) -> None:
    """Remove an object of a store; if the daemon is killed meanwhile, sweep_staging() goes on.

    Raises:
        StorageError: it cannot be removed.
    """
    with storing(store):
        doomed = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=store))
        try:
            (store / sha256).rename(doomed)  # onto an empty directory: atomic
        except FileNotFoundError:
            log.warning("nothing to remove store=%s sha256=%s", store, sha256)
        _remove(doomed)
        sync_directory(store)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as err:
        # It is in nobody's way, and the next start tries again.
        log.warning("staging not removed path=%s error=%s", path, err.strerror)
