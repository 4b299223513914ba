# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Virtual machines: what a client asks for and what it is shown."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from .common import DeviceId, HostPath, Labels, Name, Ref, Request, Response, Timestamp
from .devices import (
    Pmem,
    PmemCreate,
    Port,
    PortCreate,
    Share,
    ShareCreate,
    Vsock,
    VsockCreate,
    Watchdog,
    WatchdogCreate,
)
from .limits import GroupId, RateGroup, RateGroupCreate, RateLimit

MAX_VCPUS = 16
MIN_MEMORY_MIB = 16
MAX_MEMORY_MIB = 1024 * 1024
# Linux's COMMAND_LINE_SIZE on x86 is 2048 with the terminating NUL.
MAX_CMDLINE_BYTES = 2047
# PCI slots that are left when every other device of a VM has its own.
MAX_SHARES_AND_PMEM = 4
# Names that a worker gives to devices which are not the client's to name.
OWN_DEVICES = ("console0", "rng0", "vsock0")

# The pattern keeps out NUL, newlines and what is not ASCII; Linux reads the rest as it stands.
Cmdline = Annotated[
    str,
    StringConstraints(pattern=r"^[\t -~]*$", max_length=MAX_CMDLINE_BYTES),
    Field(description="Kernel command line: printable ASCII, at most 2047 bytes."),
]
NbdUri = Annotated[
    str,
    StringConstraints(pattern=r"^nbd(\+unix)?://[!-~]{1,1000}$"),
    Field(
        description="nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH.",
        examples=["nbd://10.0.0.1/disk1", "nbd+unix:///disk1?socket=/run/nbd.sock"],
    ),
]
MacAddress = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9a-f][02468ace](:[0-9a-f]{2}){5}$"),
    Field(description="Unicast MAC address in lower case.", examples=["02:00:00:00:00:01"]),
]
# IFNAMSIZ is 16 with the terminating NUL; '%' would make the kernel choose a number.
InterfaceName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,15}$"),
    Field(description="Name of a host network interface, at most 15 characters."),
]

NetBackend = Annotated[
    Literal["auto", "vhost", "tap"],
    Field(
        description="Who moves packets: the kernel's vhost-net, or the VM's own process (`tap`). "
        "`auto` is vhost where /dev/vhost-net can be opened, else tap; `vhost` does not start then."
    ),
]

Link = Annotated[
    Literal["up", "down"],
    Field(description="Whether the cable is plugged in, as the guest and the host see it."),
]


DiskCache = Annotated[
    Literal["writeback", "none"],
    Field(
        description="`writeback`: through the host's page cache. `none`: past it (O_DIRECT), which "
        "some file systems refuse. Either way a guest's flush makes its data durable."
    ),
]
IoEngine = Annotated[
    Literal["auto", "io_uring", "threads"],
    Field(
        description="`io_uring`: many operations at a time, by the kernel. `threads`: one at a "
        "time, by the disk's own thread. `auto` is io_uring where the host permits it."
    ),
]


class VmState(StrEnum):
    """Where a VM is in its life; daemon/supervisor/lifecycle.py holds the one table."""

    CREATING = "creating"
    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    CRASHED = "crashed"
    DELETING = "deleting"


class VmAction(StrEnum):
    """What can be done to a VM, as `POST /v1/vms/{vm}/{action}`."""

    START = "start"
    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"
    KILL = "kill"
    RESET = "reset"
    CTRL_ALT_DEL = "ctrl-alt-del"


class DiskCreate(Request):
    """A virtio-blk disk: an imported image, a file or block device of the host, or NBD."""

    id: DeviceId
    image: Ref | None = Field(
        default=None,
        description="An imported disk image. A writable disk is this VM's own copy of it.",
    )
    path: HostPath | None = Field(
        default=None, description="A file or block device of the host, used in place."
    )
    format: Literal["raw", "qcow2", "vmdk", "vhdx"] = Field(
        default="raw",
        description="Of what `path` names; never guessed. All but raw are served by"
        " qemu-storage-daemon, write-through, and without backing files.",
    )
    nbd: NbdUri | None = Field(
        default=None, description="A network block device, served by qemu-storage-daemon."
    )
    read_only: bool = False
    size_mib: int | None = Field(
        default=None,
        ge=1,
        le=64 * 1024 * 1024,
        description="Only with a writable image: grow this VM's copy to this size.",
    )
    cache: DiskCache = "writeback"
    io_engine: IoEngine = "auto"
    rate_limit: RateLimit | None = None
    rate_group: GroupId | None = Field(
        default=None, description="A rate group of the VM whose limit this disk shares."
    )

    @model_validator(mode="after")
    def _one_source(self) -> DiskCreate:
        if [self.image, self.path, self.nbd].count(None) != 2:
            raise ValueError("give exactly one of `image`, `path` and `nbd`")
        if self.format != "raw" and self.path is None:
            raise ValueError("`format` goes with `path` only: images are raw, NBD has its own")
        is_ours = self.format == "raw" and self.nbd is None
        ours = self.rate_limit or self.rate_group or self.io_engine != "auto"
        if ours and not is_ours:
            raise ValueError("`io_engine`, `rate_limit` and `rate_group` go with raw disks only")
        if self.size_mib is not None and (self.image is None or self.read_only):
            raise ValueError("`size_mib` goes with a writable `image` only")
        return self


class NicCreate(Request):
    """A virtio-net interface on a tap of the host, or on a switch."""

    id: DeviceId
    tap: InterfaceName | None = Field(
        default=None,
        description="Name of the tap to create, or of an existing persistent tap to use; "
        "left out, hosteld creates one and names it.",
    )
    mac: MacAddress | None = Field(
        default=None, description="Left out, derived from the VM's id and the device id."
    )
    mtu: int | None = Field(default=None, ge=68, le=65535)
    bridge: InterfaceName | None = Field(
        default=None, description="An existing bridge of the host that the tap joins."
    )
    backend: NetBackend = "auto"
    queues: int | None = Field(
        default=None,
        ge=1,
        le=8,
        description="Pairs of queues. Left out: one for each vCPU, at most 4, and one on a tap "
        "that is there and has one.",
    )
    link: Link = "up"
    rx_limit: RateLimit | None = Field(
        default=None,
        description="Of what the guest receives; an operation is a packet. What waits does so on "
        "the tap, which drops what it has no room for. Not with backend vhost; auto is tap then.",
    )
    tx_limit: RateLimit | None = Field(default=None, description="Of what the guest sends.")
    socket: HostPath | None = Field(
        default=None,
        description="In place of a tap: where a switch, such as OVS with DPDK, listens for"
        " vhost-user. It moves the packets itself.",
    )

    @model_validator(mode="after")
    def _of_its_kind(self) -> NicCreate:
        if self.backend == "vhost" and (self.rx_limit or self.tx_limit):
            raise ValueError("`rx_limit` and `tx_limit` do not go with backend vhost: take auto")
        ours = ("tap", "bridge", "backend", "queues", "link", "rx_limit", "tx_limit")
        fields = type(self).model_fields
        if self.socket is not None and any(getattr(self, n) != fields[n].default for n in ours):
            raise ValueError(f"`socket` goes without {', '.join(ours)}")
        return self


class VmCreate(Request):
    """A new VM."""

    name: Name
    vcpus: int = Field(default=1, ge=1, le=MAX_VCPUS)
    memory_mib: int = Field(default=256, ge=MIN_MEMORY_MIB, le=MAX_MEMORY_MIB)
    kernel: Ref = Field(description="An imported kernel.")
    initrd: Ref | None = Field(default=None, description="An imported image of kind initrd.")
    cmdline: Cmdline = "console=ttyS0 reboot=k panic=-1"
    disks: list[DiskCreate] = Field(
        default_factory=list, max_length=16, description="In the order that the guest sees."
    )
    rate_groups: list[RateGroupCreate] = Field(
        default_factory=list, max_length=16, description="Limits that its disks may share."
    )
    nics: list[NicCreate] = Field(default_factory=list, max_length=8)
    vsock: VsockCreate | None = Field(
        default=None, description="A virtio-vsock device; `{}` takes every default."
    )
    shares: list[ShareCreate] = Field(
        default_factory=list,
        max_length=4,
        description="Served by virtiofsd; hosteld must run as root.",
    )
    pmem: list[PmemCreate] = Field(
        default_factory=list, max_length=4, description="With shares, at most 4."
    )
    rng: bool = Field(default=True, description="Whether the guest has a virtio-rng device.")
    on_reboot: Literal["reset", "stop"] = Field(
        default="reset", description="What a guest's own reboot does."
    )
    on_panic: Literal["keep", "reset", "stop"] = Field(
        default="keep", description="What a guest panic that pvpanic reports does."
    )
    ports: list[PortCreate] = Field(
        default_factory=list, max_length=8, description="Of one virtio-console device."
    )
    watchdog: WatchdogCreate | None = Field(
        default=None, description="A watchdog timer; `{}` takes every default."
    )
    labels: Labels = Field(default_factory=dict)
    start: bool = Field(default=False, description="Start it at once.")

    @model_validator(mode="after")
    def _unique_devices(self) -> VmCreate:
        seen: set[str] = set()
        named: tuple[DiskCreate | NicCreate | PmemCreate, ...]
        named = (*self.disks, *self.nics, *self.pmem)
        for device_id in (device.id for device in named):
            if device_id in seen:
                raise ValueError(f"device id {device_id!r} is used twice")
            if device_id in OWN_DEVICES:
                raise ValueError(f"device id {device_id!r} is that of a device of Hostel's own")
            seen.add(device_id)
        if len({group.id for group in self.rate_groups}) < len(self.rate_groups):
            raise ValueError("a rate group's id is used twice")
        if len({share.tag for share in self.shares}) < len(self.shares):
            raise ValueError("a share's tag is used twice")
        if len(self.shares) + len(self.pmem) > MAX_SHARES_AND_PMEM:
            raise ValueError(
                f"{len(self.shares)} shares and {len(self.pmem)} pmem: at most"
                f" {MAX_SHARES_AND_PMEM} together, a PCI slot for each"
            )
        if len({port.name for port in self.ports}) < len(self.ports):
            raise ValueError("a port's name is used twice")
        if sum(port.console for port in self.ports) > 1:
            raise ValueError("only one port is the console")
        return self


class VmPatch(Request):
    """A change; what is left out stays. Shape changes need a stopped VM."""

    name: Name | None = None
    labels: Labels | None = None
    vcpus: int | None = Field(default=None, ge=1, le=MAX_VCPUS)
    memory_mib: int | None = Field(default=None, ge=MIN_MEMORY_MIB, le=MAX_MEMORY_MIB)
    kernel: Ref | None = None
    initrd: Ref | None = None
    cmdline: Cmdline | None = None
    on_reboot: Literal["reset", "stop"] | None = None
    on_panic: Literal["keep", "reset", "stop"] | None = None


class DiskPatch(Request):
    """A disk's new size, new limits, or other file, at once; what is left out stays."""

    path: HostPath | None = Field(
        default=None,
        description="Use this file or block device from now on; goes alone. A running guest is told"
        " of another size. What it wrote to the old file stays there.",
    )
    size_mib: int | None = Field(default=None, ge=1, le=64 * 1024 * 1024)
    rate_limit: RateLimit | None = Field(default=None, description="Null takes the limits away.")

    @model_validator(mode="after")
    def _something(self) -> DiskPatch:
        is_change = self.size_mib is not None or "rate_limit" in self.model_fields_set
        if is_change is (self.path is not None):
            raise ValueError("give `size_mib` or `rate_limit`, or `path` alone")
        return self


class NicPatch(Request):
    """A change of a network interface, at once; what is left out stays."""

    link: Link | None = None
    rx_limit: RateLimit | None = Field(default=None, description="Null takes the limits away.")
    tx_limit: RateLimit | None = Field(default=None, description="As rx_limit.")

    @model_validator(mode="after")
    def _something(self) -> NicPatch:
        if self.link is None and not self.model_fields_set & {"rx_limit", "tx_limit"}:
            raise ValueError("give `link`, `rx_limit` or `tx_limit`")
        return self


class StopRequest(Request):
    """How to stop: press the power button, wait, then kill."""

    timeout_s: float = Field(
        default=30.0, ge=0, le=3600, description="Seconds that the guest has to power off."
    )
    force: bool = Field(
        default=True, description="Kill the VM when the guest has not powered off in time."
    )


class Disk(Response):
    """A disk as it is."""

    id: str
    path: str = Field(description="Of the host; with format nbd the URI.")
    image: str | None
    format: Literal["raw", "qcow2", "vmdk", "vhdx", "nbd"]
    read_only: bool
    size_bytes: int
    cache: DiskCache
    io_engine: IoEngine
    rate_limit: RateLimit | None
    rate_group: str | None


class Nic(Response):
    """A network interface as it is."""

    id: str
    tap: str | None
    mac: str
    mtu: int | None
    bridge: str | None
    backend: NetBackend
    queues: int = Field(description="Pairs of queues that it may have; a guest may use fewer.")
    link: Link
    rx_limit: RateLimit | None
    tx_limit: RateLimit | None
    socket: str | None


class StateReason(Response):
    """Why a VM is in its state, when that is not what was asked for."""

    code: str = Field(
        description="Stable, for programs.",
        examples=["guest_poweroff", "worker_killed", "triple_fault", "kvm_internal_error"],
    )
    message: str
    at: Timestamp
    detail: dict[str, str | int] = Field(default_factory=dict)


class Vm(Response):
    """A virtual machine."""

    id: str
    name: str
    state: VmState
    reason: StateReason | None
    actions: list[VmAction] = Field(description="What its state allows now.")
    vcpus: int
    memory_mib: int
    kernel: str
    initrd: str | None
    cmdline: str
    disks: list[Disk]
    rate_groups: list[RateGroup]
    nics: list[Nic]
    vsock: Vsock | None
    shares: list[Share]
    pmem: list[Pmem]
    ports: list[Port]
    rng: bool
    on_reboot: Literal["reset", "stop"]
    on_panic: Literal["keep", "reset", "stop"]
    watchdog: Watchdog | None
    labels: dict[str, str]
    pid: int | None = Field(description="Process id of its worker while there is one.")
    boot_time_us: int | None = Field(
        description="From the start request to the guest's boot-timer write, in microseconds."
    )
    created_at: Timestamp
    started_at: Timestamp | None
    version: int = Field(description="Grows with every change; the ETag is made of it.")


class DiskDetails(Response):
    """A disk's queues, since the guest's driver started it."""

    io_engine: IoEngine = Field(description="What runs; `auto` until the driver has started it.")
    queues: list[dict[str, int]] = Field(description="Counters of each queue.")
    latency_limits_ns: list[int]
    latency: list[list[int]] = Field(
        description="How many requests of each queue took less than the limit in the same place, "
        "and no less than the one before; the last place has no limit."
    )


class NicDetails(Response):
    """A network interface's queues, since the guest's driver started it."""

    backend: Literal["vhost", "tap"] = Field(description="Who moves its packets.")
    active_pairs: int = Field(description="Pairs of queues that the guest uses.")
    queues: dict[str, dict[str, int]] = Field(
        description="Counters of each queue that the VM's process serves: `rx0`, `tx0` and so on "
        "with backend tap, and `control`."
    )


class VmStats(Response):
    """Counters of a running VM since its start."""

    vcpu_exits: dict[str, int]
    disks: dict[str, dict[str, int]]
    disk_details: dict[str, DiskDetails] = Field(default_factory=dict)
    nics: dict[str, dict[str, int]]
    nic_details: dict[str, NicDetails] = Field(default_factory=dict)
    vsock: dict[str, int] = Field(default_factory=dict, description="Empty without a vsock device.")
    pmem: dict[str, dict[str, int]] = Field(default_factory=dict)
    ports: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="Counters of each port, as the guest sees them."
    )
    memory_rss_bytes: int
    console_dropped_bytes: int


class ConsoleInput(Response):
    """What became of bytes typed into a console."""

    accepted_bytes: int = Field(
        description="How many were taken; send the rest again, the guest is slow to read."
    )
