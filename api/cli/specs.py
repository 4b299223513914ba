# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Reads devices as they are written on a command line.

A disk: ``ID=image:NAME``, ``ID=path:FILE``, ``ID=FILE`` or ``ID=nbd://...``, then any of ``,ro
,size=MIB ,format=qcow2|vmdk|vhdx ,cache=writeback|none ,io=auto|io_uring|threads ,bps=BYTES
,iops=OPERATIONS ,group=RATE-GROUP``. A rate group: ``ID``, then any of ``,bps=BYTES
,iops=OPERATIONS``. A share: ``TAG=DIRECTORY``, then perhaps ``,ro``.
A network interface: ``ID``, then any of ``,tap=NAME ,bridge=NAME ,mac=MAC ,mtu=BYTES
,backend=auto|vhost|tap ,queues=PAIRS ,link=up|down``, or ``,socket=PATH`` of a vhost-user switch in
place of a tap.
Persistent memory: ``ID=FILE``, then perhaps ``,ro``.
A console port: ``NAME``, then perhaps ``,console``.
A vsock device: ``auto``, ``unix`` or ``vhost``, then ``,cid=N`` if it is to be a certain one.

A path is one of the daemon's host; where it does not begin with ``/`` it is taken from here. A
disk's file has a ``/`` in it or ``path:`` before it: a bare word is neither a file nor an image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

_DISK_WORDS: Final = {
    "format": "format",
    "cache": "cache",
    "io": "io_engine",
    "group": "rate_group",
}
_RATES: Final = {"bps": "bytes_per_s", "iops": "ops_per_s"}
_NIC_OPTIONS: Final = ("tap", "bridge", "mac", "mtu", "backend", "queues", "link", "socket")


class BadSpec(ValueError):
    """A device as it was written cannot be read."""


def parse_disk(text: str) -> dict[str, Any]:
    """Return the fields of a DiskCreate."""
    disk_id, equals, rest = text.partition("=")
    source, *options = rest.split(",")
    if not (disk_id and equals and source):
        raise BadSpec(f"disk {text!r}: write ID=image:NAME or ID=FILE, such as root=image:debian")
    disk: dict[str, Any] = {"id": disk_id, **_disk_source(text, source)}
    for option in options:
        name, _, value = option.partition("=")
        if option == "ro":
            disk["read_only"] = True
        elif name == "size":
            disk["size_mib"] = _number(text, name, value)
        elif name in _DISK_WORDS:
            disk[_DISK_WORDS[name]] = value
        elif name in _RATES:
            disk.setdefault("rate_limit", {})[_RATES[name]] = _number(text, name, value)
        else:
            known = ", ".join(("ro", "size=MIB", *_DISK_WORDS, *_RATES))
            raise BadSpec(f"disk {text!r}: unknown option {option!r}; known: {known}")
    return disk


def _disk_source(text: str, source: str) -> dict[str, str]:
    kind, colon, value = source.partition(":")
    if colon and kind == "image":
        return {"image": value}
    if colon and kind == "path":
        return {"path": absolute(value)}
    if kind in {"nbd", "nbd+unix"}:
        return {"nbd": source}
    if "/" in source and "://" not in source:
        return {"path": absolute(source)}
    raise BadSpec(
        f"disk {text!r}: {source!r} must be image:NAME, nbd://..., or a file with a / in it, such"
        f" as ./{source}"
    )


def parse_rate_group(text: str) -> dict[str, Any]:
    """Return the fields of a RateGroupCreate."""
    group_id, *options = text.split(",")
    limits: dict[str, int] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in _RATES:
            known = ", ".join(_RATES)
            raise BadSpec(f"rate group {text!r}: unknown option {option!r}; known: {known}")
        limits[_RATES[name]] = _number(text, name, value)
    return {"id": group_id, "rate_limit": limits or None}


def parse_share(text: str) -> dict[str, Any]:
    """Return the fields of a ShareCreate."""
    tag, equals, rest = text.partition("=")
    path, *options = rest.split(",")
    if not (tag and equals and path) or options not in ([], ["ro"]):
        raise BadSpec(f"share {text!r}: write TAG=DIRECTORY or TAG=DIRECTORY,ro")
    return {"tag": tag, "path": absolute(path), "read_only": bool(options)}


def parse_nic(text: str) -> dict[str, Any]:
    """Return the fields of a NicCreate."""
    nic_id, *options = text.split(",")
    nic: dict[str, Any] = {"id": nic_id}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or name not in _NIC_OPTIONS:
            known = ", ".join(_NIC_OPTIONS)
            raise BadSpec(f"nic {text!r}: unknown option {option!r}; known: {known}")
        nic[name] = _number(text, name, value) if name in {"mtu", "queues"} else value
    if nic.get("socket"):
        nic["socket"] = absolute(nic["socket"])
    return nic


def parse_pmem(text: str) -> dict[str, Any]:
    """Return the fields of a PmemCreate."""
    pmem_id, equals, rest = text.partition("=")
    path, *options = rest.split(",")
    if not (pmem_id and equals and path) or options not in ([], ["ro"]):
        raise BadSpec(f"pmem {text!r}: write ID=FILE or ID=FILE,ro")
    return {"id": pmem_id, "path": absolute(path), "read_only": bool(options)}


def parse_port(text: str) -> dict[str, Any]:
    """Return the fields of a PortCreate."""
    name, *options = text.split(",")
    if options not in ([], ["console"]):
        raise BadSpec(f"port {text!r}: write NAME or NAME,console")
    return {"name": name, "console": bool(options)}


def parse_vsock(text: str) -> dict[str, Any]:
    """Return the fields of a VsockCreate."""
    backend, *options = text.split(",")
    vsock: dict[str, Any] = {"backend": backend}
    for option in options:
        name, _, value = option.partition("=")
        if name != "cid":
            raise BadSpec(f"vsock {text!r}: unknown option {option!r}; known: cid")
        vsock["cid"] = _number(text, name, value)
    return vsock


def parse_label(text: str) -> tuple[str, str]:
    """Return key and value of ``KEY=VALUE``."""
    key, equals, value = text.partition("=")
    if not equals:
        raise BadSpec(f"label {text!r}: write KEY=VALUE")
    return key, value


def absolute(path: str) -> str:
    """Return a path of the daemon's host as an absolute one; "" is no path and stays."""
    return str(Path(path).absolute()) if path else path


def _number(text: str, name: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise BadSpec(f"{text!r}: {name}={value!r} must be a whole number")
    return int(value)
