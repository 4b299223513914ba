# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What the I/O engines share in Python: running, holding still, stopping, counters.

An engine is a C loop that serves a device's queues from one thread, without the GIL, until it is
stopped. Python never sees a request of it.
"""

from __future__ import annotations

import abc
import enum
import errno
import os
from typing import TYPE_CHECKING, Any, Final

from ._kvm import ffi, lib

if TYPE_CHECKING:
    from ._kvm import CData

QUIESCE_TIMEOUT_S: Final = 10.0
"""Longer than any healthy disk takes for one request; a dead NFS server is not waited for."""


class EngineFault(enum.IntEnum):
    """Why an engine signalled its fault EventFd."""

    NONE = lib.ENGINE_FAULT_NONE
    RING = lib.ENGINE_FAULT_RING
    """The driver broke a ring. The engine has stopped; the device needs a reset."""
    BACKEND = lib.ENGINE_FAULT_BACKEND
    """The host side is gone for good, such as a deleted tap. The engine goes on without it."""


class DataPath(abc.ABC):
    """What serves some queues of a device: an engine of ours, or the kernel itself (vhost).

    It is made held still: it has served nothing before resume(), or an Engine before run().

    Threads: any, one at a time.
    """

    @property
    @abc.abstractmethod
    def fault(self) -> EngineFault:
        """Why the fault EventFd was signalled; NONE when it was not."""

    @abc.abstractmethod
    def quiesce(self) -> None:
        """Leave nothing in flight and hold still until resume(); not counted.

        Raises:
            TimeoutError: a request took too long; it goes on.
        """

    @abc.abstractmethod
    def resume(self) -> None:
        """Go on, beginning with kicks that came meanwhile."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Serve no more; an Engine's thread may still be at the request in hand."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release what it holds."""


class Engine(DataPath):
    """One C engine: run() in a thread of its own, everything else from any other thread.

    Args:
        engine: the C object.
        destroy: frees it; called once, when the engine is not running.
        keepalive: whatever the C object points to or whose fd it holds.
    """

    def __init__(self, engine: CData, destroy: Any, keepalive: tuple[object, ...]) -> None:  # noqa: ANN401 - a cffi function
        self._owned = ffi.gc(engine, destroy)
        self._engine: CData | None = self._owned
        self._keepalive = keepalive

    @property
    def _c(self) -> CData:
        """The C object.

        Raises:
            ValueError: the engine was closed.
        """
        if self._engine is None:
            raise ValueError("the engine is closed")
        return self._engine

    @abc.abstractmethod
    def _run(self) -> int:
        """The C loop."""

    @abc.abstractmethod
    def _gate(self) -> CData:
        """The C object's `struct engine_gate *`."""

    @property
    @abc.abstractmethod
    def fault(self) -> EngineFault:
        """Why the fault EventFd was signalled, or NONE."""

    def run(self) -> bool:
        """Serve until stop(), or until the driver breaks a ring. Blocks without the GIL.

        Returns:
            True when stopped, False when a ring broke (`fault` says so, and the fault EventFd
            was signalled).

        Raises:
            OSError: EBUSY when a thread is in here already, else what poll(2) said.
        """
        ret = self._run()
        if ret < 0 and ret != -errno.EPROTO:
            raise OSError(-ret, os.strerror(-ret))
        return ret == 0

    def quiesce(self, timeout_s: float = QUIESCE_TIMEOUT_S) -> None:
        """Wait until no request is in flight, every completion is published, and hold it so.

        Kicks that come meanwhile are served after resume(). An engine that does not run (yet, or
        any more) is quiet, and one that is started later starts held. Not counted: one resume()
        undoes any number of these.

        Raises:
            TimeoutError: a request took longer; the engine was let go again.
        """
        if lib.engine_gate_quiesce(self._gate(), int(timeout_s * 1e9)) < 0:
            raise TimeoutError(f"engine still busy after {timeout_s} s; it runs on")

    def resume(self) -> None:
        """Let a quiesced engine go on."""
        lib.engine_gate_resume(self._gate())

    def stop(self) -> None:
        """Make run() return after the request in hand, also a quiesced one; does not wait."""
        lib.engine_gate_stop(self._gate())

    def wake(self) -> None:
        """Have run() look around, after something that it waits for has changed."""
        lib.engine_gate_wake(self._gate())

    def close(self) -> None:
        """Free the engine; every later call raises ValueError.

        Raises:
            OSError: EBUSY, run() has not returned yet.
        """
        if self._engine is None:
            return
        if lib.engine_gate_is_running(self._gate()):
            raise OSError(errno.EBUSY, "the engine still runs: stop() it and join its thread")
        self._engine = None
        ffi.release(self._owned)


def check(ret: int) -> None:
    """Raise OSError for a negative return of a C function."""
    if ret < 0:
        raise OSError(-ret, os.strerror(-ret))


def counters(stats: CData, names: tuple[str, ...]) -> dict[str, int]:
    """The fields of a C struct of counters, as a dict."""
    return {name: int(getattr(stats, name)) for name in names}
