# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What HTTP needs from the daemon: the one door between api/ and daemon/.

Every method may raise ``api.errors.ApiError`` and nothing else. All run on the event loop and
never block it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

from .models.common import Page
from .models.limits import RateGroupPatch
from .models.resources import (
    Event,
    Host,
    Image,
    ImageImport,
    Kernel,
    KernelImport,
    Operation,
)
from .models.vms import (
    DiskCreate,
    DiskPatch,
    NicCreate,
    NicPatch,
    StopRequest,
    Vm,
    VmAction,
    VmCreate,
    VmPatch,
    VmState,
    VmStats,
)

DeviceKind = Literal["disk", "nic"]


@dataclass(frozen=True, slots=True)
class Call:
    """Who calls, and how long the caller is ready to wait.

    Attributes:
        actor: for events and logs, such as ``unix:uid=0`` or ``token:ci``.
        wait_s: seconds to wait for the end; what takes longer becomes an Operation.
        if_match: the version that the object must have, or None.
    """

    actor: str
    wait_s: float = 1.0
    if_match: int | None = None


@dataclass(frozen=True, slots=True)
class ListQuery:
    """Which part of a list: at most ``limit`` objects after ``cursor``, in order of name."""

    limit: int = 100
    cursor: str | None = None
    state: VmState | None = None
    label: str | None = None  # "key" or "key=value"


@dataclass(frozen=True, slots=True)
class DetachQuery:
    """How a device is taken from a running VM.

    Attributes:
        force: do not ask the guest.
        timeout_s: how long it may take to let go.
    """

    force: bool = False
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class ConsoleChunk:
    """Bytes of a console log.

    Attributes:
        offset: where ``data`` starts, counted from the VM's creation; more than was asked for when
            older bytes have been dropped.
        data: may be empty.
        end: offset of the log's end when it was read.
    """

    offset: int
    data: bytes
    end: int


@dataclass(frozen=True, slots=True)
class StoredReply:
    """A reply kept under an Idempotency-Key."""

    status: int
    headers: dict[str, str]
    body: bytes


class HostelService(Protocol):
    """The daemon as HTTP sees it."""

    async def host(self) -> Host:
        """Describe the host."""
        ...

    async def metrics(self) -> bytes:
        """Return the Prometheus text exposition."""
        ...

    # VMs

    async def list_vms(self, query: ListQuery) -> Page[Vm]:
        """List VMs in order of name."""
        ...

    async def create_vm(self, request: VmCreate, call: Call) -> Vm | Operation:
        """Create a VM, and start it if asked."""
        ...

    async def get_vm(self, ref: str) -> Vm:
        """Return one VM by name or id."""
        ...

    async def patch_vm(self, ref: str, patch: VmPatch, call: Call) -> Vm:
        """Change a VM."""
        ...

    async def delete_vm(self, ref: str, force: bool, call: Call) -> Operation | None:
        """Delete a VM and its own disks; ``force`` kills it first. None when it is gone."""
        ...

    async def act_on_vm(
        self, ref: str, action: VmAction, stop: StopRequest | None, call: Call
    ) -> Vm | Operation:
        """Start, pause, resume, stop, kill, reset or send Ctrl-Alt-Del."""
        ...

    async def patch_disk(self, ref: str, disk_id: str, patch: DiskPatch, call: Call) -> Vm:
        """Grow a disk, change its limits or its file; a running guest is told."""
        ...

    async def patch_rate_group(
        self, ref: str, group_id: str, patch: RateGroupPatch, call: Call
    ) -> Vm:
        """Change the limits that disks share, at once."""
        ...

    async def patch_nic(self, ref: str, nic_id: str, patch: NicPatch, call: Call) -> Vm:
        """Change an interface; a running guest sees it."""
        ...

    async def attach(self, ref: str, wanted: DiskCreate | NicCreate, call: Call) -> Vm | Operation:
        """Give a VM one more disk or network interface, at once if it runs."""
        ...

    async def detach(
        self, ref: str, device: tuple[DeviceKind, str], how: DetachQuery, call: Call
    ) -> Vm | Operation:
        """Take a disk or a network interface from a VM."""
        ...

    async def vm_stats(self, ref: str) -> VmStats:
        """Read a running VM's counters."""
        ...

    # console

    async def read_console(self, ref: str, offset: int, limit: int) -> ConsoleChunk:
        """Read the console log; a negative offset counts from its end."""
        ...

    def follow_console(self, ref: str, offset: int) -> AsyncIterator[ConsoleChunk]:
        """Yield the console log from ``offset`` on, as it grows, until the VM is deleted."""
        ...

    async def write_console(self, ref: str, data: bytes) -> int:
        """Type into the console; returns the bytes that were taken."""
        ...

    # kernels and images

    async def list_kernels(self, query: ListQuery) -> Page[Kernel]:
        """List kernels in order of name."""
        ...

    async def get_kernel(self, ref: str) -> Kernel:
        """Return one kernel."""
        ...

    async def import_kernel(self, request: KernelImport, call: Call) -> Kernel | Operation:
        """Import a kernel from a path."""
        ...

    async def upload_kernel(
        self, name: str, sha256: str | None, body: AsyncIterator[bytes], call: Call
    ) -> Kernel | Operation:
        """Import a kernel from the request's body."""
        ...

    async def delete_kernel(self, ref: str, call: Call) -> None:
        """Delete a kernel that no VM uses."""
        ...

    async def list_images(self, query: ListQuery) -> Page[Image]:
        """List images in order of name."""
        ...

    async def get_image(self, ref: str) -> Image:
        """Return one image."""
        ...

    async def import_image(self, request: ImageImport, call: Call) -> Image | Operation:
        """Import an image from a path."""
        ...

    async def upload_image(
        self,
        name: str,
        kind: Literal["disk", "initrd"],
        sha256: str | None,
        body: AsyncIterator[bytes],
        call: Call,
    ) -> Image | Operation:
        """Import an image from the request's body."""
        ...

    async def delete_image(self, ref: str, call: Call) -> None:
        """Delete an image that no VM uses."""
        ...

    # operations

    async def list_operations(self, query: ListQuery) -> Page[Operation]:
        """List operations, the newest first."""
        ...

    async def get_operation(self, operation_id: str, wait_s: float) -> Operation:
        """Return an operation, after its end or ``wait_s`` seconds."""
        ...

    async def cancel_operation(self, operation_id: str, call: Call) -> Operation:
        """Ask an operation to stop; what it made is removed."""
        ...

    # events

    async def list_events(self, after: int, limit: int) -> list[Event]:
        """Return events with an id above ``after``, in order."""
        ...

    def follow_events(self, after: int | None) -> AsyncIterator[Event]:
        """Yield every event above ``after``, then new ones as they happen; None: new ones only."""
        ...

    # idempotency

    async def claim_key(self, key: str, fingerprint: str) -> StoredReply | None:
        """Claim an Idempotency-Key; a reply means that the work was done before.

        Raises:
            Conflict: the key is in use by a running request.
            Invalid: the key was used for another request.
        """
        ...

    async def settle_key(self, key: str, reply: StoredReply | None) -> None:
        """Keep the reply of a claimed key, or with None give the key back."""
        ...
