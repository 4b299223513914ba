# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Reads devices as they are written on a command line.

A disk: ``ID=image:NAME``, ``ID=path:/FILE``, ``ID=/FILE`` or ``ID=nbd://...``, then any of ``,ro
,size=MIB ,format=qcow2|vmdk|vhdx ,cache=writeback|none ,io=auto|io_uring|threads ,bps=BYTES
,iops=OPERATIONS``. A share: ``TAG=/DIRECTORY``, then perhaps ``,ro``.
A network interface: ``ID``, then any of ``,tap=NAME ,bridge=NAME ,mac=MAC ,mtu=BYTES
,backend=auto|vhost|tap ,queues=PAIRS ,link=up|down``, or ``,socket=PATH`` of a vhost-user switch in
place of a tap.
Persistent memory: ``ID=/FILE``, then perhaps ``,ro``.
A console port: ``NAME``, then perhaps ``,console``.
A vsock device: ``auto``, ``unix`` or ``vhost``, then ``,cid=N`` if it is to be a certain one.
"""

from __future__ import annotations

from typing import Any, Final

_DISK_WORDS: Final = {"format": "format", "cache": "cache", "io": "io_engine"}
_DISK_RATES: Final = {"bps": "bytes_per_s", "iops": "ops_per_s"}
_NIC_OPTIONS: Final = ("tap", "bridge", "mac", "mtu", "backend", "queues", "link", "socket")


class BadSpec(ValueError):
    """A device as it was written cannot be read."""


def parse_disk(text: str) -> dict[str, Any]:
    """Return the fields of a DiskCreate."""
    disk_id, equals, rest = text.partition("=")
    source, *options = rest.split(",")
    if not (disk_id and equals and source):
        raise BadSpec(f"disk {text!r}: write ID=image:NAME or ID=/FILE, such as root=image:debian")
    disk: dict[str, Any] = {"id": disk_id}
    kind, colon, value = source.partition(":")
    if source.startswith("/"):
        disk["path"] = source
    elif colon and kind in {"image", "path"}:
        disk[kind] = value
    elif kind in {"nbd", "nbd+unix"}:
        disk["nbd"] = source
    else:
        raise BadSpec(
            f"disk {text!r}: {source!r} must be image:NAME, path:/FILE, /FILE or nbd://..."
        )
    for option in options:
        name, _, value = option.partition("=")
        if option == "ro":
            disk["read_only"] = True
        elif name == "size":
            disk["size_mib"] = _number(text, name, value)
        elif name in _DISK_WORDS:
            disk[_DISK_WORDS[name]] = value
        elif name in _DISK_RATES:
            disk.setdefault("rate_limit", {})[_DISK_RATES[name]] = _number(text, name, value)
        else:
            known = ", ".join(("ro", "size=MIB", *_DISK_WORDS, *_DISK_RATES))
            raise BadSpec(f"disk {text!r}: unknown option {option!r}; known: {known}")
    return disk


def parse_share(text: str) -> dict[str, Any]:
    """Return the fields of a ShareCreate."""
    tag, equals, rest = text.partition("=")
    path, *options = rest.split(",")
    if not (tag and equals and path) or options not in ([], ["ro"]):
        raise BadSpec(f"share {text!r}: write TAG=/DIRECTORY or TAG=/DIRECTORY,ro")
    return {"tag": tag, "path": path, "read_only": bool(options)}


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
    return nic


def parse_pmem(text: str) -> dict[str, Any]:
    """Return the fields of a PmemCreate."""
    pmem_id, equals, rest = text.partition("=")
    path, *options = rest.split(",")
    if not (pmem_id and equals and path) or options not in ([], ["ro"]):
        raise BadSpec(f"pmem {text!r}: write ID=/FILE or ID=/FILE,ro")
    return {"id": pmem_id, "path": path, "read_only": bool(options)}


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


def _number(text: str, name: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise BadSpec(f"{text!r}: {name}={value!r} must be a whole number")
    return int(value)
