# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Where a sparse file has data. Light enough for a worker to import."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator


def data_extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of each run of data between two offsets; the rest reads as zeros.

    What cannot tell its holes (a block device) is one run. The descriptor's offset is moved.

    Raises:
        OSError: as lseek(2), but for holes that it does not know.
    """
    at = start
    while at < end:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
            hole = os.lseek(fd, data, os.SEEK_HOLE)
        except OSError as err:
            if err.errno == errno.ENXIO:  # no data after ``at``
                return
            if err.errno != errno.EINVAL:
                raise
            data, hole = at, end
        if data >= end:
            return
        yield data, min(hole, end)
        at = hole
