# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A supervisor on a directory of its own, with the real zygote and workers without VMs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from api.models.common import Page
from api.models.resources import ImageImport, Kernel, KernelImport, Operation
from api.models.vms import StopRequest, Vm, VmAction, VmCreate
from api.ports import Call, ListQuery
from daemon.supervisor import dirs
from daemon.supervisor.config import Config
from daemon.supervisor.reconcile import Report
from daemon.supervisor.service import Supervisor
from daemon.supervisor.tasks import Tasks
from daemon.supervisor.zygotes import ZygoteClient
from tests.support import tiny_kernel

ROOT = Path(__file__).resolve().parents[2]
FAKE_ZYGOTE = Path(__file__).with_name("fake_zygote.py")
CALL = Call("test", wait_s=30.0)


def spawn_fake_zygote() -> tuple[socket.socket, int]:
    """Start the fake zygote; its pid is ours to reap."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        theirs.set_inheritable(True)
        argv = [sys.executable, str(FAKE_ZYGOTE), "--fd", str(theirs.fileno())]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return ours, os.posix_spawn(sys.executable, argv, env)


class Harness:
    """One life of a supervisor; several of them may follow each other on one directory."""

    def __init__(self, path: Path, **settings: object) -> None:
        self.path = path
        self.layout = dirs.Layout(path / "state", path / "run")
        self.config = Config(
            state_dir=str(self.layout.state),
            runtime_dir=str(self.layout.runtime),
            kvm_device=os.devnull,
            request_timeout_s=5.0,
        )
        self.set(**settings)
        self.report = Report()

    def set(self, **settings: Any) -> None:  # noqa: ANN401  fields of Config
        """Change the configuration of the lives to come."""
        self.config = replace(self.config, **settings)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Supervisor]:
        """Start a supervisor, and stop it as hosteld would; workers live on."""
        dirs.prepare(self.layout)
        tasks = Tasks()
        self.zygote = ZygoteClient(*spawn_fake_zygote(), tasks, respawn=spawn_fake_zygote)
        self.supervisor = Supervisor(self.config, self.layout, self.zygote, tasks, "test")
        try:
            self.report = await self.supervisor.start()
            yield self.supervisor
        finally:
            await self.supervisor.stop()

    def run(self, scenario: Callable[[Supervisor], Awaitable[None]]) -> None:
        """Run one scenario in one life."""

        async def life() -> None:
            async with self.running() as supervisor:
                await scenario(supervisor)

        asyncio.run(life())

    async def kernel(self, name: str = "k") -> None:
        """Import a kernel of a few bytes."""
        path = tiny_kernel.write_elf(self.path / f"{name}.elf", tiny_kernel.HALT)
        await self.supervisor.import_kernel(KernelImport(name=name, path=str(path)), CALL)

    async def kernels(self) -> Page[Kernel]:
        """List all kernels."""
        return await self.supervisor.list_kernels(ListQuery(limit=1000))

    async def image(self, name: str, size_bytes: int = 1 << 20, kind: str = "disk") -> None:
        """Import an image of zeros."""
        path = self.path / f"{name}.img"
        path.write_bytes(bytes(size_bytes))
        wanted = ImageImport.model_validate({"name": name, "path": str(path), "kind": kind})
        await self.supervisor.import_image(wanted, CALL)

    async def create(self, name: str = "a", *moods: str, **options: object) -> Vm:
        """Create a VM; kernel k is imported when it is missing."""
        if "k" not in {kernel.name for kernel in (await self.kernels()).items}:
            await self.kernel()
        body = {"name": name, "kernel": "k", "memory_mib": 16, "cmdline": " ".join(moods)}
        wanted = VmCreate.model_validate({**body, **options})
        vm = await self.supervisor.create_vm(wanted, CALL)
        assert isinstance(vm, Vm)
        return vm

    async def start(self, name: str = "a", *moods: str, **options: object) -> Vm:
        """Create and start a VM."""
        return await self.create(name, *moods, start=True, **options)

    async def act(self, action: VmAction, name: str = "a", stop: StopRequest | None = None) -> Vm:
        """Do something to a VM and wait for it."""
        vm = await self.supervisor.act_on_vm(name, action, stop, CALL)
        assert isinstance(vm, Vm)
        return vm

    async def until(self, name: str, check: Callable[[Vm], bool]) -> Vm:
        """Wait until a VM is as it should be."""
        events = self.supervisor.follow_events(0)
        async with asyncio.timeout(20):
            while not check(vm := await self.supervisor.get_vm(name)):
                await anext(events)
        return vm

    async def event_types(self) -> list[str]:
        """Return the types of all events about VMs."""
        events = await self.supervisor.list_events(0, 1000)
        return [event.type for event in events if event.object.kind == "vm"]

    async def finished(self, operation: Operation) -> Operation:
        """Wait for an operation's end."""
        return await self.supervisor.get_operation(operation.id, 20)

    def worker_pids(self) -> list[int]:
        """Return the fake workers that have this harness's files open."""
        done = subprocess.run(
            ["ps", "-ww", "-eo", "pid,args"], capture_output=True, check=True, text=True
        )
        pids = [
            int(line.split()[0]) for line in done.stdout.splitlines() if FAKE_ZYGOTE.name in line
        ]
        return [pid for pid in pids if self._belongs(pid)]

    def _belongs(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            links = [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
            return any(link.startswith(str(self.layout.state)) for link in links)
        return False

    def end(self) -> None:
        """Kill all workers that are left."""
        for pid in self.worker_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
