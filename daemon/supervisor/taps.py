# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Taps: made or attached to, brought up, put on a bridge; and vhost-net to serve them.

By ioctl, and not by netlink: five requests do not need a library that takes 0.2 s (and in an
emulated host many seconds) to import. A tap that is made here is not persistent: it vanishes with
the last descriptor, and the last one is the worker's. One that was there before stays.

Source: Linux Documentation/networking/tuntap.rst, netdevice(7).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import Final

from api.errors import ApiError, Conflict, HostFailure, Invalid

from .records import NicRecord

_TUN_DEVICE: Final = "/dev/net/tun"
_VHOST_DEVICE: Final = "/dev/vhost-net"
_SYS_NET: Final = Path("/sys/class/net")

# Linux include/uapi/linux/if_tun.h: TUNSETIFF is _IOW('T', 202, int).
_TUNSETIFF: Final = (1 << 30) | (4 << 16) | (ord("T") << 8) | 202
_IFF_TAP: Final = 0x0002
_IFF_MULTI_QUEUE: Final = 0x0100
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
# Linux include/uapi/linux/sockios.h and if.h.
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_SIOCGIFMTU: Final = 0x8921
_SIOCSIFMTU: Final = 0x8922
_SIOCBRADDIF: Final = 0x89A2
_IFF_UP: Final = 0x1
_TAP_COUNTERS: Final = ("packets", "bytes", "dropped")
# struct ifreq: 16 bytes of name, then a union of 24.
_IFREQ_FLAGS: Final = struct.Struct("=16sH22x")
_IFREQ_INT: Final = struct.Struct("=16si20x")


def check_name(name: str, field: str) -> None:
    """Refuse the name of a host interface that is no tap.

    Args:
        name: client-controlled, checked for length and characters before.
        field: of the request, for the error.

    Raises:
        Invalid: such an interface is there.
    """
    directory = _SYS_NET / name
    if directory.exists() and not (directory / "tun_flags").exists():
        raise Invalid(
            "tap_taken",
            f"{name} is an interface of the host and no tap; choose another name, or leave it out",
            field=field,
        )


def check_bridge(name: str, field: str) -> None:
    """Refuse a bridge that is not there.

    Raises:
        Invalid: no such interface, or not a bridge.
    """
    if not (_SYS_NET / name / "bridge").is_dir():
        raise Invalid(
            "bridge_missing",
            f"{name} is no bridge of this host; make it with: ip link add {name} type bridge",
            field=field,
        )


def open_taps(nic: NicRecord, index: int, n_pairs: int) -> list[int]:
    """Open a VM's tap, up and on its bridge, and return a descriptor for each of its queues.

    Args:
        nic: what the tap must be.
        index: of the interface in its VM, for errors.
        n_pairs: how many queues it is to have; a tap that is there and has one queue keeps it,
            unless the VM insists.

    Raises:
        ApiError: it is in use, not ours to use, or the host cannot make it; says what to do.

    Threads: any; may block for the kernel's network lock.
    """
    field = f"nics.{index}.tap"
    wanted = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    have = _tun_flags(nic.tap)
    if have is None:
        wanted |= _IFF_MULTI_QUEUE if n_pairs > 1 else 0
    elif have & _IFF_MULTI_QUEUE:
        wanted |= _IFF_MULTI_QUEUE
    elif n_pairs > 1:
        n_pairs = _one_queue(nic, index)
    fds: list[int] = []
    try:
        for _ in range(n_pairs):
            fds.append(_open_tun())
            _attach(fds[-1], nic.tap, wanted, field)
        if wanted & _IFF_MULTI_QUEUE:
            _check_alone(nic.tap, n_pairs, field)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            _configure(sock, nic, index)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def _open_tun() -> int:
    try:
        return os.open(_TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        raise HostFailure(
            "tun_unavailable",
            f"{_TUN_DEVICE}: {err.strerror}; load it with: modprobe tun, and check its permissions",
        ) from err


def _tun_flags(name: str) -> int | None:
    """Return the flags of a tap that is there already, or None."""
    try:
        return int((_SYS_NET / name / "tun_flags").read_text(), 16)
    except OSError:
        return None


def _one_queue(nic: NicRecord, index: int) -> int:
    """Make do with a tap's one queue.

    Raises:
        Invalid: the VM asks for more by name.
    """
    if nic.queues is None:
        return 1
    raise Invalid(
        "tap_queues",
        f"queues={nic.queues}: tap {nic.tap} was made with one; make it with multi_queue, or leave"
        " queues out",
        field=f"nics.{index}.queues",
    )


def _check_alone(name: str, n_queues: int, field: str) -> None:
    """Refuse a tap that others read as well: one of several queues takes any number of readers.

    Raises:
        Conflict: it has more queues than we have opened.
    """
    if len(list((_SYS_NET / name / "queues").glob("tx-*"))) > n_queues:
        raise Conflict("tap_in_use", f"tap {name} is in use by another program", field=field)


def open_vhost(nic: NicRecord, index: int, count: int) -> list[int]:
    """Open vhost-net ``count`` times; none where the engine of the worker is to move the packets.

    Args:
        nic: says which of the two.
        index: of the interface in its VM, for errors.
        count: of pairs of queues.

    Raises:
        HostFailure: the VM insists on vhost, and the host has none.

    Threads: any; may block while the kernel loads the module.
    """
    fds: list[int] = []
    if nic.backend == "tap" or nic.rx_limit or nic.tx_limit:
        return fds  # vhost knows no limits
    try:
        for _ in range(count):
            fds.append(os.open(_VHOST_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as err:
        for fd in fds:
            os.close(fd)
        if nic.backend == "auto":
            return []
        raise HostFailure(
            "vhost_unavailable",
            f"{_VHOST_DEVICE}: {err.strerror}; load it with: modprobe vhost_net, check its"
            " permissions, or take backend auto",
            field=f"nics.{index}.backend",
        ) from err
    return fds


def counters(tap: str) -> dict[str, int]:
    """Return what the kernel counted on a tap, as its guest sees it; empty when it has gone."""
    directory = _SYS_NET / tap / "statistics"
    sides = (("rx", "tx"), ("tx", "rx"))  # what the tap sends, the guest receives
    names = [(f"{to}_{what}", f"{of}_{what}") for to, of in sides for what in _TAP_COUNTERS]
    try:
        return {ours: int((directory / theirs).read_text()) for ours, theirs in names}
    except (OSError, ValueError):
        return {}


def _attach(fd: int, name: str, flags: int, field: str) -> None:
    request = _IFREQ_FLAGS.pack(name.encode(), flags)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, request)
    except OSError as err:
        raise _attach_error(err, name, field) from err


def _attach_error(err: OSError, name: str, field: str) -> ApiError:
    if err.errno == errno.EBUSY:
        return Conflict("tap_in_use", f"tap {name} is in use by another VM or program", field=field)
    if err.errno in (errno.EPERM, errno.EACCES):
        return HostFailure(
            "tap_permission",
            f"tap {name}: this hosteld lacks CAP_NET_ADMIN; run it as root, or have root make a tap"
            f" for it and name that (--nic net0,tap={name}): ip tuntap add {name} mode tap vnet_hdr"
            f" user {os.geteuid()} && ip link set {name} up",
            field=field,
        )
    if err.errno == errno.EINVAL:
        return Invalid(
            "tap_taken",
            f"{name} is there and is no tap with vnet_hdr; choose another name",
            field=field,
        )
    return HostFailure("tap_failed", f"tap {name}: {err.strerror}", field=field)


def _configure(sock: socket.socket, nic: NicRecord, index: int) -> None:
    name = nic.tap.encode()
    step, field = "mtu", f"nics.{index}.mtu"
    try:
        if nic.mtu is not None and _get_int(sock, _SIOCGIFMTU, name) != nic.mtu:
            fcntl.ioctl(sock, _SIOCSIFMTU, _IFREQ_INT.pack(name, nic.mtu))
        step, field = "bridge", f"nics.{index}.bridge"
        if nic.bridge is not None and not _is_on_bridge(nic.tap, nic.bridge):
            tap_index = socket.if_nametoindex(nic.tap)
            fcntl.ioctl(sock, _SIOCBRADDIF, _IFREQ_INT.pack(nic.bridge.encode(), tap_index))
        step, field = "up", f"nics.{index}.tap"
        # Last, so that nothing is sent before it stands where it belongs. Asked first, so that a
        # tap that root has prepared needs no capability.
        flags = _IFREQ_FLAGS.unpack(fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ_FLAGS.pack(name, 0)))[1]
        if not flags & _IFF_UP:
            fcntl.ioctl(sock, _SIOCSIFFLAGS, _IFREQ_FLAGS.pack(name, flags | _IFF_UP))
    except OSError as err:
        raise _configure_error(err, nic, step, field) from err


def _configure_error(err: OSError, nic: NicRecord, step: str, field: str) -> ApiError:
    if err.errno in (errno.EPERM, errno.EACCES):
        return HostFailure(
            "tap_permission",
            f"tap {nic.tap}: setting its {step} needs CAP_NET_ADMIN; run hosteld as root, or"
            " prepare the tap with ip link set",
            field=field,
        )
    if step == "bridge":
        return Invalid(
            "bridge_failed",
            f"tap {nic.tap} cannot join {nic.bridge}: {err.strerror}; it must be a bridge of this"
            " host, and the tap on no other",
            field=field,
        )
    if step == "mtu":
        return Invalid(
            "mtu_refused", f"tap {nic.tap} refuses mtu {nic.mtu}: {err.strerror}", field=field
        )
    return HostFailure("tap_failed", f"tap {nic.tap}: {step}: {err.strerror}", field=field)


def _get_int(sock: socket.socket, request: int, name: bytes) -> int:
    return int(_IFREQ_INT.unpack(fcntl.ioctl(sock, request, _IFREQ_INT.pack(name, 0)))[1])


def _is_on_bridge(tap: str, bridge: str) -> bool:
    link = _SYS_NET / tap / "brport" / "bridge"
    return link.exists() and link.resolve().name == bridge
