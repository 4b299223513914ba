# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Lists a directory tree cheaply, to know whether and where it has changed."""

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    """What tells one version of a file from another without reading it."""

    mtime_ns: int
    size_bytes: int
    mode: int


Manifest = dict[str, Entry]  # relative path -> entry; files and symlinks, not directories


def scan(root: Path, skip: Collection[str]) -> Manifest:
    """List the files below `root`; files that vanish meanwhile are left out.

    Args:
        root: The directory to list.
        skip: Names of files and directories to leave out, wherever they are.
    """
    return dict(sorted(_walk(os.fspath(root), "", frozenset(skip))))


def _walk(directory: str, prefix: str, skip: frozenset[str]) -> Iterator[tuple[str, Entry]]:
    # os.scandir, not Path.walk: a venv has some 15,000 files and this runs at each start.
    try:
        with os.scandir(directory) as found:
            entries = [e for e in found if e.name not in skip]
    except (FileNotFoundError, PermissionError):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, f"{prefix}{entry.name}/", skip)
            continue
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        yield prefix + entry.name, Entry(status.st_mtime_ns, status.st_size, status.st_mode)


def stamp(manifest: Manifest) -> str:
    """Return a short digest that changes when any file is added, removed or rewritten."""
    digest = hashlib.sha256()
    for path, entry in manifest.items():
        digest.update(f"{path}\0{entry.mtime_ns}\0{entry.size_bytes}\0{entry.mode}\0".encode())
    return digest.hexdigest()[:16]


def difference(old: Manifest, new: Manifest) -> tuple[list[str], list[str]]:
    """Return (paths that are new or changed, paths that are gone)."""
    changed = [path for path, entry in new.items() if old.get(path) != entry]
    return changed, [path for path in old if path not in new]
