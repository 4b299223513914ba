# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Kernels and images: found by name or id, kept in memory and in the database."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterator
from typing import Final, Generic, Literal, TypeVar

from api.errors import Conflict, Invalid, NotFound
from api.models.common import ObjectRef, Page
from api.models.resources import Image, Kernel
from api.ports import ListQuery

from ..images.elf import ElfKernel
from ..images.records import IMAGE_NAME, VMLINUX_NAME, load_kernel
from .dirs import Layout
from .launch import Boot
from .records import KernelRecord, VmRecord
from .store import NewEvent, Statement, Store

M = TypeVar("M", Kernel, Image)

_SELECT: Final = {"kernel": "SELECT doc FROM kernels", "image": "SELECT doc FROM images"}
_INSERT: Final = {
    "kernel": "INSERT INTO kernels (id, name, doc) VALUES (?, ?, ?)",
    "image": "INSERT INTO images (id, name, doc) VALUES (?, ?, ?)",
}
_DELETE: Final = {
    "kernel": "DELETE FROM kernels WHERE id = ?",
    "image": "DELETE FROM images WHERE id = ?",
}


class Shelf(Generic[M]):
    """The objects of one kind.

    Threads: the event loop's.
    """

    def __init__(self, kind: Literal["kernel", "image"], store: Store) -> None:
        self.kind = kind
        self._store = store
        self._by_id: dict[str, M] = {}
        self._by_name: dict[str, M] = {}
        self._reserved: set[str] = set()
        # Ids of those that a VM being made or changed is about to use, and of those on their way
        # out: between looking and committing other tasks run.
        self._held: Counter[str] = Counter()
        self._leaving: set[str] = set()

    def hold(self, item_id: str, field: str) -> None:
        """Keep an object from being deleted until drop().

        Raises:
            Invalid: it has gone since it was found.
        """
        if item_id not in self._by_id or item_id in self._leaving:
            raise Invalid(
                f"{self.kind}_not_found", f"the {self.kind} has just been deleted", field=field
            )
        self._held[item_id] += 1

    def drop(self, item_id: str) -> None:
        """End one hold()."""
        self._held[item_id] -= 1
        self._held += Counter()  # without those at zero

    def check_idle(self, item: M) -> None:
        """Refuse to delete what is held, or is being deleted.

        Raises:
            Conflict: it is held.
            NotFound: it is on its way out.
        """
        if item.id in self._leaving:
            raise NotFound(f"{self.kind}_not_found", f"no {self.kind} {item.name}")
        if self._held[item.id]:
            raise Conflict(
                "in_use", f"{self.kind} {item.name} is used by a VM that is being made or changed"
            )

    def add(self, item: M) -> None:
        """Put an object that is in the database into memory."""
        self._by_id[item.id] = item
        self._by_name[item.name] = item
        self._reserved.discard(item.name)

    def get(self, ref: str) -> M:
        """Return an object by id or name.

        Raises:
            NotFound: there is none.
        """
        item = self._by_id.get(ref) or self._by_name.get(ref)
        if item is None:
            raise NotFound(f"{self.kind}_not_found", f"no {self.kind} {ref}")
        return item

    def resolve(self, ref: str, field: str) -> M:
        """Return an object that a request names.

        Raises:
            Invalid: there is none; carries ``field``.
        """
        item = self._by_id.get(ref) or self._by_name.get(ref)
        if item is None or item.id in self._leaving:
            raise Invalid(
                f"{self.kind}_not_found", f"no {self.kind} {ref}; import it first", field=field
            )
        return item

    def names(self) -> dict[str, str]:
        """Return names by id."""
        return {item.id: item.name for item in self._by_id.values()}

    def uses_of(self, sha256: str) -> int:
        """Return how many objects stand on the same bytes."""
        return sum(item.sha256 == sha256 for item in self._by_id.values())

    def page(self, query: ListQuery) -> Page[M]:
        """Return objects in order of name."""
        start = query.cursor or ""
        found = [self._by_name[name] for name in sorted(self._by_name) if name > start]
        items = found[: query.limit]
        more = items[-1].name if len(found) > len(items) else None
        return Page[M](items=items, next_cursor=more)

    def reserve(self, name: str) -> None:
        """Keep a name for an import under way.

        Raises:
            Conflict: it is taken.
        """
        if name in self._by_name or name in self._reserved:
            raise Conflict("name_taken", f"the {self.kind} {name} exists already", field="name")
        self._reserved.add(name)

    def release(self, name: str) -> None:
        """Give a reserved name back."""
        self._reserved.discard(name)

    async def insert(self, item: M, doc: str, actor: str) -> None:
        """Commit a new object with its event.

        Raises:
            StoreFull: nothing has changed.
            Conflict: the name is taken.
        """
        statement = Statement(_INSERT[self.kind], (item.id, item.name, doc))
        event = NewEvent(f"{self.kind}.imported", self.ref(item), actor, {"sha256": item.sha256})
        try:
            await self._store.commit(statement, events=[event])
        except sqlite3.IntegrityError as err:
            raise Conflict("name_taken", f"the {self.kind} {item.name} exists already") from err
        self.add(item)

    async def remove(self, item: M, actor: str) -> None:
        """Commit that an object is no more.

        Raises:
            StoreFull: nothing has changed.
        """
        statement = Statement(_DELETE[self.kind], (item.id,))
        event = NewEvent(f"{self.kind}.deleted", self.ref(item), actor)
        self._leaving.add(item.id)
        try:
            await self._store.commit(statement, note_doomed(self.kind, item.sha256), events=[event])
        finally:
            self._leaving.discard(item.id)
        self._by_id.pop(item.id, None)
        self._by_name.pop(item.name, None)

    def ref(self, item: M) -> ObjectRef:
        """Return an object as events name it."""
        return ObjectRef(kind=self.kind, id=item.id, name=item.name)


def note_doomed(kind: str, sha256: str) -> Statement:
    """Note that hosteld itself has taken the last step but one: the bytes may go."""
    return Statement(
        "INSERT INTO meta (key, value) VALUES (?, '') ON CONFLICT (key) DO NOTHING",
        (f"doomed/{kind}/{sha256}",),
    )


class Library:
    """All kernels and images, and where their files lie.

    Threads: the event loop's.
    """

    def __init__(self, store: Store, layout: Layout) -> None:
        self._store = store
        self._layout = layout
        self.kernels: Shelf[Kernel] = Shelf("kernel", store)
        self.images: Shelf[Image] = Shelf("image", store)
        self._setup_headers: dict[str, str] = {}
        self._elfs: dict[str, ElfKernel] = {}

    async def load(self) -> None:
        """Read both from the database.

        Raises:
            StoreFull: it cannot be read.
        """
        for (doc,) in await self._store.fetch(_SELECT["kernel"]):
            record = KernelRecord.decode(doc)
            self.kernels.add(record.model)
            self._setup_headers[record.model.id] = record.setup_header
        for (doc,) in await self._store.fetch(_SELECT["image"]):
            self.images.add(Image.model_validate_json(doc))

    async def insert_kernel(self, record: KernelRecord, actor: str) -> None:
        """Commit a new kernel.

        Raises:
            StoreFull: nothing has changed.
            Conflict: the name is taken.
        """
        await self.kernels.insert(record.model, record.encode(), actor)
        self._setup_headers[record.model.id] = record.setup_header

    async def insert_image(self, image: Image, actor: str) -> None:
        """Commit a new image; raises as insert_kernel()."""
        await self.images.insert(image, image.model_dump_json(), actor)

    @contextlib.contextmanager
    def holding(self, record: VmRecord) -> Iterator[None]:
        """Keep all that a VM boots and is copied from, until the table holds the VM itself.

        Raises:
            Invalid: some of it has gone.
        """
        wanted: list[tuple[Shelf[Kernel] | Shelf[Image], str | None, str]] = [
            (self.kernels, record.kernel_id, "kernel"),
            (self.images, record.initrd_id, "initrd"),
            *((self.images, disk.image_id, "disks") for disk in record.disks),
        ]
        with contextlib.ExitStack() as stack:
            for shelf, item_id, field in wanted:
                if item_id is not None:
                    shelf.hold(item_id, field)
                    stack.callback(shelf.drop, item_id)
            yield

    async def doomed(self, kind: str) -> set[str]:
        """Return the sha256 of what a delete has left to be removed.

        Raises:
            StoreFull: the database cannot be read.
        """
        prefix = f"doomed/{kind}/"
        rows = await self._store.fetch("SELECT key FROM meta WHERE key GLOB ?", (prefix + "*",))
        return {str(key).removeprefix(prefix) for (key,) in rows}

    async def forget_doomed(self, kind: str, sha256: str) -> None:
        """Note that the bytes have gone, or are used again.

        Raises:
            StoreFull: they are looked at again at the next start.
        """
        key = f"doomed/{kind}/{sha256}"
        await self._store.commit(Statement("DELETE FROM meta WHERE key = ?", (key,)))

    def names(self) -> dict[str, str]:
        """Return names of kernels and images by id."""
        return self.kernels.names() | self.images.names()

    def setup_header(self, kernel_id: str) -> str:
        """Return the hex of a kernel's setup header, empty for an ELF kernel."""
        return self._setup_headers.get(kernel_id, "")

    def elf(self, kernel: Kernel) -> ElfKernel | None:
        """Return where a kernel's segments go; None when its files have been lost.

        Raises:
            StorageError: its record cannot be read.
        """
        if kernel.sha256 not in self._elfs:
            stored = load_kernel(self._layout.kernels, kernel.sha256)
            if stored is None:
                return None
            self._elfs[kernel.sha256] = stored.elf
        return self._elfs[kernel.sha256]

    def image_path(self, image: Image) -> str:
        """Return the file of an image."""
        return str(self._layout.images / image.sha256 / IMAGE_NAME)

    def boot(self, record: VmRecord) -> Boot:
        """Return what a VM boots.

        Raises:
            NotFound: a kernel or initrd is gone; deleting one in use is refused, so the database
                was edited.
        """
        kernel = self.kernels.get(record.kernel_id)
        initrd = None
        if record.initrd_id is not None:
            initrd = self._layout.images / self.images.get(record.initrd_id).sha256 / IMAGE_NAME
        return Boot(
            KernelRecord(kernel, self.setup_header(kernel.id)),
            self._layout.kernels / kernel.sha256 / VMLINUX_NAME,
            initrd,
        )
