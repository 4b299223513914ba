# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A VM's devices besides its disks and network interfaces."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from .common import DeviceId, HostPath, Request, Response

# VIRTIO 1.2, 5.10.4: 0 to 2 and 0xffffffff have a meaning of their own.
MIN_CID = 3
MAX_CID = 0xFFFFFFFE
# 36 bytes are what virtio-fs has for it; no '/' since it names files and devices too.
ShareTag = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,35}$"),
    Field(description="What the guest mounts it by.", examples=["src"]),
]
PortName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,31}$"),
    Field(
        description="What the guest finds it by: /dev/virtio-ports/NAME.",
        examples=["org.qemu.guest_agent.0"],
    ),
]
WatchdogAction = Annotated[
    Literal["reset", "poweroff", "pause", "none"],
    Field(description="What its expiry does; each one is an event `vm.watchdog` too."),
]


class ShareCreate(Request):
    """A directory of the host that the guest mounts: `mount -t virtiofs TAG /mnt`."""

    tag: ShareTag
    path: HostPath
    read_only: bool = False


class Share(Response):
    """A shared directory as it is."""

    tag: str
    path: str
    read_only: bool


class VsockCreate(Request):
    """A virtio-vsock device: streams between programs of the host and of the guest."""

    cid: int | None = Field(
        default=None,
        ge=MIN_CID,
        le=MAX_CID,
        description="The guest's own address, unique on this host; left out, hosteld chooses one.",
    )
    backend: Literal["auto", "unix", "vhost"] = Field(
        default="auto",
        description="unix: Unix sockets of the host, one directory for each VM. vhost: the "
        "kernel's vhost-vsock; programs of the host use AF_VSOCK. auto: unix, on every host.",
    )


class Vsock(Response):
    """A virtio-vsock device as it is."""

    cid: int
    backend: Literal["unix", "vhost"]
    path: str | None = Field(
        description="Of the Unix socket that programs of the host connect to; what the guest "
        "connects to at port P is the socket at this path with `_P` behind it. Null with vhost."
    )


class PortCreate(Request):
    """A port of a virtio-console device: a stream between a program of the guest and the host."""

    name: PortName
    console: bool = Field(
        default=False, description="The guest's terminal hvc0; at most one port is."
    )


class Port(Response):
    """A port as it is."""

    name: str
    console: bool
    path: str = Field(
        description="Of the Unix socket that programs of the host connect to while the VM runs."
    )


class PmemCreate(Request):
    """A file or block device of the host in the guest's memory: /dev/pmem0 and so on in Linux."""

    id: DeviceId
    path: HostPath
    read_only: bool = Field(
        default=False, description="What the guest writes then goes nowhere, and flushing fails."
    )


class Pmem(Response):
    """A file that is persistent memory, as it is."""

    id: str
    path: str
    read_only: bool
    size_bytes: int


class WatchdogCreate(Request):
    """A watchdog timer: it acts when the guest has not reset it in time."""

    action: WatchdogAction = "reset"


class Watchdog(Response):
    """A watchdog timer as it is."""

    action: WatchdogAction
