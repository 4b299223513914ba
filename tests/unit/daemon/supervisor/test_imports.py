# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Kernels and images: imported, uploaded, cancelled, deleted."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3
from collections.abc import AsyncIterator

import pytest

from api.errors import Conflict, Invalid, NoSpace, NotFound
from api.models.resources import Image, ImageImport, Kernel, KernelImport, Operation
from api.ports import Call
from daemon.images import importer
from daemon.images.staging import UNCLAIMED_NAME, is_unclaimed
from daemon.supervisor.service import Supervisor
from daemon.supervisor.store import StoreFull
from tests.support import tiny_kernel
from tests.support.supervisor import CALL, Harness

ELF = tiny_kernel.elf(tiny_kernel.HALT)


async def body(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def stored(harness: Harness) -> list[str]:
    return sorted(
        path.name
        for directory in (harness.layout.kernels, harness.layout.images)
        for path in directory.iterdir()
    )


def test_an_uploaded_kernel_is_an_imported_kernel(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        sha256 = hashlib.sha256(ELF).hexdigest()
        kernel = await supervisor.upload_kernel("k", sha256, body(ELF[:50], b"", ELF[50:]), CALL)
        assert isinstance(kernel, Kernel)
        assert (kernel.format, kernel.size_bytes, kernel.sha256) == ("elf", len(ELF), sha256)
        assert await supervisor.get_kernel("k") == await supervisor.get_kernel(kernel.id)
        assert (await harness.start("a")).kernel == "k"

    harness.run(scenario)


def test_a_large_upload_arrives_whole(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        pieces = [bytes([number]) * 65_536 for number in range(40)]
        image = await supervisor.upload_image("i", "disk", None, body(*pieces), CALL)
        assert isinstance(image, Image)
        assert image.sha256 == hashlib.sha256(b"".join(pieces)).hexdigest()

    harness.run(scenario)


def test_a_wrong_digest_is_refused_and_leaves_nothing(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        with pytest.raises(Invalid) as caught:
            await supervisor.upload_kernel("k", "0" * 64, body(ELF), CALL)
        assert caught.value.field == "sha256"
        assert stored(harness) == []
        await harness.kernel("k")

    harness.run(scenario)


def test_an_upload_that_breaks_off_leaves_nothing(harness: Harness) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield bytes(2 << 20)
        raise ConnectionResetError

    async def scenario(supervisor: Supervisor) -> None:
        with pytest.raises(Exception, match=r"import image i"):
            await supervisor.upload_image("i", "disk", None, broken(), CALL)
        assert stored(harness) == []
        await harness.image("i")

    harness.run(scenario)


@pytest.mark.parametrize("content", [b"", b"not a kernel", b"\x7fELF" + bytes(100), bytes(10_000)])
def test_what_is_no_kernel_is_refused(harness: Harness, content: bytes) -> None:
    path = harness.path / "kernel"
    path.write_bytes(content)

    async def scenario(supervisor: Supervisor) -> None:
        with pytest.raises(Invalid) as caught:
            await supervisor.import_kernel(KernelImport(name="k", path=str(path)), CALL)
        assert caught.value.field == "path"
        assert stored(harness) == []

    harness.run(scenario)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_source_that_cannot_be_read_is_refused(harness: Harness, name: str) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        wanted = ImageImport(name="i", path=str(harness.path / name))
        with pytest.raises(Invalid) as caught:
            await supervisor.import_image(wanted, CALL)
        assert caught.value.field == "path"

    harness.run(scenario)


def test_the_same_bytes_are_kept_once_and_as_long_as_a_name_needs_them(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.kernel("one")
        await harness.kernel("two")
        assert len(stored(harness)) == 1
        await supervisor.delete_kernel("one", CALL)
        assert len(stored(harness)) == 1
        await supervisor.delete_kernel("two", CALL)
        assert stored(harness) == []
        with pytest.raises(NotFound):
            await supervisor.get_kernel("one")

    harness.run(scenario)


def test_a_kernel_in_use_is_not_deleted(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.create("a")
        with pytest.raises(Conflict, match="kernel k is used by VM a"):
            await supervisor.delete_kernel("k", CALL)
        await supervisor.delete_vm("a", False, CALL)
        await supervisor.delete_kernel("k", CALL)

    harness.run(scenario)


def test_a_name_is_taken_once(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.kernel("k")
        with pytest.raises(Conflict, match="exists already"):
            await harness.kernel("k")

    harness.run(scenario)


def test_an_import_can_be_cancelled(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    from daemon.images.errors import Cancelled

    def slow(*_: object, cancelled: object, **__: object) -> None:
        assert callable(cancelled)
        while not cancelled():
            pass
        raise Cancelled

    async def scenario(supervisor: Supervisor) -> None:
        monkeypatch.setattr("daemon.supervisor.imports.importer.import_kernel", slow)
        operation = await supervisor.import_kernel(
            KernelImport(name="k", path="/x"), Call("test", wait_s=0.02)
        )
        assert isinstance(operation, Operation)
        assert operation.may_cancel
        operation = await supervisor.cancel_operation(operation.id, CALL)
        assert operation.state.value == "cancelled"
        with pytest.raises(Conflict, match="has ended"):
            await supervisor.cancel_operation(operation.id, CALL)
        monkeypatch.undo()
        await harness.kernel("k")

    harness.run(scenario)


def test_a_stopping_daemon_cancels_imports(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    from daemon.images.errors import Cancelled

    def slow(*_: object, cancelled: object, **__: object) -> None:
        assert callable(cancelled)
        while not cancelled():
            pass
        raise Cancelled

    async def scenario(supervisor: Supervisor) -> None:
        monkeypatch.setattr("daemon.supervisor.imports.importer.import_kernel", slow)
        await supervisor.import_kernel(KernelImport(name="k", path="/x"), Call("test", wait_s=0.02))

    harness.run(scenario)


def test_at_start_only_what_a_delete_has_left_is_removed(harness: Harness) -> None:
    left, foreign = "e" * 64, "f" * 64

    async def first(_: Supervisor) -> None:
        await harness.kernel()

    async def second(supervisor: Supervisor) -> None:
        assert (await supervisor.get_kernel("k")).name == "k"

    harness.run(first)
    for name in (left, foreign, "notes", ".staging-dead"):
        (harness.layout.images / name).mkdir()
    with contextlib.closing(sqlite3.connect(harness.layout.database)) as db, db:
        db.execute("INSERT INTO meta (key, value) VALUES (?, '')", (f"doomed/image/{left}",))
    harness.run(second)
    assert sorted(path.name for path in harness.layout.images.iterdir()) == [foreign, "notes"]


def test_what_a_killed_import_put_in_place_is_removed_at_start(harness: Harness) -> None:
    async def nothing(_: Supervisor) -> None:
        pass

    harness.run(nothing)
    source = harness.path / "source"
    source.write_bytes(bytes(4096))
    importer.import_image(source, harness.layout.images, is_disk=True)
    kernel = tiny_kernel.write_elf(harness.path / "k.elf", tiny_kernel.HALT)
    importer.import_kernel(kernel, harness.layout.kernels)
    assert len(stored(harness)) == 2
    harness.run(nothing)
    assert stored(harness) == []


def test_an_import_that_was_kept_and_not_claimed_stays(harness: Harness) -> None:
    async def first(_: Supervisor) -> None:
        await harness.kernel()

    async def second(supervisor: Supervisor) -> None:
        assert (await supervisor.get_kernel("k")).name == "k"

    harness.run(first)
    (sha256,) = stored(harness)
    (harness.layout.kernels / sha256 / UNCLAIMED_NAME).touch()
    harness.run(second)
    assert stored(harness) == [sha256]
    assert not is_unclaimed(harness.layout.kernels, sha256)


def test_an_import_that_cannot_be_kept_leaves_nothing(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        async def full(*_: object) -> None:
            raise StoreFull("no space")

        monkeypatch.setattr(supervisor._library, "insert_image", full)
        with pytest.raises(NoSpace):
            await harness.image("i")
        assert stored(harness) == []

    harness.run(scenario)


def test_an_empty_database_takes_no_kernel_with_it(harness: Harness) -> None:
    async def first(_: Supervisor) -> None:
        await harness.kernel()

    async def nothing(_: Supervisor) -> None:
        pass

    harness.run(first)
    for path in harness.layout.state.glob("hostel.db*"):
        path.unlink()
    harness.run(nothing)
    assert len(list(harness.layout.kernels.iterdir())) == 1


def test_a_kernel_that_a_vm_is_about_to_use_is_not_deleted(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.kernel()
        for number in range(20):
            name = f"a{number}"
            created, _ = await asyncio.gather(
                harness.create(name), supervisor.delete_kernel("k", CALL), return_exceptions=True
            )
            kernels = {kernel.name for kernel in (await harness.kernels()).items}
            if isinstance(created, BaseException):
                assert isinstance(created, Invalid)
                assert "k" not in kernels
                await harness.kernel()
            else:
                assert "k" in kernels
                await supervisor.delete_vm(name, False, CALL)

    harness.run(scenario)


def test_what_is_held_cannot_be_deleted_and_what_is_leaving_cannot_be_held(
    harness: Harness,
) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.kernel()
        shelf = supervisor._library.kernels
        kernel = shelf.get("k")
        shelf.hold(kernel.id, "kernel")
        with pytest.raises(Conflict, match="being made"):
            await supervisor.delete_kernel("k", CALL)
        shelf.drop(kernel.id)
        deleting = asyncio.create_task(supervisor.delete_kernel("k", CALL))
        while not shelf._leaving:  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0)
        with pytest.raises(Invalid):
            shelf.hold(kernel.id, "kernel")
        with pytest.raises(Invalid):
            shelf.resolve("k", "kernel")
        await deleting

    harness.run(scenario)


def test_imports_at_once_and_a_delete_between_lose_nothing(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.kernel("first")
        paths = [
            tiny_kernel.write_elf(harness.path / f"{number}.elf", tiny_kernel.HALT)
            for number in range(8)
        ]
        await asyncio.gather(
            *(
                supervisor.import_kernel(KernelImport(name=path.stem, path=str(path)), CALL)
                for path in paths
            ),
            supervisor.delete_kernel("first", CALL),
        )

    harness.run(scenario)
    (sha256,) = stored(harness)
    assert (harness.layout.kernels / sha256 / "vmlinux").exists()
