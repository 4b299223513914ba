# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""virtio-pmem: a file of the host in the guest's address space, which outlives the guest.

The guest reads and writes the file's pages themselves; only a flush is a request. It is an
fdatasync(2), which may take long, so each device has a thread for it, from its first flush on.

Source: VIRTIO 1.2, 5.19 "PMEM Device".
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

from kvm_ffi.errors import BadDescriptorChain

from .device import KickedDevice, serve_slowly
from .ids import VIRTIO_ID_PMEM

if TYPE_CHECKING:
    from kvm_ffi.virtqueue import DescriptorChain

    from .queue import Activation, EnabledQueue

log = logging.getLogger(__name__)

QUEUE_SIZE: Final = 64
QUIESCE_TIMEOUT_S: Final = 5.0
REQUEST_QUEUE: Final = 0
TYPE_FLUSH: Final = 0
_CONFIG: Final = struct.Struct("<QQ")  # start, size
_REQUEST: Final = struct.Struct("<I")  # type
_OK: Final = struct.pack("<I", 0)
_EIO: Final = struct.pack("<I", 1)


class VirtioPmem(KickedDevice):
    """Tells the guest where the file is, and makes it durable.

    Args:
        name: of the device.
        fd: the file; owned from now on.
        gpa: where the guest finds it.
        size_bytes: how much of it.
        is_read_only: the guest's writes go nowhere, and no flush succeeds.
    """

    DEVICE_ID: ClassVar[int] = VIRTIO_ID_PMEM
    PCI_CLASS: ClassVar[int] = 0x050000
    QUEUE_SIZES: tuple[int, ...] = (QUEUE_SIZE,)

    def __init__(
        self, name: str, fd: int, *, gpa: int, size_bytes: int, is_read_only: bool
    ) -> None:
        super().__init__(name)
        self._fd = fd
        self._config = _CONFIG.pack(gpa, size_bytes)
        self._is_read_only = is_read_only
        self._has_failed = False
        self._changed = threading.Condition(self._lock)
        self._waiting: list[DescriptorChain] = []
        self._is_syncing = False
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def config_space(self) -> bytes:
        """Return struct virtio_pmem_config."""
        return self._config

    # --- requests

    def serve(self, queue_index: int, enabled: EnabledQueue) -> dict[str, int]:
        """Take the flushes for the thread; answer at once what needs none."""
        if self._is_read_only:
            counts = serve_slowly(enabled, partial(self.handle, queue_index))
            return {"requests": counts["requests"], "errors": counts["requests"]}
        try:
            for _ in range(enabled.queue.size):
                chain = enabled.queue.pop()
                if chain is None:
                    if not enabled.queue.enable_kick():
                        break
                    continue
                self._waiting.append(self._checked(chain))
            else:
                enabled.kick.signal()  # as serve_slowly(): the rest in its turn
        finally:
            # Those before a malformed one too: a pause waits for what has been taken.
            if self._waiting:
                self._wake()
        return {}

    def handle(self, queue_index: int, chain: DescriptorChain) -> int:
        """Refuse a flush: what the guest has written is nowhere."""
        self._checked(chain)
        return chain.write(_EIO)

    def _checked(self, chain: DescriptorChain) -> DescriptorChain:
        """Guest-controlled: the request.

        Raises:
            BadDescriptorChain: it is no flush, or has no room for an answer.
        """
        raw = chain.read(_REQUEST.size)
        if len(raw) < _REQUEST.size or chain.writable_len < len(_OK):
            raise BadDescriptorChain(
                f"{self.name}: a request of {len(raw)} bytes with room for {chain.writable_len}"
            )
        (kind,) = _REQUEST.unpack(raw)
        if kind != TYPE_FLUSH:
            raise BadDescriptorChain(f"{self.name}: a request of type {kind}")
        return chain

    # --- the thread

    def _wake(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            thread.start()
            self._thread = thread
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                if self._is_closing:
                    return
                batch, self._waiting = self._waiting, []
                activation = self._activation
                self._is_syncing = True
            answer = self._sync()
            with self._lock:
                self._is_syncing = False
                # After a reset the chains are the driver's again, or another one's.
                if activation is not None and self._activation is activation:
                    self._complete(activation, batch, answer)
                self._changed.notify_all()

    def _sync(self) -> bytes:
        """Make all that the guest has written durable; one call covers all that ask for it."""
        try:
            os.fdatasync(self._fd)
        except OSError as err:
            # The kernel forgets what it could not write: this driver may believe no later success.
            self._has_failed = True
            log.error("%s: not flushed: %s", self.name, err.strerror)
        return _EIO if self._has_failed else _OK

    def _complete(
        self, activation: Activation, batch: list[DescriptorChain], answer: bytes
    ) -> None:
        enabled = activation.queues[REQUEST_QUEUE]
        for chain in batch:
            enabled.queue.add_used(chain, chain.write(answer))
        self._counts["requests"] += len(batch)
        self._counts["syncs"] += 1
        self._counts["errors"] += len(batch) if answer == _EIO else 0
        if enabled.queue.publish() and enabled.irq is not None:
            enabled.irq.signal()

    # --- life

    def reset(self) -> None:
        """Give the queue back; a flush that is under way is not answered."""
        with self._lock:
            self._waiting.clear()
            self._has_failed = False
            super().reset()

    def quiesce(self) -> None:
        """Answer what was asked for, and hold still.

        Raises:
            TimeoutError: the file takes too long; the device runs on.
        """
        with self._lock:
            super().quiesce()
            is_idle = self._changed.wait_for(
                lambda: not self._waiting and not self._is_syncing, QUIESCE_TIMEOUT_S
            )
            if not is_idle:
                self.resume()
                raise TimeoutError(f"{self.name}: a flush took longer than {QUIESCE_TIMEOUT_S:g} s")

    def stats(self) -> dict[str, int]:
        """Return flush requests, fdatasync calls, and requests that failed."""
        return {name: self._counts[name] for name in ("requests", "syncs", "errors")}

    def close(self) -> None:
        """Stop for good, wait for a flush that is under way, and close the file."""
        super().close()
        with self._lock:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        os.close(self._fd)
