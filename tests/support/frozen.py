# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A block device that hangs when told to, as storage does whose server is dead."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tests.support.host_tools import run

MIB = 1 << 20


class FrozenDisk:
    """A loop device on a file in a file system that can be frozen: then its writes wait.

    Whoever waits does so in the kernel, and no signal ends it.

    Args:
        directory: for its files.
    """

    def __init__(self, directory: Path) -> None:
        self._mount = directory / "frozen"
        self._mount.mkdir()
        image = directory / "frozen.img"
        image.touch()
        os.truncate(image, 32 * MIB)
        run("mkfs.ext4", "-q", str(image))
        with contextlib.ExitStack() as stack:
            run("mount", "-o", "loop", str(image), str(self._mount))
            stack.callback(run, "umount", "-l", str(self._mount))
            file = self._mount / "disk.raw"
            file.write_bytes(bytes(MIB))
            self.path = Path(run("losetup", "--find", "--show", str(file)))
            stack.callback(run, "losetup", "--detach", str(self.path))
            stack.callback(self.thaw)
            self._stack = stack.pop_all()
        self._is_frozen = False

    def freeze(self) -> None:
        """Have writes to it wait."""
        run("fsfreeze", "--freeze", str(self._mount))
        self._is_frozen = True

    def thaw(self) -> None:
        """Let them go on."""
        if self._is_frozen:
            run("fsfreeze", "--unfreeze", str(self._mount))
            self._is_frozen = False

    def close(self) -> None:
        """Remove it."""
        self._stack.close()


@contextlib.contextmanager
def frozen_disk(directory: Path) -> Iterator[FrozenDisk]:
    """A disk of 1 MiB, not frozen yet."""
    disk = FrozenDisk(directory)
    try:
        yield disk
    finally:
        disk.close()
