# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The contract between a virtio device and its transport, and its two kinds.

    status 0            DRIVER_OK                    status 0
    reset() ----------> activate(activation) ------> reset()
                          | quiesce() <-> resume() |

The transport owns status, feature negotiation, queue registers, vectors and ioeventfds. A device
owns its identity, config space and requests: a KickedDevice serves them in Python on the event
loop, an EngineDevice leaves them to C threads.

Source: VIRTIO 1.2, 2.1 "Device Status Field" and 3.1 "Device Initialization".
"""

from __future__ import annotations

import abc
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from devices.errors import BackendError, BadRegisterAccess
from devices.ratelimit import GuestLog
from kvm_ffi.engine import Engine, EngineFault
from kvm_ffi.errors import GuestError

from .ids import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1

if TYPE_CHECKING:
    from kvm_ffi.engine import DataPath
    from kvm_ffi.virtqueue import DescriptorChain

    from .queue import Activation, EnabledQueue

log = logging.getLogger(__name__)

TRANSPORT_FEATURES = VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX


def _no_transport() -> None:
    pass


class VirtioDevice(abc.ABC):
    """A virtio device model.

    Args:
        name: for threads, logs and metrics, e.g. "blk0".

    Threads: activate() and reset() under the transport's lock; the rest from any thread. The
    device's own lock comes after the transport's, so it is not held while config_changed runs.
    """

    DEVICE_ID: ClassVar[int]  # VIRTIO 1.2, section 5
    PCI_CLASS: ClassVar[int]  # class, subclass, programming interface
    QUEUE_SIZES: tuple[int, ...]  # most entries of each virtqueue
    FEATURES: ClassVar[int] = 0  # offered bits besides those of the transport

    def __init__(self, name: str) -> None:
        self.name = name
        self.config_changed: Callable[[], None] = _no_transport  # set by the transport
        self._lock = threading.RLock()
        self._activation: Activation | None = None

    @property
    def features(self) -> int:
        """The bits that this instance offers."""
        return self.FEATURES | TRANSPORT_FEATURES

    def accepts(self, features: int) -> bool:
        """Whether a subset of the offered bits makes sense together (guest-controlled)."""
        return True

    def config_space(self) -> bytes:
        """Return the device-specific configuration, little-endian; its length never changes."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """Take a driver's write to the config space (guest-controlled, inside its length).

        Raises:
            BadRegisterAccess: the field is read-only, as all are unless this is overridden.
        """
        raise BadRegisterAccess(f"{self.name}: config offset={offset:#x} is read-only")

    @abc.abstractmethod
    def activate(self, activation: Activation) -> None:
        """Take the enabled queues and begin to serve them.

        Raises:
            BadQueueConfig: a queue that the device needs is missing.
            HostError: what stands behind the device does not work.
        """

    @abc.abstractmethod
    def reset(self) -> None:
        """Stop serving; when this returns the device touches guest memory no more."""

    @abc.abstractmethod
    def quiesce(self) -> None:
        """Finish what is in flight and hold still until resume().

        Raises:
            TimeoutError: a request took too long; the device runs on.
        """

    @abc.abstractmethod
    def resume(self) -> None:
        """Go on after quiesce(); kicks that came meanwhile are served."""

    @abc.abstractmethod
    def fault_reason(self) -> str | None:
        """Why the device needs a reset, after it signalled a fault; None when it does not."""

    def stats(self) -> dict[str, int]:
        """Return counters since the device was made."""
        return {}

    def close(self) -> None:
        """Stop for good, and close what the device owns; the transport calls it."""
        self.reset()


class KickedDevice(VirtioDevice):
    """A slow device: each kick drains one queue in Python, on the event loop's thread."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._is_quiesced = False
        self._fault: str | None = None
        self._counts: Counter[str] = Counter()
        self._guest_log = GuestLog(log)

    @abc.abstractmethod
    def handle(self, queue_index: int, chain: DescriptorChain) -> int:
        """Serve one request and return the bytes written to its writable part.

        Raises:
            GuestError: the request is malformed; the device will need a reset.
        """

    def activate(self, activation: Activation) -> None:
        """Watch the kicks of all enabled queues."""
        with self._lock:
            self._fault = None
            self._activation = activation
            for index, queue in activation.queues.items():
                activation.event_loop.add(queue.kick, partial(self.on_kick, index))

    def reset(self) -> None:
        """Give the queues back; a kick under way is waited for."""
        with self._lock:
            activation, self._activation = self._activation, None
            self._fault = None
        if activation is not None:
            for queue in activation.queues.values():
                activation.event_loop.remove(queue.kick)

    def quiesce(self) -> None:
        """Let kicks wait."""
        with self._lock:
            self._is_quiesced = True

    def resume(self) -> None:
        """Serve kicks again, beginning with those that came meanwhile."""
        with self._lock:
            self._is_quiesced = False
            if self._activation is not None:
                for queue in self._activation.queues.values():
                    queue.kick.signal()

    def fault_reason(self) -> str | None:
        """Return the GuestError that stopped the device."""
        return self._fault

    def on_kick(self, queue_index: int) -> None:
        """Serve one queue, unless the device rests."""

        def work(activation: Activation) -> None:
            self._counts["kicks"] += 1
            self._counts.update(self.serve(queue_index, activation.queues[queue_index]))

        self.guarded(work)

    def serve(self, queue_index: int, enabled: EnabledQueue) -> dict[str, int]:
        """Serve one queue and return its counters, as serve_slowly() does.

        Raises:
            GuestError: the device will need a reset.
        """
        return serve_slowly(enabled, partial(self.handle, queue_index))

    def guarded(self, work: Callable[[Activation], None]) -> None:
        """Do something with the queues under the lock, unless the device rests or is broken."""
        with self._lock:
            activation = self._activation
            if activation is None or self._is_quiesced or self._fault is not None:
                return
            try:
                work(activation)
            except GuestError as err:
                self._fault = str(err)
                self._guest_log.warning("%s: %s", self.name, err)
                activation.fault.signal()

    def stats(self) -> dict[str, int]:
        """Return kicks, requests, written_bytes and interrupts."""
        names = ("kicks", "requests", "written_bytes", "interrupts")
        return {name: self._counts[name] for name in names}


def serve_slowly(enabled: EnabledQueue, handle: Callable[[DescriptorChain], int]) -> dict[str, int]:
    """Serve what a queue holds in Python, publish once, interrupt at most once.

    Args:
        enabled: the queue; not one that an engine serves.
        handle: serves one request and returns the bytes written to its writable part.

    Returns:
        How many requests, written_bytes and interrupts that were.

    Raises:
        GuestError: the ring or a request is malformed; the device needs a reset.
    """
    queue = enabled.queue
    requests = written_bytes = 0
    # A driver that adds chains as fast as they are served must not hold the loop forever:
    # after one queue's worth the others get their turn.
    for _ in range(queue.size):
        chain = queue.pop()
        if chain is None:
            if not queue.enable_kick():
                break
            continue
        written = handle(chain)
        queue.add_used(chain, written)
        requests += 1
        written_bytes += written
    else:
        enabled.kick.signal()
    counts = {"requests": requests, "written_bytes": written_bytes, "interrupts": 0}
    if queue.publish() and enabled.irq is not None:
        counts["interrupts"] = 1
        enabled.irq.signal()
    return counts


class EngineDevice(VirtioDevice):
    """A fast device: C engines serve its queues, each in a thread named after the device.

    Where the kernel serves them itself (vhost), what stands for it here has no thread.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._engines: tuple[DataPath, ...] = ()
        self._threads: dict[DataPath, threading.Thread] = {}
        self._is_quiesced = False
        self._failure: str | None = None
        self._totals: Counter[str] = Counter()

    @abc.abstractmethod
    def make_engines(self, activation: Activation) -> Sequence[DataPath]:
        """Build the engines for the queues that were enabled; called under the device's lock.

        Raises:
            BadQueueConfig: a queue that the device needs is missing.
            HostError: the host refused.
        """

    @abc.abstractmethod
    def engine_stats(self, engine: DataPath) -> dict[str, int]:
        """Return the counters of one engine."""

    def activate(self, activation: Activation) -> None:
        """Build the engines and start their threads.

        Raises:
            BackendError: the host has no thread left; reset() cleans up.
        """
        with self._lock:
            self._failure = None
            self._engines = tuple(self.make_engines(activation))
            self._activation = activation
            for engine in self._engines:
                self._start(engine, activation)

    def _start(self, engine: DataPath, activation: Activation) -> None:
        if self._is_held:
            engine.quiesce()
        else:
            engine.resume()
        if not isinstance(engine, Engine):
            return
        thread = threading.Thread(
            target=self._serve, args=(engine, activation), name=self.name, daemon=True
        )
        try:
            thread.start()
        except RuntimeError as err:
            raise BackendError(self.name, str(err)) from err
        self._threads[engine] = thread

    def _end(self, engine: DataPath) -> None:
        """Stop one engine for good, keep its counters; called under the device's lock."""
        engine.stop()
        if thread := self._threads.pop(engine, None):
            thread.join()
        self._totals.update(self.engine_stats(engine))
        engine.close()

    @property
    def _is_held(self) -> bool:
        """Whether engines are to hold still."""
        return self._is_quiesced

    def reset(self) -> None:
        """Stop the engines and wait for their threads: for the request in hand, no longer."""
        with self._lock:
            engines, threads = self._engines, tuple(self._threads.values())
            self._activation = None  # from here on nobody adds an engine
            for engine in engines:
                engine.stop()
        # Not under the lock: a slow disk here must not keep stats() or a pause waiting. The
        # transport's lock keeps a second reset and an activate away.
        for thread in threads:
            thread.join()
        with self._lock:
            for engine in engines:
                self._end(engine)
            self._engines = ()
            self._failure = None

    def quiesce(self) -> None:
        """Let every engine finish the request in hand and hold still.

        Raises:
            TimeoutError: a request took too long; every engine runs on.
        """
        with self._lock:
            try:
                for engine in self._engines:
                    engine.quiesce()
            except TimeoutError:
                self._let_go()
                raise
            self._is_quiesced = True

    def resume(self) -> None:
        """Let the engines go on."""
        with self._lock:
            self._is_quiesced = False
            self._let_go()

    def _let_go(self) -> None:
        """Let the engines go on unless something else holds them; under the device's lock."""
        if not self._is_held:
            for engine in self._engines:
                engine.resume()

    def fault_reason(self) -> str | None:
        """Tell a broken ring or a dead engine; a lost backend is the operator's business."""
        with self._lock:
            if self._failure is not None:
                return self._failure
            for engine in self._engines:
                if engine.fault is EngineFault.RING:
                    return "the driver broke a virtqueue"
                if engine.fault is EngineFault.BACKEND:
                    log.error("%s: what stands behind the device is gone", self.name)
            return None

    def stats(self) -> dict[str, int]:
        """Return the engines' counters, added up over all activations."""
        with self._lock:
            totals = Counter(self._totals)
            for engine in self._engines:
                totals.update(self.engine_stats(engine))
            return dict(totals)

    def _serve(self, engine: Engine, activation: Activation) -> None:
        try:
            engine.run()
        except OSError as err:
            log.error("%s: engine stopped: %s", self.name, err)
            self._failure = str(err)
            activation.fault.signal()
