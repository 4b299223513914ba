# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Imports, uploads and clones: what is kept is whole and checked, what fails leaves nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import struct
from pathlib import Path

import pytest

from daemon.images import importer
from daemon.images.errors import (
    Cancelled,
    DigestMismatch,
    FitError,
    KernelFormatError,
    SourceError,
    StorageError,
)
from daemon.images.importer import (
    ImageUpload,
    KernelUpload,
    clone_disk,
    import_image,
    import_kernel,
)
from daemon.images.records import load_image, load_kernel
from daemon.images.staging import claim, is_unclaimed, remove_stored, sweep_staging
from tests.support.kernels import BANNER, ENTRY, MIB, PACKERS, bzimage, elf, pvh_note

KERNEL = elf(notes=pvh_note())
BZIMAGE = bzimage(PACKERS["xz"](KERNEL))
DISK = os.urandom(200_000)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    path.mkdir()
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def names(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir())


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


# kernels


def test_a_bzimage_is_kept_as_it_came_and_unpacked(store: Path, source: Path) -> None:
    source.write_bytes(BZIMAGE)
    record = import_kernel(source, store)
    assert (record.format, record.compression, record.entry) == ("bzImage", "xz", "linux64")
    assert (record.sha256, record.size_bytes) == (sha256(BZIMAGE), len(BZIMAGE))
    assert record.banner == BANNER
    assert record.elf.linux64_gpa == ENTRY
    assert bytes.fromhex(record.setup_header)[0x202 - 0x1F1 :].startswith(b"HdrS")
    assert record.path.read_bytes() == KERNEL
    assert names(store) == [record.sha256]
    assert is_unclaimed(store, record.sha256)
    claim(store, record.sha256)
    assert names(store / record.sha256) == ["meta.json", "original", "vmlinux"]


def test_an_elf_kernel_is_kept_once(store: Path, source: Path) -> None:
    source.write_bytes(KERNEL)
    record = import_kernel(source, store)
    assert (record.format, record.compression, record.setup_header) == ("elf", None, "")
    assert record.path.samefile(store / record.sha256 / "original")


def test_a_linux_elf_is_entered_at_its_64_bit_entry(store: Path, source: Path) -> None:
    source.write_bytes(KERNEL)
    assert import_kernel(source, store).entry == "linux64"


def test_another_elf_with_the_pvh_note_is_entered_by_it(store: Path, source: Path) -> None:
    source.write_bytes(elf(notes=pvh_note(), body=b"\xf4" * 64))
    assert import_kernel(source, store).entry == "pvh"


def test_an_elf_without_note_and_banner_is_entered_in_long_mode(store: Path, source: Path) -> None:
    source.write_bytes(elf(body=b"\xf4" * 64))
    assert import_kernel(source, store).entry == "linux64"


def test_zeros_of_an_unpacked_kernel_become_holes(store: Path, source: Path) -> None:
    kernel = elf() + bytes(4 * MIB) + b"end"
    source.write_bytes(bzimage(PACKERS["gzip"](kernel)))
    record = import_kernel(source, store)
    assert record.path.stat().st_size == len(kernel)
    assert allocated(record.path) < MIB


def test_the_record_comes_back_from_the_store(store: Path, source: Path) -> None:
    source.write_bytes(BZIMAGE)
    record = import_kernel(source, store)
    assert load_kernel(store, record.sha256) == record


def test_the_same_bytes_are_not_unpacked_again(
    store: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.write_bytes(BZIMAGE)
    first = import_kernel(source, store)
    monkeypatch.delattr(importer, "bzimage")
    assert import_kernel(source, store) == first
    assert names(store) == [first.sha256]


def test_a_kernel_that_another_import_placed_meanwhile_is_used(
    store: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.write_bytes(BZIMAGE)
    first = import_kernel(source, store)
    monkeypatch.setattr(importer, "load_kernel", lambda *_: None)
    assert import_kernel(source, store) == first
    assert names(store) == [first.sha256]


def test_an_open_descriptor_can_be_imported(store: Path, source: Path) -> None:
    source.write_bytes(BZIMAGE)
    with source.open("rb") as file:
        assert import_kernel(file.fileno(), store).sha256 == sha256(BZIMAGE)
        assert not file.closed


def test_imported_files_cannot_be_written(store: Path, source: Path) -> None:
    source.write_bytes(BZIMAGE)
    record = import_kernel(source, store)
    modes = {path.stat().st_mode & 0o777 for path in record.path.parent.iterdir()}
    assert modes == {0o400}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (BZIMAGE[: len(BZIMAGE) - 3000], "truncated"),
        (bzimage(struct.pack("<I", 0x184C2102) + bytes(64)), "payload"),
        (elf(machine=183), "ARM64"),
        (b"\x1f\x8b\x08" + bytes(2000), "a gzip file; unpack it"),
        (b"MZ" + bytes(54) + b"ARM\x64" + bytes(2000), "a kernel for ARM64"),
        (b"MZ" + bytes(2000), "unified kernel image"),
        (b"070701" + bytes(2000), "a cpio archive"),
        (b"hello", "starts with 68 65 6c 6c"),
    ],
)
def test_what_is_no_kernel_is_refused_and_nothing_is_left(
    store: Path, source: Path, data: bytes, message: str
) -> None:
    source.write_bytes(data)
    with pytest.raises(KernelFormatError, match=message):
        import_kernel(source, store)
    assert names(store) == []


def test_a_kernel_file_that_is_too_large_is_refused_unread(store: Path, source: Path) -> None:
    source.touch()
    os.truncate(source, importer.MAX_KERNEL_FILE_BYTES + 1)
    with pytest.raises(SourceError, match="at most 536870912 bytes"):
        import_kernel(source, store)
    assert names(store) == []


def test_progress_covers_the_copy_and_the_unpacking(store: Path, source: Path) -> None:
    source.write_bytes(BZIMAGE)
    seen: list[tuple[int, int | None]] = []
    import_kernel(source, store, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (len(BZIMAGE), len(BZIMAGE))
    assert seen[-1][0] == seen[-1][1]


def test_a_damaged_record_says_what_to_do(store: Path, source: Path) -> None:
    source.write_bytes(BZIMAGE)
    meta = import_kernel(source, store).path.with_name("meta.json")
    meta.chmod(0o600)
    meta.write_text("{}")
    with pytest.raises(StorageError, match="delete the kernel and import it again"):
        load_kernel(store, sha256(BZIMAGE))


# images


def test_an_image_is_kept_under_its_digest(store: Path, source: Path) -> None:
    source.write_bytes(DISK)
    record = import_image(source, store, is_disk=True)
    assert (record.sha256, record.size_bytes) == (sha256(DISK), len(DISK))
    assert record.path.read_bytes() == DISK
    assert load_image(store, record.sha256) == record


def test_a_sparse_image_stays_sparse_and_its_holes_count_as_zeros(
    store: Path, source: Path
) -> None:
    with source.open("wb") as file:
        file.truncate(3 * MIB)
        file.seek(5 * MIB)
        file.write(b"data")
        file.truncate(9 * MIB)
    record = import_image(source, store, is_disk=True)
    assert record.sha256 == sha256(source.read_bytes())
    assert record.path.read_bytes() == source.read_bytes()
    assert allocated(record.path) <= 128 * 1024


def test_written_zeros_become_holes(store: Path, source: Path) -> None:
    source.write_bytes(b"x" + bytes(4 * MIB))
    record = import_image(source, store, is_disk=True)
    assert record.path.stat().st_size == 4 * MIB + 1
    assert allocated(record.path) <= 128 * 1024


def test_the_same_image_twice_is_kept_once(store: Path, source: Path) -> None:
    source.write_bytes(DISK)
    first = import_image(source, store, is_disk=True)
    assert import_image(source, store, is_disk=False) == first
    assert names(store) == [first.sha256]


def test_where_blocks_can_be_shared_what_is_kept_is_hashed(
    store: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def share(source_fd: int, dest_fd: int) -> bool:
        os.write(dest_fd, os.pread(source_fd, 1 << 20, 0))
        return True

    monkeypatch.setattr(importer, "reflink", share)
    source.write_bytes(DISK)
    record = import_image(source, store, is_disk=True)
    assert record.sha256 == sha256(DISK)
    assert record.path.read_bytes() == DISK


@pytest.mark.parametrize(
    ("head", "name"), [(b"QFI\xfb", "qcow2"), (b"KDMV", "vmdk"), (b"vhdxfile", "vhdx")]
)
def test_a_foreign_disk_format_is_refused_with_the_way_out(
    store: Path, source: Path, head: bytes, name: str
) -> None:
    source.write_bytes(head + bytes(2000))
    with pytest.raises(SourceError, match=f"qemu-img convert -f {name} -O raw"):
        import_image(source, store, is_disk=True)
    assert names(store) == []


def test_a_wrong_digest_is_refused(store: Path, source: Path) -> None:
    source.write_bytes(DISK)
    with pytest.raises(DigestMismatch) as caught:
        import_image(source, store, is_disk=True, expected_sha256="0" * 64)
    assert caught.value.field == "sha256"
    assert sha256(DISK) in caught.value.detail
    assert names(store) == []


def test_the_right_digest_is_accepted(store: Path, source: Path) -> None:
    source.write_bytes(DISK)
    import_image(source, store, is_disk=True, expected_sha256=sha256(DISK))
    assert names(store) == [sha256(DISK)]


def test_an_import_stops_when_cancelled(store: Path, source: Path) -> None:
    source.write_bytes(DISK)
    with pytest.raises(Cancelled):
        import_image(source, store, is_disk=True, cancelled=lambda: True)
    assert names(store) == []


# sources


def test_a_missing_source_is_named(store: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        import_image(tmp_path / "nothing", store, is_disk=True)
    assert (caught.value.code, caught.value.field) == ("source_missing", "path")
    assert str(tmp_path / "nothing") in caught.value.detail


def test_a_path_through_a_file_is_missing_too(store: Path, source: Path) -> None:
    source.touch()
    with pytest.raises(SourceError) as caught:
        import_image(source / "below", store, is_disk=True)
    assert caught.value.code == "source_missing"


def test_a_directory_is_no_source(store: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is a directory, must be a regular file or a block"):
        import_image(tmp_path, store, is_disk=True)


def test_a_named_pipe_is_refused_without_waiting(store: Path, source: Path) -> None:
    os.mkfifo(source)
    with pytest.raises(SourceError, match="is a named pipe"):
        import_image(source, store, is_disk=True)


def test_a_socket_is_no_source(store: Path, source: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source))
        with pytest.raises(SourceError, match="is a socket"):
            import_image(source, store, is_disk=True)


def test_an_empty_file_is_no_source(store: Path, source: Path) -> None:
    source.touch()
    with pytest.raises(SourceError) as caught:
        import_image(source, store, is_disk=True)
    assert caught.value.code == "source_empty"


def test_a_descriptor_of_a_pipe_is_refused(store: Path) -> None:
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd), os.fdopen(write_fd), pytest.raises(SourceError, match="named pipe"):
        import_image(read_fd, store, is_disk=True)


def test_a_source_that_grows_while_it_is_read_is_refused(store: Path, source: Path) -> None:
    source.write_bytes(DISK)

    def append(_done: int, _total: int | None) -> None:
        with source.open("ab") as file:
            file.write(b"more")

    with pytest.raises(SourceError) as caught:
        import_image(source, store, is_disk=True, progress=append)
    assert caught.value.code == "source_changed"
    assert names(store) == []


def test_a_source_that_shrinks_while_it_is_read_is_refused(store: Path, source: Path) -> None:
    source.write_bytes(os.urandom(3 * MIB))
    with pytest.raises(SourceError) as caught:
        import_image(source, store, is_disk=True, progress=lambda *_: os.truncate(source, MIB))
    assert caught.value.code == "source_changed"
    assert names(store) == []


# the store


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "no_space"),
        (errno.EDQUOT, "no_space"),
        (errno.EROFS, "storage_refused"),
        (errno.EIO, "storage_failed"),
    ],
)
def test_a_store_that_takes_no_more_is_a_storage_error(
    store: Path, source: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    source.write_bytes(DISK)
    monkeypatch.setattr("daemon.images.copying.os.pwrite", fail)
    with pytest.raises(StorageError) as caught:
        import_image(source, store, is_disk=True)
    assert (caught.value.code, caught.value.errno) == (code, number)
    assert str(store) in caught.value.detail
    assert names(store) == []


def test_a_store_that_is_not_there_is_a_storage_error(tmp_path: Path, source: Path) -> None:
    source.write_bytes(DISK)
    with pytest.raises(StorageError):
        import_image(source, tmp_path / "nowhere", is_disk=True)


def test_the_sweep_removes_what_a_killed_daemon_left(store: Path, source: Path) -> None:
    source.write_bytes(DISK)
    kept = import_image(source, store, is_disk=True)
    ImageUpload(store, is_disk=True).write(DISK)
    assert len(names(store)) == 2
    assert sweep_staging(store) == 1
    assert names(store) == [kept.sha256]


def test_a_removed_object_is_gone(store: Path, source: Path) -> None:
    source.write_bytes(BZIMAGE)
    record = import_kernel(source, store)
    remove_stored(store, record.sha256)
    assert names(store) == []
    assert load_kernel(store, record.sha256) is None


def test_removing_what_is_not_there_changes_nothing(store: Path) -> None:
    remove_stored(store, "0" * 64)
    assert names(store) == []


# uploads


def test_an_uploaded_kernel_equals_an_imported_one(store: Path, source: Path) -> None:
    source.write_bytes(BZIMAGE)
    sink = KernelUpload(store, expected_sha256=sha256(BZIMAGE))
    sink.write(BZIMAGE[:1000])
    sink.write(b"")
    sink.write(BZIMAGE[1000:])
    assert sink.finish() == import_kernel(source, store)


def test_an_uploaded_image_of_odd_pieces_is_sparse_and_exact(store: Path) -> None:
    data = b"a" * 70_001 + bytes(3 * MIB) + b"b" + bytes(2 * MIB)
    sink = ImageUpload(store, is_disk=True)
    for at in range(0, len(data), 65_537):
        sink.write(data[at : at + 65_537])
    record = sink.finish()
    assert sink.size_bytes == len(data)
    assert record.path.read_bytes() == data
    assert allocated(record.path) < MIB


def test_an_aborted_upload_leaves_nothing(store: Path) -> None:
    sink = ImageUpload(store, is_disk=False)
    sink.write(b"part")
    sink.abort()
    sink.abort()
    assert names(store) == []


def test_an_upload_with_a_wrong_digest_leaves_nothing(store: Path) -> None:
    sink = ImageUpload(store, is_disk=False, expected_sha256="0" * 64)
    sink.write(b"other")
    with pytest.raises(DigestMismatch):
        sink.finish()
    assert names(store) == []


def test_an_empty_upload_is_refused(store: Path) -> None:
    with pytest.raises(SourceError, match="the body is empty"):
        KernelUpload(store).finish()
    assert names(store) == []


def test_an_uploaded_kernel_that_is_none_leaves_nothing(store: Path) -> None:
    sink = KernelUpload(store)
    sink.write(b"hello")
    with pytest.raises(KernelFormatError):
        sink.finish()
    assert names(store) == []


def test_a_kernel_upload_is_stopped_at_the_limit(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importer, "MAX_KERNEL_FILE_BYTES", 100)
    sink = KernelUpload(store)
    sink.write(bytes(100))
    with pytest.raises(SourceError, match="at most 100 bytes"):
        sink.write(b"x")
    sink.abort()


def test_a_foreign_disk_is_refused_at_its_first_piece(store: Path) -> None:
    sink = ImageUpload(store, is_disk=True)
    with pytest.raises(SourceError, match="qcow2"):
        sink.write(b"QFI\xfb" + bytes(100))
    sink.abort()


# clones


def test_a_clone_has_the_images_bytes_and_the_wanted_size(tmp_path: Path) -> None:
    image, dest = tmp_path / "image", tmp_path / "vm" / "root.raw"
    dest.parent.mkdir()
    image.write_bytes(DISK)
    clone_disk(image, dest, 5 * MIB)
    assert dest.read_bytes() == DISK + bytes(5 * MIB - len(DISK))
    assert dest.stat().st_mode & 0o777 == 0o600
    assert names(dest.parent) == ["root.raw"]


def test_a_clone_of_a_sparse_image_is_sparse(tmp_path: Path) -> None:
    image, dest = tmp_path / "image", tmp_path / "root.raw"
    image.write_bytes(b"x")
    os.truncate(image, 64 * MIB)
    clone_disk(image, dest, 64 * MIB)
    assert dest.stat().st_size == 64 * MIB
    assert allocated(dest) <= 8192


def test_a_clone_is_made_by_hand_where_the_kernel_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "other file system")

    monkeypatch.setattr("daemon.images.copying.os.copy_file_range", refuse)
    image, dest = tmp_path / "image", tmp_path / "root.raw"
    image.write_bytes(DISK)
    clone_disk(image, dest, len(DISK) + 1)
    assert dest.read_bytes()[: len(DISK)] == DISK
    assert dest.stat().st_size == 200_192  # whole sectors


def test_a_clone_smaller_than_its_image_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(DISK)
    with pytest.raises(FitError) as caught:
        clone_disk(image, tmp_path / "root.raw", len(DISK) - 1)
    assert (caught.value.code, caught.value.field) == ("disk_too_small", "size_mib")
    assert names(tmp_path) == ["image"]


def test_a_clone_never_replaces_a_disk(tmp_path: Path) -> None:
    image, dest = tmp_path / "image", tmp_path / "root.raw"
    image.write_bytes(DISK)
    dest.write_bytes(b"precious")
    with pytest.raises(StorageError):
        clone_disk(image, dest, MIB)
    assert dest.read_bytes() == b"precious"
    assert names(tmp_path) == ["image", "root.raw"]


def test_a_cancelled_clone_leaves_nothing(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(DISK)
    with pytest.raises(Cancelled):
        clone_disk(image, tmp_path / "root.raw", MIB, cancelled=lambda: True)
    assert names(tmp_path) == ["image"]


def test_staging_that_vanished_is_no_error_on_abort(store: Path) -> None:
    sink = ImageUpload(store, is_disk=False)
    shutil.rmtree(store)
    sink.abort()
