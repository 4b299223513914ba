# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What every command shares: the client, errors with exit codes, JSON or tables.

Imports the standard library and typer alone, so that ``hostel --help`` and completion are quick;
the client comes with the first call.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, NoReturn, TypeVar

import typer

from ..endpoint import Endpoint, find_endpoint

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ..client import HostelClient
    from ..errors import ApiError
    from ..models.resources import Operation

    M = TypeVar("M", bound=BaseModel)

EXIT_API_ERROR: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
NoWait = Annotated[
    bool, typer.Option("--no-wait", help="Do not wait for the end: print the operation.")
]


@dataclass(frozen=True, slots=True)
class Where:
    """What the options before the command say of the daemon's place."""

    socket: str | None = None
    url: str | None = None


def group(text: str, epilog: str | None = None) -> typer.Typer:
    """Return a group of commands; its help is plain text, since rich takes 0.2 s to load."""
    return typer.Typer(
        help=text,
        epilog=epilog,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


def endpoint_of(context: typer.Context) -> Endpoint:
    """Return the daemon that options and environment name."""
    where = context.find_object(Where) or Where()
    return find_endpoint(os.environ, os.geteuid(), socket=where.socket, url=where.url)


@contextmanager
def session(context: typer.Context) -> Iterator[HostelClient]:
    """Give a client; what goes wrong becomes one line and the exit code."""
    from pydantic import ValidationError

    from ..client import HostelClient, Unreachable
    from ..errors import ApiError
    from ..validation import explain

    try:
        with HostelClient(endpoint_of(context)) as client:
            yield client
    except ValidationError as err:
        # An option that no request can hold; replies are checked in the client.
        fail(explain(err.errors()[0]).detail, EXIT_USAGE)
    except ApiError as err:
        fail(describe(err), EXIT_API_ERROR)
    except Unreachable as err:
        fail(
            f"{err}; start it with `hosteld` and wait until it says `hosteld ready`, or name its"
            " socket in HOSTEL_SOCKET",
            EXIT_UNREACHABLE,
        )


def describe(error: ApiError) -> str:
    """Return an error as one line."""
    more = len(error.errors or ()) - 1
    rest = f" (and {more} more wrong values)" if more > 0 else ""
    return f"{error.detail}{rest} [{error.code}]"


def fail(message: str, code: int) -> NoReturn:
    """Print one line to standard error and leave."""
    print(f"hostel: {message}", file=sys.stderr)
    raise typer.Exit(code)


def settle(
    client: HostelClient, outcome: M | Operation, model: type[M], *, no_wait: bool
) -> M | Operation:
    """Return the object, or with ``no_wait`` the operation that makes it."""
    return outcome if no_wait else client.settle(outcome, model)


def print_json(value: BaseModel | Sequence[BaseModel]) -> None:
    """Print one object or a list of them."""
    from ..client import as_json

    print(as_json(value))


def print_line(value: BaseModel) -> None:
    """Print one object as one line of JSON, at once."""
    print(value.model_dump_json(), flush=True)
