# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Give back, once a guest has booted, the memory that its start unshared from the zygote's."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvm_ffi.heap_image import HeapImage

log = logging.getLogger(__name__)

# By then a guest has booted, and what that took of the worker is not needed again.
SETTLE_AFTER_S: Final = 30.0
# Each stops the guest for 10 ms at most and goes on where the last one stopped: one is enough on a
# fast host, an emulated one takes some tens.
MAX_ATTEMPTS: Final = 100
AGAIN_AFTER_S: Final = 2.0


class Settling:
    """When and how often that is tried.

    Args:
        image: of the zygote's memory; None, and nothing is given back.

    Threads: the worker's main thread.
    """

    def __init__(self, image: HeapImage | None) -> None:
        self._image = image
        self._attempts = 0
        self.due: float | None = None

    def begin(self) -> None:
        """Begin the wait: a guest boots."""
        self.due = time.monotonic() + SETTLE_AFTER_S

    def go_on(self) -> None:
        """Do what is due, if something is: all at once, or a piece."""
        if self.due is None or time.monotonic() < self.due:
            return
        self.due = None
        if self._image is None:
            return
        self._attempts += 1
        try:
            self._image.give_back()
        except (BlockingIOError, TimeoutError) as err:
            if self._attempts < MAX_ATTEMPTS:
                self.due = time.monotonic() + AGAIN_AFTER_S
                return
            log.info("memory not shared again: %s", err)
        except OSError as err:
            log.warning("memory not shared again: %s", err)
        self._image = None
