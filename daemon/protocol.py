# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The control protocol between hosteld, the zygote and the workers.

One JSON object per SOCK_SEQPACKET message, file descriptors beside it by SCM_RIGHTS. Three shapes:

    {"id": 7, "op": "pause", "args": {...}}            request
    {"id": 7, "ok": {...}}                             reply
    {"id": 7, "error": {"code": ..., "message": ...}}  reply
    {"notice": "state", "data": {...}}                 unasked, from worker or zygote to hosteld

hosteld asks the zygote:
    fork     {"vm": id}, fds [listener, console, log, last_words] -> {"pid"}, fds [pidfd]
    and is told: notice hello, once it can fork; notice exited {"pid", "status"} (a wait status as
    os.waitpid gives it)
hosteld asks a worker, over its own listening socket (so that a later hosteld finds it again):
    launch        MachineSpec, fds as the spec indexes them -> Status
    status        -> Status
    pause, resume, reset, power_button, ctrl_alt_del -> Status
    attach        {"first_fd": Status.next_fd, "disks": [DiskSpec], "nics": [NicSpec]}, fds as the
                  specs index them, from first_fd on -> Status
    detach        {"device": id, "force": bool} -> Status; without force the guest is asked, and a
                  later Status without the device tells that it has let go
    keep          {"device": id} takes a detach back -> Status, which tells who was faster
    resize_disk   {"disk": id} after the file has changed -> {"size_bytes"}
    swap_disk     {"disk": id, "swaps": as in DiskSpec}, fds [its new file] -> Status; on failure
                  it keeps the one that it has
    limit_disk    {"disk": id, "rate_limit": as in DiskSpec} -> {}
    limit_group   {"group": id, "rate_limit": as in DiskSpec} -> {}
    set_nic       {"nic": id, "wishes": NicWishes} -> {}
    attach_backend {"device": id}, fds [socket connected to its new vhost-user back end] -> Status
    console_write {"data": base64} -> {"taken": n}
    stats         -> VmStats as api/models/vms.py has it, without memory_rss_bytes
    quit          ends the worker in good order -> {}
    and is told: notice state, data a Status
"""

from __future__ import annotations

import array
import json
import socket
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from .errors import ProtocolError

# Linux refuses more in one message: SCM_MAX_FD in include/net/scm.h.
MAX_FDS: Final = 253
# A launch with 16 disks and 8 NICs is under 8 KiB; console input comes in pieces of 32 KiB.
MAX_MESSAGE_BYTES: Final = 128 * 1024
# The PCI slots of disks and of network interfaces, as many as a VM may have of each; what else
# there is takes the rest.
DISK_SLOTS: Final = range(1, 17)
NIC_SLOTS: Final = range(17, 25)
OTHER_SLOTS: Final = range(25, 32)
_RECEIVE_FLAGS: Final = socket.MSG_CMSG_CLOEXEC


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """A virtio-blk disk; ``fd`` indexes the message's descriptors.

    It is the disk itself, or with ``vhost_user`` a socket connected to the disk's back end.

    Attributes:
        rate_limit: fields of kvm_ffi.rate_limiter.RateLimit; what is missing is no limit.
        slot: of DISK_SLOTS; None for the first free one.
        swaps: a number that hosteld gives to the file behind the disk; another file has another.
        rate_group: of MachineSpec.rate_groups; its limits hold too.
    """

    id: str
    fd: int
    read_only: bool
    io_engine: str = "auto"
    rate_limit: dict[str, int] = field(default_factory=dict)
    slot: int | None = None
    vhost_user: bool = False
    swaps: int = 0
    rate_group: str | None = None


@dataclass(frozen=True, slots=True)
class NicWishes:
    """What of an interface may change while its VM runs.

    Attributes:
        is_link_up: whether its cable is plugged in.
        rx_limit: of what the guest receives, as DiskSpec's rate_limit.
        tx_limit: of what it sends.
    """

    is_link_up: bool
    rx_limit: dict[str, int]
    tx_limit: dict[str, int]

    @classmethod
    def decode(cls, args: object) -> NicWishes:
        """Build them from JSON.

        Raises:
            ProtocolError: a field is missing, unknown or of the wrong type.
        """
        try:
            wishes = cls(**args)  # type: ignore[arg-type]  # checked by **
        except TypeError as err:
            raise ProtocolError(f"nic: {err}") from err
        limits: tuple[object, ...] = (wishes.rx_limit, wishes.tx_limit)
        are_limits = all(
            isinstance(limit, dict) and all(type(n) is int for n in limit.values())
            for limit in limits
        )
        if not are_limits or wishes.is_link_up not in (True, False):
            raise ProtocolError("nic: is_link_up is a boolean, limits are objects of numbers")
        return wishes


@dataclass(frozen=True, slots=True)
class NicSpec:
    """A virtio-net interface.

    Attributes:
        tap_fds: a tap opened with IFF_VNET_HDR, once for each pair of queues.
        vhost_fds: /dev/vhost-net for each of these, or empty: the worker moves packets itself.
        wishes: what may change later.
        slot: of NIC_SLOTS; None for the first free one.
        vhost_user: ``tap_fds`` is one socket instead, connected to a switch.
    """

    id: str
    tap_fds: tuple[int, ...]
    vhost_fds: tuple[int, ...]
    mac: str
    mtu: int | None
    wishes: NicWishes
    slot: int | None = None
    vhost_user: bool = False

    @classmethod
    def decode(cls, args: dict[str, Any]) -> NicSpec:
        """Build the spec from JSON, which has no tuples."""
        fds = {name: tuple(args[name]) for name in ("tap_fds", "vhost_fds")}
        return cls(**{**args, **fds, "wishes": NicWishes.decode(args["wishes"])})


@dataclass(frozen=True, slots=True)
class VsockSpec:
    """A virtio-vsock device.

    Attributes:
        fds: a listening Unix socket, and the directory of those that the guest connects to; or
            /dev/vhost-vsock alone, which knows the CID.
        socket_name: of the sockets in the directory, up to the "_"; None with vhost.
    """

    cid: int
    fds: tuple[int, ...]
    socket_name: str | None

    @classmethod
    def decode(cls, args: dict[str, Any]) -> VsockSpec:
        """Build the spec from JSON, which has no tuples."""
        return cls(**{**args, "fds": tuple(args["fds"])})


@dataclass(frozen=True, slots=True)
class ShareSpec:
    """A virtio-fs device; ``fd`` is a socket connected to its back end.

    Attributes:
        id: of the device; not one that a disk or an interface can have.
        is_libvhost: the back end is built on libvhost-user: devices/virtio/vhost_user/link.py.
    """

    id: str
    tag: str
    fd: int
    is_libvhost: bool


@dataclass(frozen=True, slots=True)
class PortSpec:
    """A port of the virtio-console device; ``fd`` is a listening Unix socket."""

    name: str
    is_console: bool
    fd: int


@dataclass(frozen=True, slots=True)
class PmemSpec:
    """A virtio-pmem device; ``fd`` is its file, of which ``size_bytes`` are the guest's."""

    id: str
    fd: int
    size_bytes: int
    read_only: bool


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """All that a worker needs to build its machine; fd fields index the message's descriptors.

    Attributes:
        requested_ns: CLOCK_MONOTONIC of the request that started the VM; boot time counts from it.
        setup_header: hex of the bzImage's setup header, empty for an ELF kernel.
        entry: "linux64" or "pvh".
        watchdog: what is done when it expires, "reset", "poweroff", "pause" or "none"; None for no
            watchdog.
        rate_groups: limits, as DiskSpec's rate_limit, that disks share; by id.
    """

    vm_id: str
    vcpus: int
    memory_bytes: int
    cmdline: str
    entry: str
    setup_header: str
    kvm_fd: int
    kernel_fd: int
    initrd_fd: int | None
    disks: tuple[DiskSpec, ...]
    nics: tuple[NicSpec, ...]
    rng: bool
    on_reboot: str
    on_panic: str
    requested_ns: int
    vsock: VsockSpec | None = None
    shares: tuple[ShareSpec, ...] = ()
    watchdog: str | None = None
    ports: tuple[PortSpec, ...] = ()
    pmem: tuple[PmemSpec, ...] = ()
    rate_groups: dict[str, dict[str, int]] = field(default_factory=dict)

    def encode(self) -> dict[str, Any]:
        """Return the spec as JSON."""
        # dataclasses.asdict() copies deeply, which would be a tenth of a launch.
        spec = {name: getattr(self, name) for name in self.__slots__}
        spec["disks"] = [asdict(disk) for disk in self.disks]
        spec["nics"] = [asdict(nic) for nic in self.nics]
        spec["vsock"] = None if self.vsock is None else asdict(self.vsock)
        spec["shares"] = [asdict(share) for share in self.shares]
        spec["ports"] = [asdict(port) for port in self.ports]
        spec["pmem"] = [asdict(pmem) for pmem in self.pmem]
        return spec

    def disk(self, disk_id: str) -> DiskSpec:
        """Return one of the disks.

        Raises:
            StopIteration: there is none of this id.
        """
        return next(disk for disk in self.disks if disk.id == disk_id)

    def with_disk(self, disk_id: str, **changes: Any) -> MachineSpec:  # noqa: ANN401 - any field
        """Return the spec with one disk changed."""
        disks = (replace(disk, **changes) if disk.id == disk_id else disk for disk in self.disks)
        return replace(self, disks=tuple(disks))

    def with_nic_wishes(self, nic_id: str, wishes: NicWishes) -> MachineSpec:
        """Return the spec with other wishes for one interface."""
        nics = (replace(nic, wishes=wishes) if nic.id == nic_id else nic for nic in self.nics)
        return replace(self, nics=tuple(nics))

    @classmethod
    def decode(cls, args: dict[str, Any]) -> MachineSpec:
        """Build the spec from JSON.

        Raises:
            ProtocolError: a field is missing, unknown or misshapen.
        """
        if missing := set(cls.__slots__) - args.keys():
            raise ProtocolError(f"launch: without {', '.join(sorted(missing))}")
        try:
            fields = dict(args)
            fields["disks"] = tuple(DiskSpec(**disk) for disk in fields["disks"])
            fields["nics"] = tuple(NicSpec.decode(nic) for nic in fields["nics"])
            vsock = fields["vsock"]
            fields["vsock"] = None if vsock is None else VsockSpec.decode(vsock)
            fields["shares"] = tuple(ShareSpec(**share) for share in fields["shares"])
            fields["ports"] = tuple(PortSpec(**port) for port in fields["ports"])
            fields["pmem"] = tuple(PmemSpec(**pmem) for pmem in fields["pmem"])
            return cls(**fields)
        except (KeyError, TypeError) as err:
            raise ProtocolError(f"launch: {err}") from err

    def part(self, args: dict[str, Any]) -> MachineSpec:
        """Return a spec of the same machine that has the devices of an attach, and no others.

        Raises:
            ProtocolError: as decode().
        """
        fresh = {"disks": args.get("disks", []), "nics": args.get("nics", [])}
        nothing: dict[str, Any] = {"vsock": None, "rng": False}
        nothing |= {"shares": [], "ports": [], "pmem": []}
        return self.decode({**self.encode(), **fresh, **nothing})

    def joined(self, part: MachineSpec) -> MachineSpec:
        """Return the spec with the devices of a part as its last ones."""
        disks, nics = (*self.disks, *part.disks), (*self.nics, *part.nics)
        return replace(self, disks=disks, nics=nics)

    def without(self, ids: Collection[str]) -> MachineSpec:
        """Return the spec without some disks and network interfaces."""
        return replace(
            self,
            disks=tuple(disk for disk in self.disks if disk.id not in ids),
            nics=tuple(nic for nic in self.nics if nic.id not in ids),
        )


@dataclass(frozen=True, slots=True)
class Status:
    """A worker's actual state.

    Attributes:
        state: "empty" before launch, then "running", "paused", "crashed" or "stopped" (on its way
            out).
        reason: {"code", "message", "detail"} where the state is not what hosteld asked for.
        boot_time_us: from MachineSpec.requested_ns to the guest's boot-timer write.
        resets: how often the machine has been built anew.
        devices: ids of the disks and network interfaces that the guest has; None from a worker
            that cannot change them.
        next_fd: the index of the next descriptor that an attach brings.
        backends_lost: why there is no connection to a vhost-user back end, by device id.
        watchdog_expired: how often since the launch.
        swaps: of DiskSpec, by disk id; of those that the worker serves itself.
        disk_errors: by disk id {"count", "error"}: how many requests the disk's file has failed in
            the worker's life, as far as it is time to tell, and the errno's name of the last one.
    """

    state: str
    vm_id: str
    pid: int
    reason: dict[str, Any] | None = None
    boot_time_us: int | None = None
    resets: int = 0
    devices: tuple[str, ...] | None = None
    next_fd: int = 0
    backends_lost: dict[str, str] = field(default_factory=dict)
    watchdog_expired: int = 0
    swaps: dict[str, int] = field(default_factory=dict)
    disk_errors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def encode(self) -> dict[str, Any]:
        """Return the status as JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def decode(cls, data: dict[str, Any]) -> Status:
        """Build the status from JSON.

        Raises:
            ProtocolError: a field is missing, unknown or of the wrong type.
        """
        reason, boot_time_us = data.get("reason"), data.get("boot_time_us")
        is_sound = (
            isinstance(data.get("state"), str)
            and isinstance(data.get("vm_id"), str)
            and isinstance(data.get("pid"), int)
            and isinstance(boot_time_us, int | None)
            and isinstance(reason, dict | None)
            and isinstance(data.get("backends_lost", {}), dict)
            and isinstance(data.get("swaps", {}), dict)
            and _are_disk_errors(data.get("disk_errors", {}))
        )
        if is_sound and reason is not None:
            shapes = {"code": str, "message": str, "detail": dict}
            is_sound = all(isinstance(reason.get(name), kind) for name, kind in shapes.items())
        devices = data.get("devices")
        numbers = (data.get(name, 0) for name in ("next_fd", "watchdog_expired"))
        is_sound = is_sound and all(isinstance(number, int) for number in numbers)
        is_sound = is_sound and isinstance(devices, list | tuple | None)
        if is_sound and devices is not None:
            is_sound = all(isinstance(name, str) for name in devices)
            data = {**data, "devices": tuple(devices)}
        if not is_sound:
            raise ProtocolError("status: a field is missing or has the wrong type")
        try:
            return cls(**data)
        except TypeError as err:
            raise ProtocolError(f"status: {err}") from err


def _are_disk_errors(errors: object) -> bool:
    return isinstance(errors, dict) and all(
        isinstance(told, dict)
        and type(told.get("count")) is int
        and isinstance(told.get("error"), str)
        for told in errors.values()
    )


@dataclass(frozen=True, slots=True)
class Message:
    """One message with its descriptors, which the receiver owns."""

    body: dict[str, Any]
    fds: tuple[int, ...] = field(default=())


def send(sock: socket.socket, body: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    """Send one message; the caller keeps its descriptors.

    Raises:
        ProtocolError: too large.
        OSError: the peer has gone, or a non-blocking socket is full.
    """
    data = json.dumps(body, separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE_BYTES or len(fds) > MAX_FDS:
        raise ProtocolError(f"message of {len(data)} bytes and {len(fds)} descriptors is too large")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> Message | None:
    """Receive one message; None when the peer has closed.

    Raises:
        ProtocolError: not a JSON object, or truncated; its descriptors are closed.
        OSError: as recvmsg(2), BlockingIOError on a non-blocking socket included.
    """
    data, ancillary, flags, _ = sock.recvmsg(
        MAX_MESSAGE_BYTES, socket.CMSG_SPACE(MAX_FDS * 4), _RECEIVE_FLAGS
    )
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if not data and not fds:
        return None
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ProtocolError("message was cut short")
        body = json.loads(data)
        if not isinstance(body, dict):
            raise ProtocolError("message is not a JSON object")
    except (ValueError, RecursionError) as err:
        close_all(fds)
        raise ProtocolError(f"message is not JSON: {err}") from err
    except ProtocolError:
        close_all(fds)
        raise
    return Message(body, tuple(fds))


def close_all(fds: array.array[int] | tuple[int, ...]) -> None:
    """Close descriptors that a message brought."""
    for fd in fds:
        socket.close(fd)
