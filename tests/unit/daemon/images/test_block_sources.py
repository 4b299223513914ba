# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Imports from a block device, and on a file system that shares blocks: where the host has both."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.images import importer
from daemon.images.extents import data_extents
from daemon.images.importer import clone_disk, import_image

MIB = 1 << 20
# Random, so that nothing but shared blocks keeps a copy from taking room.
DISK = os.urandom(8 * MIB)


def run_or_skip(*argv: str) -> str:
    if shutil.which(argv[0]) is None:
        pytest.skip(f"{argv[0]} is not installed")
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this host does not permit {' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout.strip()


@pytest.fixture
def block_device(tmp_path: Path) -> Iterator[Path]:
    """A loop device of DISK."""
    backing = tmp_path / "backing"
    backing.write_bytes(DISK)
    device = run_or_skip("losetup", "--find", "--show", str(backing))
    yield Path(device)
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.fixture
def sharing(tmp_path: Path) -> Iterator[Path]:
    """A directory whose file system has FICLONE."""
    volume, directory = tmp_path / "volume", tmp_path / "sharing"
    with volume.open("wb") as file:
        file.truncate(256 * MIB)
    directory.mkdir()
    run_or_skip("mkfs.btrfs", "-q", str(volume))
    run_or_skip("mount", "-o", "loop", str(volume), str(directory))
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def used_bytes(directory: Path) -> int:
    os.sync()
    info = os.statvfs(directory)
    return (info.f_blocks - info.f_bfree) * info.f_frsize


@pytest.mark.slow
def test_an_image_is_imported_from_a_block_device(block_device: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    record = import_image(block_device, store, is_disk=True)
    assert (record.size_bytes, record.sha256) == (len(DISK), hashlib.sha256(DISK).hexdigest())
    assert record.path.read_bytes() == DISK


@pytest.mark.slow
def test_a_disk_is_cloned_from_a_block_device(block_device: Path, tmp_path: Path) -> None:
    clone_disk(block_device, tmp_path / "disk.raw", 2 * len(DISK))
    assert (tmp_path / "disk.raw").read_bytes() == DISK + bytes(len(DISK))


@pytest.mark.slow
def test_an_import_and_a_clone_share_the_blocks_of_their_source(
    sharing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(*_: object, **__: object) -> str:
        raise AssertionError("the bytes were copied")

    monkeypatch.setattr(importer, "copy_hashed", copied)
    source, store = sharing / "source", sharing / "store"
    store.mkdir()
    source.write_bytes(DISK)
    before = used_bytes(sharing)
    record = import_image(source, store, is_disk=True)
    clone_disk(record.path, sharing / "disk.raw", len(DISK) + MIB)
    assert used_bytes(sharing) - before < len(DISK) // 2
    assert record.sha256 == hashlib.sha256(DISK).hexdigest()
    source.unlink()
    assert record.path.read_bytes() == DISK
    assert (sharing / "disk.raw").read_bytes() == DISK + bytes(MIB)


@pytest.mark.slow
def test_a_shared_image_keeps_its_holes(sharing: Path) -> None:
    store = sharing / "store"
    store.mkdir()
    with (sharing / "source").open("wb") as file:
        file.write(DISK[:MIB])
        file.truncate(64 * MIB)
    record = import_image(sharing / "source", store, is_disk=True)
    with record.path.open("rb") as kept:
        assert list(data_extents(kept.fileno(), 0, 64 * MIB)) == [(0, MIB)]
