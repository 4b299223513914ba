# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Packs trees that Python imports from into squashfs images, which the lab mounts as disks.

Over 9p every stat and open is a round trip through the emulated machine, and importing a large
package is thousands of them. From a squashfs on a virtio disk they cost only emulated CPU time.
"""

import os
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lab import tools, tree
from lab.layout import Layout, path_key

# Never of use in the lab, or rebuilt at each run. `__pycache__` is packed, but changes to it
# alone are no reason to pack again.
CHECKOUT_SKIP: Final = frozenset(
    (".git", ".venv", ".cache", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis")
)
STDLIB_SKIP: Final = frozenset(
    [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "tkinter",
        "ensurepip",
    ]
)
KEPT_VERSIONS: Final = 2  # per tree: this one and the one that a running lab may still use


@dataclass(frozen=True)
class Image:
    """A squashfs file, and where the lab mounts it."""

    name: str  # the disk's virtio serial number, at most 20 characters
    file: Path
    target: Path


def pack_all(layout: Layout) -> tuple[list[Image], tree.Manifest]:
    """Pack what has changed since the last time.

    Returns:
        The images in the order to mount them, and the checkout's manifest as packed.
    """
    directory = layout.cache / "images"
    manifest = tree.scan(layout.checkout, CHECKOUT_SKIP | {"__pycache__"})
    _compile(layout, layout.checkout)
    checkout = pack("checkout", layout.checkout, directory, CHECKOUT_SKIP, tree.stamp(manifest))
    images = [pack("stdlib", layout.stdlib, directory, STDLIB_SKIP), checkout]
    if layout.venv is not None:
        images.append(pack("venv", layout.venv, directory, ()))
    return images, manifest


def pack(
    name: str, source: Path, directory: Path, skip: Collection[str], stamp: str | None = None
) -> Image:
    """Pack `source` into an image in `directory`, unless the same state is there already.

    Args:
        name: Short name, also of the disk.
        source: Tree to pack; the lab mounts it at the same path.
        directory: Where images are kept; older ones of the same source are removed.
        skip: Names to leave out, wherever they are.
        stamp: Digest of the state, when the caller has it already.

    Raises:
        LabError: mksquashfs is missing or failed, for example for want of space.
    """
    if stamp is None:
        stamp = tree.stamp(tree.scan(source, frozenset(skip) | {"__pycache__"}))
    prefix = f"{name}-{path_key(source)}-"
    final = directory / f"{prefix}{stamp}.squashfs"
    if not final.exists():
        directory.mkdir(parents=True, exist_ok=True)
        _squash(source, final, skip)
    # Its mtime is the time of its last use.
    os.utime(final)
    versions = sorted(directory.glob(f"{prefix}*"), key=lambda p: p.stat().st_mtime_ns)
    for old in versions[:-KEPT_VERSIONS]:
        old.unlink(missing_ok=True)
    return Image(name, final, source)


def _squash(source: Path, final: Path, skip: Collection[str]) -> None:
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".pack-") as scratch:
        file = Path(scratch) / "image"
        # lz4: the emulated CPU unpacks it, and time matters more than a few MiB on disk.
        options = ["-noappend", "-no-progress", "-quiet", "-comp", "lz4", "-no-xattrs"]
        left_out = ["-wildcards", "-e", *(f"... {name}" for name in skip)] if skip else []
        tools.run(["mksquashfs", source, file, *options, *left_out], what=f"packing {source}")
        file.rename(final)


def _compile(layout: Layout, source: Path) -> None:
    """Bring `__pycache__` up to date here, where it is cheap; in the lab it is not."""
    python = layout.venv / "bin" / "python" if layout.venv else layout.interpreter
    # Quick when nothing has changed. A file that does not compile is not our business.
    subprocess.run(
        [python, "-m", "compileall", "-q", "-x", r"/\.(venv|git|cache)/", source],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
    )
