# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Bring lost back ends back: another process, another connection, the guest's I/O goes on.

A worker says in its status which back ends it has lost. For each of them:

    lost -> [wait, end what is left of it, start again, hand over] up to MAX_ATTEMPTS -> recovered
                                                                                      -> failed
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from api.errors import ApiError

from ..errors import WorkerError
from .backends import Backends, connect_switch
from .channel import clean
from .disks import open_unlocked
from .records import DiskRecord, VmRecord
from .tasks import Tasks

if TYPE_CHECKING:
    import socket

    from .vm_table import VmEntry, VmTable
    from .workers import Ending, Worker

log = logging.getLogger(__name__)

# After 0.05 s, 0.1 s ... 6.4 s: one that dies again at once is given up on after some 13 seconds.
MAX_ATTEMPTS: Final = 8
FIRST_BACKOFF_S: Final = 0.05
# One that has served for that long has been a good one.
SETTLED_S: Final = 30.0
ATTACH_TIMEOUT_S: Final = 30.0


@dataclass(slots=True)
class _Streak:
    """Losses of one device's back end in close succession."""

    worker: Worker
    attempts: int = 0
    back_at: float | None = None
    is_under_way: bool = False

    def is_settled(self, now: float) -> bool:
        """Whether the last one that came back has served for long."""
        return self.back_at is not None and now - self.back_at > SETTLED_S


class Recovery:
    """Watches workers' statuses for lost back ends.

    Threads: the event loop's.
    """

    def __init__(self, table: VmTable, backends: Backends, tasks: Tasks) -> None:
        self._table = table
        self._backends = backends
        self._tasks = tasks
        self._streaks: dict[tuple[str, str], _Streak] = {}

    def check(self, entry: VmEntry, worker: Worker) -> None:
        """Begin to bring back what a worker says it has lost, unless that is under way."""
        if worker.status is None or worker.ended.done():
            return
        for device_id, why in worker.status.backends_lost.items():
            key = (entry.record.id, device_id)
            streak = self._streaks.get(key)
            if streak is None or streak.worker is not worker:
                streak = self._streaks[key] = _Streak(worker)
                worker.ended.add_done_callback(partial(self._drop, key, streak))
            if streak.is_under_way:
                continue
            if streak.is_settled(asyncio.get_running_loop().time()):
                streak.attempts = 0
            if streak.attempts < MAX_ATTEMPTS:
                streak.is_under_way, streak.back_at = True, None
                recover = self._recover(entry, device_id, clean(why), streak)
                self._tasks.spawn(recover, f"recover {device_id}")

    def _drop(self, key: tuple[str, str], streak: _Streak, _: asyncio.Future[Ending]) -> None:
        if self._streaks.get(key) is streak:
            del self._streaks[key]

    async def _recover(self, entry: VmEntry, device_id: str, why: str, streak: _Streak) -> None:
        loop, vm_id = asyncio.get_running_loop(), entry.record.id
        said = self._backends.describe_end(vm_id, device_id)
        log.warning("back end lost vm=%s device=%s: %s %s", entry.record.name, device_id, why, said)
        self._tell(entry, "backend_lost", device=device_id, message=why, log=said)
        problem = ""
        try:
            while streak.attempts < MAX_ATTEMPTS:
                streak.attempts += 1
                await streak.worker.wait_ended(FIRST_BACKOFF_S * 2 ** (streak.attempts - 1))
                if streak.worker.ended.done():
                    return
                try:
                    await self._try(entry.record, device_id, streak.worker)
                except (ApiError, WorkerError, OSError) as err:
                    problem = getattr(err, "detail", "") or str(err)
                    log.warning("back end not back device=%s: %s", device_id, problem)
                    continue
                streak.back_at = loop.time()
                log.info("back end back vm=%s device=%s", entry.record.name, device_id)
                attempts = streak.attempts
                self._tell(entry, "backend_recovered", device=device_id, attempts=attempts)
                # It may have been lost once more before the worker said that it had it.
                loop.call_soon(self.check, entry, streak.worker)
                return
            log.error("back end given up vm=%s device=%s", entry.record.name, device_id)
            self._tell(entry, "backend_failed", device=device_id, message=problem)
        finally:
            streak.is_under_way = False

    async def _try(self, record: VmRecord, device_id: str, worker: Worker) -> None:
        """Start a back end anew and hand it to the worker.

        Raises:
            ApiError, WorkerError, OSError: it is no use, this time.
        """
        self._backends.end(record.id, device_id)
        await self._backends.gone(record.id, device_id)
        try:
            with await self._start(record, device_id) as sock:
                await worker.request(
                    "attach_backend",
                    {"device": device_id},
                    (sock.fileno(),),
                    timeout_s=ATTACH_TIMEOUT_S,
                )
        except BaseException:
            # The worker may have ended meanwhile, and nobody else would end this one.
            self._backends.end(record.id, device_id)
            raise

    async def _start(self, record: VmRecord, device_id: str) -> socket.socket:
        for index, disk in enumerate(record.disks):
            if disk.id == device_id:
                return await self._start_disk(record.id, disk, f"disks.{index}.path")
        for index, share in enumerate(record.shares):
            if share.device_id == device_id:
                served = await self._backends.serve_share(record.id, share, f"shares.{index}")
                return served.sock
        for index, nic in enumerate(record.nics):
            if nic.id == device_id and nic.socket is not None:
                return await connect_switch(nic.socket, nic.id, f"nics.{index}.socket")
        raise WorkerError("no_such_backend", f"VM {record.name} has no device {device_id}")

    async def _start_disk(self, vm_id: str, disk: DiskRecord, field: str) -> socket.socket:
        fd = None
        if disk.format != "nbd":
            # The worker holds the lock, for as long as it lives.
            fd = await asyncio.to_thread(open_unlocked, disk, field)
        try:
            return (await self._backends.serve_disk(vm_id, disk, field, fd)).sock
        finally:
            if fd is not None:
                os.close(fd)

    def _tell(self, entry: VmEntry, kind: str, **data: str | int) -> None:
        # Not waited for: a stop holds the lock while the guest still needs its disks.
        self._tasks.spawn(self._record(entry, kind, data), kind)

    async def _record(self, entry: VmEntry, kind: str, data: dict[str, Any]) -> None:
        async with entry.lock:
            if not entry.gone.is_set():
                await self._table.record(entry, entry.event(kind, **data))
