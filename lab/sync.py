# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Brings files of the checkout that changed since the lab was started into the running lab."""

import fcntl
import io
import json
import tarfile
from pathlib import Path
from typing import Final

from lab import images, tree
from lab.client import HEADER, STATUS, Endpoint, frames
from lab.errors import LabError
from lab.layout import Layout
from lab.session import TREE_FILE, load_tree

CHUNK_BYTES: Final = 1 << 19


def bring_over(layout: Layout, directory: Path, endpoint: Endpoint) -> None:
    """Make the lab's checkout equal to ours.

    Args:
        layout: Where the checkout lies.
        directory: The lab's run directory, with the manifest of what the lab has.
        endpoint: The lab's agent.

    Raises:
        LabError: the lab did not take the files.
    """
    record = directory / TREE_FILE
    with (directory / "sync.lock").open("w") as lock:
        # Two commands at once: the second finds that the first has brought everything.
        fcntl.flock(lock, fcntl.LOCK_EX)
        have = load_tree(record)
        want = tree.scan(layout.checkout, images.CHECKOUT_SKIP | {"__pycache__"})
        changed, gone = tree.difference(have, want)
        if not changed and not gone:
            return
        _send(endpoint, layout.checkout, gone, _archive(layout.checkout, changed))
        record.write_text(json.dumps(want))


def _archive(root: Path, paths: list[str]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for path in paths:
            try:
                archive.add(root / path, arcname=path, recursive=False)
            except FileNotFoundError:
                continue  # gone since it was listed; the next sync notices
    return data.getvalue()


def _send(endpoint: Endpoint, root: Path, gone: list[str], archive: bytes) -> None:
    # -U: a file that a process in the lab has open or runs is replaced, not written over.
    script = 'rm -f -- "$@" && exec tar -x -U -f -'
    connection = endpoint.request(
        "exec",
        id="sync",
        argv=["sh", "-c", script, "sync", *gone],
        cwd=str(root),
        env={"PATH": "/usr/bin:/bin"},
        stdin=True,
    )
    buffer = bytearray()
    said = b""
    with connection:
        for at in range(0, len(archive), CHUNK_BYTES):
            part = archive[at : at + CHUNK_BYTES]
            connection.sendall(HEADER.pack(b"i", len(part)) + part)
        connection.sendall(HEADER.pack(b"i", 0))
        while data := connection.recv(CHUNK_BYTES):
            buffer += data
            for kind, payload in frames(buffer):
                if kind == b"x" and STATUS.unpack(payload)[0] == 0:
                    return
                said += payload if kind == b"e" else b""
    raise LabError(f"cannot bring changed files over: {said.decode(errors='replace').strip()}")
