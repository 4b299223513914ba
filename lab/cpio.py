# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Writes initramfs archives: cpio "newc", byte for byte the same for the same input.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

import stat
from dataclasses import dataclass, field
from typing import Final

BLOCK_BYTES: Final = 512


@dataclass
class Archive:
    """An initramfs in the making. Paths are relative to its root, without a leading slash."""

    _parts: list[bytes] = field(default_factory=list)
    _known: set[str] = field(default_factory=set)

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory and its parents; adding one twice is fine."""
        parent = path.rpartition("/")[0]
        if parent:
            self.directory(parent)
        if path not in self._known:
            self._add(path, stat.S_IFDIR | mode, b"")

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file, and its parents."""
        self._add_with_parents(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link, and its parents."""
        self._add_with_parents(path, stat.S_IFLNK | 0o777, target.encode())

    def char_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device node, which needs no privilege here, and its parents."""
        self._add_with_parents(path, stat.S_IFCHR | mode, b"", rdev=(major, minor))

    def to_bytes(self) -> bytes:
        """Return the finished archive, padded as cpio pads it."""
        body = b"".join([*self._parts, _entry(0, "TRAILER!!!", 0, b"", (0, 0))])
        return body + b"\0" * (-len(body) % BLOCK_BYTES)

    def _add_with_parents(
        self, path: str, mode: int, data: bytes, rdev: tuple[int, int] = (0, 0)
    ) -> None:
        parent = path.rpartition("/")[0]
        if parent:
            self.directory(parent)
        self._add(path, mode, data, rdev)

    def _add(self, path: str, mode: int, data: bytes, rdev: tuple[int, int] = (0, 0)) -> None:
        if path in self._known:
            raise ValueError(f"{path}: added twice")
        self._known.add(path)
        self._parts.append(_entry(len(self._known), path, mode, data, rdev))


def _entry(inode: int, path: str, mode: int, data: bytes, rdev: tuple[int, int]) -> bytes:
    name = path.encode() + b"\0"
    # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *rdev, len(name), 0)
    head = b"070701" + b"".join(b"%08x" % f for f in fields) + name
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)
