# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""``hostel kernel`` and ``hostel image``: what VMs boot from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, cast

import typer

from .support import EXIT_USAGE, Json, NoWait, fail, group, print_json, session, settle

if TYPE_CHECKING:
    from ..models.resources import Image, Kernel, Operation

kernels = group("Import, see and delete kernels.")
images = group("Import, see and delete disk images and initrds.")

UPLOAD_PIECE_BYTES: Final = 1 << 20

Name = Annotated[str, typer.Argument(metavar="NAME", help="1 to 63 of a-z, 0-9, '-', '.'.")]
Source = Annotated[Path, typer.Argument(metavar="FILE", help="A path on the daemon's host.")]
Ref = Annotated[str, typer.Argument(metavar="NAME", help="Name or id.")]
Digest = Annotated[str | None, typer.Option(help="Refuse the file if its sha256 differs.")]
Upload = Annotated[
    bool, typer.Option("--upload", help="FILE is on this side: send its bytes to the daemon.")
]


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(UPLOAD_PIECE_BYTES):
            yield piece


def _readable(path: Path) -> Path:
    try:
        with path.open("rb"):
            return path
    except OSError as err:
        fail(f"{path}: {err.strerror}; name a file that you may read", EXIT_USAGE)


def _show(found: Kernel | Image | Operation, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    from ..models.resources import Operation
    from . import tables

    if isinstance(found, Operation):
        tables.show_operation(found)
    else:
        tables.show_artifact(found)


@kernels.command("import")
def import_kernel(
    context: typer.Context,
    name: Name,
    file: Source,
    sha256: Digest = None,
    upload: Upload = False,
    no_wait: NoWait = False,
    as_json: Json = False,
) -> None:
    """Import a bzImage or an ELF kernel."""
    with session(context) as client:
        from ..models.resources import Kernel, KernelImport

        wait_s = 0 if no_wait else 30
        if upload:
            pieces = _pieces(_readable(file))
            outcome = client.upload_kernel(name, pieces, sha256=sha256, wait_s=wait_s)
        else:
            wanted = KernelImport(name=name, path=str(file.absolute()), sha256=sha256)
            outcome = client.import_kernel(wanted, wait_s=wait_s)
        _show(settle(client, outcome, Kernel, no_wait=no_wait), as_json)


@kernels.command("list")
def list_kernels(context: typer.Context, as_json: Json = False) -> None:
    """List kernels in order of name."""
    with session(context) as client:
        found = client.list_kernels()
        if as_json:
            print_json(found)
            return
        from . import tables

        tables.show_kernels(found)


@kernels.command("show")
def show_kernel(context: typer.Context, kernel: Ref, as_json: Json = False) -> None:
    """Show a kernel."""
    with session(context) as client:
        _show(client.get_kernel(kernel), as_json)


@kernels.command("delete")
def delete_kernel(context: typer.Context, kernel: Ref, as_json: Json = False) -> None:
    """Delete a kernel that no VM uses."""
    with session(context) as client:
        client.delete_kernel(kernel)
        print(json.dumps({"deleted": kernel}) if as_json else f"{kernel} is deleted")


@images.command("import")
def import_image(
    context: typer.Context,
    name: Name,
    file: Source,
    kind: Annotated[str, typer.Option(help="disk or initrd.")] = "disk",
    sha256: Digest = None,
    upload: Upload = False,
    no_wait: NoWait = False,
    as_json: Json = False,
) -> None:
    """Import a raw disk image or an initrd."""
    if kind not in {"disk", "initrd"}:
        fail(f"kind {kind!r}: must be disk or initrd", EXIT_USAGE)
    chosen = cast(Literal["disk", "initrd"], kind)
    with session(context) as client:
        from ..models.resources import Image, ImageImport

        wait_s = 0 if no_wait else 30
        if upload:
            pieces = _pieces(_readable(file))
            outcome = client.upload_image(name, pieces, kind=chosen, sha256=sha256, wait_s=wait_s)
        else:
            path = str(file.absolute())
            wanted = ImageImport(name=name, kind=chosen, path=path, sha256=sha256)
            outcome = client.import_image(wanted, wait_s=wait_s)
        _show(settle(client, outcome, Image, no_wait=no_wait), as_json)


@images.command("list")
def list_images(context: typer.Context, as_json: Json = False) -> None:
    """List images in order of name."""
    with session(context) as client:
        found = client.list_images()
        if as_json:
            print_json(found)
            return
        from . import tables

        tables.show_images(found)


@images.command("show")
def show_image(context: typer.Context, image: Ref, as_json: Json = False) -> None:
    """Show an image."""
    with session(context) as client:
        _show(client.get_image(image), as_json)


@images.command("delete")
def delete_image(context: typer.Context, image: Ref, as_json: Json = False) -> None:
    """Delete an image that no VM uses."""
    with session(context) as client:
        client.delete_image(image)
        print(json.dumps({"deleted": image}) if as_json else f"{image} is deleted")
