# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""``hostel``: the command line client.

Exit codes: 0 done; 1 the daemon refused or failed; 2 wrong usage; 3 no daemon answers.
"""

from __future__ import annotations

from typing import Annotated

import typer

from . import artifacts, devices, host, operations
from .support import Where, group

app = group(
    "Run virtual machines on this host.",
    epilog="Exit codes: 0 done; 1 the daemon refused or failed; 2 wrong usage; 3 no daemon "
    "answers. The daemon is found by HOSTEL_URL (with HOSTEL_TOKEN), HOSTEL_SOCKET, the user's "
    "own socket, the system's socket, in this order.",
)
app.add_typer(devices.app, name="vm")
app.add_typer(artifacts.kernels, name="kernel")
app.add_typer(artifacts.images, name="image")
app.add_typer(operations.app, name="operation")
app.command()(host.events)
app.command()(host.host)
app.command()(host.doctor)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from ..version import hostel_version

        print(f"hostel {hostel_version()}")
        raise typer.Exit


@app.callback()
def place(
    context: typer.Context,
    socket: Annotated[
        str | None, typer.Option(metavar="PATH", help="The daemon's Unix socket.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The daemon's URL; its token is in HOSTEL_TOKEN."),
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Run virtual machines on this host."""
    context.obj = Where(socket=socket, url=url)


def main() -> None:
    """Run the program."""
    app()


if __name__ == "__main__":
    main()
