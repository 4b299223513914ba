# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""``hostel operation``: work that takes longer than a request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .support import Json, group, print_json, session

if TYPE_CHECKING:
    from ..models.resources import Operation

app = group("See and cancel work that takes long.")

Id = Annotated[str, typer.Argument(metavar="OPERATION", help="Its id.")]


@app.command("list")
def list_operations(context: typer.Context, as_json: Json = False) -> None:
    """List operations, the newest first."""
    with session(context) as client:
        found = client.list_operations()
        if as_json:
            print_json(found)
            return
        from . import tables

        tables.show_operations(found)


@app.command()
def show(
    context: typer.Context,
    operation: Id,
    wait: Annotated[float, typer.Option(min=0, max=60, help="Seconds to wait for its end.")] = 0,
    as_json: Json = False,
) -> None:
    """Show an operation."""
    with session(context) as client:
        _print(client.get_operation(operation, wait_s=wait), as_json=as_json)


@app.command()
def cancel(context: typer.Context, operation: Id, as_json: Json = False) -> None:
    """Cancel an operation; what it made is removed."""
    with session(context) as client:
        _print(client.cancel_operation(operation), as_json=as_json)


def _print(operation: Operation, *, as_json: bool) -> None:
    if as_json:
        print_json(operation)
        return
    from . import tables

    tables.show_operation(operation)
