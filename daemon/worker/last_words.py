# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a worker leaves behind: its last status, for a hosteld that is away right now."""

from __future__ import annotations

import json
import logging
import os
from typing import Final

from ..protocol import Status

log = logging.getLogger(__name__)

# More than any status takes.
LAST_WORDS_BYTES: Final = 16384


def write_last_words(fd: int, status: Status) -> None:
    """Write a status over the one before; a failure is logged."""
    # Padded, so that one write replaces any earlier words whole.
    data = json.dumps(status.encode()).encode().ljust(LAST_WORDS_BYTES)
    try:
        os.pwrite(fd, data, 0)
    except OSError as err:
        log.error("last words not kept: %s", err)
