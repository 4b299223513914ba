# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""One question to a QEMU program over QMP.

Source: QEMU docs/interop/qmp-spec.txt.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any, Final

MAX_LINE_BYTES: Final = 1 << 20


class QmpError(Exception):
    """The program hung up, refused, or sent no QMP."""


async def ask(sock: socket.socket, command: str) -> Any:  # noqa: ANN401 - as the schema has it
    """Return a command's answer, over a fresh connection.

    Args:
        sock: connected, with the greeting still to come; owned from now on.
        command: one without arguments.

    Raises:
        QmpError: see there.

    The caller sets the deadline.
    """
    sock.setblocking(False)
    reader, writer = await asyncio.open_unix_connection(sock=sock, limit=MAX_LINE_BYTES)
    try:
        await _receive(reader, "QMP")
        answer: Any = None
        for name in ("qmp_capabilities", command):
            writer.write(json.dumps({"execute": name}).encode() + b"\n")
            answer = await _receive(reader, "return")
    except (OSError, ValueError) as err:
        raise QmpError(f"{command}: {err}") from err
    finally:
        writer.close()
    return answer


async def _receive(reader: asyncio.StreamReader, key: str) -> Any:  # noqa: ANN401 - as ask()
    """Return the next message's value of ``key``; events in between are passed over."""
    while line := await reader.readline():
        message = json.loads(line)
        if not isinstance(message, dict):
            break
        if "error" in message:
            raise QmpError(str(message["error"]))
        if key in message:
            return message[key]
    raise QmpError("it hung up")
