# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The database's schema as a list of steps; PRAGMA user_version counts the steps that were taken.

Objects are kept as one JSON document each, beside the columns that constraints and queries need.
A step that was released is never edited; the next change is a new step.
"""

from __future__ import annotations

from typing import Final

MIGRATIONS: Final[tuple[str, ...]] = (
    """
    CREATE TABLE vms (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, state TEXT NOT NULL, doc TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE kernels (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, doc TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE images (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, doc TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    -- seq orders them and is the cursor of the list.
    CREATE TABLE operations (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, doc TEXT NOT NULL
    ) STRICT;
    -- AUTOINCREMENT: an id is never used twice, even after the newest rows were deleted.
    CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT, doc TEXT NOT NULL
    ) STRICT;
    CREATE TABLE idempotency (
        key TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, at REAL NOT NULL, status INTEGER NOT NULL,
        headers TEXT NOT NULL, body BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX idempotency_at ON idempotency (at);
    -- Facts about the database itself, such as the boot in which it was last used.
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
    """,
)
