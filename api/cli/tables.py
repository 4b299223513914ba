# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Tables for people."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..models.devices import Vsock
from ..models.limits import RateLimit
from ..models.resources import DoctorReport, Event, Host, Image, Kernel, Operation
from ..models.vms import Nic, Vm, VmStats

PIPE_COLUMNS: Final = 1000
_TIERS: Final = {
    "any": "no KVM that can be used, so no VM runs here",
    "direct": "KVM interprets ring 0, so tiny guests run here and no stock kernels",
    "full": "stock kernels run here",
}
_STYLES: Final = {
    "running": "green",
    "ok": "green",
    "succeeded": "green",
    "paused": "yellow",
    "warning": "yellow",
    "crashed": "red",
    "missing": "red",
    "failed": "red",
}


def _print(table: Table) -> None:
    # A pipe gets whole lines: programs and grep must not meet a value that is cut or wrapped.
    console = Console() if sys.stdout.isatty() else Console(width=PIPE_COLUMNS)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    _print(table)


def _cell(value: str) -> str:
    style = _STYLES.get(value)
    return f"[{style}]{value}[/]" if style else escape(value)


def _print_fields(fields: Sequence[tuple[str, str]]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields:
        table.add_row(name, _cell(value))
    _print(table)


def _size(count: int) -> str:
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if amount >= 10 or unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def _time(at: datetime | None) -> str:
    return "" if at is None else f"{at.astimezone():%Y-%m-%d %H:%M:%S}"


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _nic(nic: Nic) -> str:
    return "  ".join(part for part in (nic.mac, nic.tap or nic.socket, nic.bridge) if part)


def _vsock(vsock: Vsock) -> str:
    return f"cid {vsock.cid}  {vsock.path or vsock.backend}"


def limit_text(limit: RateLimit | None) -> str:
    """Return a limit as people read it."""
    rates = {} if limit is None else {"bytes": limit.bytes_per_s, "requests": limit.ops_per_s}
    return " and ".join(f"{rate} {unit}/s" for unit, rate in rates.items() if rate) or "no limit"


def show_vms(vms: Sequence[Vm]) -> None:
    """Print VMs, one a line."""
    rows = (
        (vm.name, vm.state.value, str(vm.vcpus), f"{vm.memory_mib} MiB", vm.kernel, vm.id)
        for vm in vms
    )
    _print_table(("NAME", "STATE", "VCPUS", "MEMORY", "KERNEL", "ID"), rows)


def show_vm(vm: Vm) -> None:
    """Print one VM."""
    fields = [
        ("name", vm.name),
        ("id", vm.id),
        ("state", vm.state.value),
        *([] if vm.reason is None else [("reason", f"{vm.reason.code}: {vm.reason.message}")]),
        ("actions", ", ".join(vm.actions)),
        ("vcpus", str(vm.vcpus)),
        ("memory", f"{vm.memory_mib} MiB"),
        ("kernel", vm.kernel),
        ("initrd", _text(vm.initrd)),
        ("cmdline", vm.cmdline),
        *((f"disk {disk.id}", f"{_size(disk.size_bytes)}  {disk.path}") for disk in vm.disks),
        *((f"rate group {group.id}", limit_text(group.rate_limit)) for group in vm.rate_groups),
        *((f"nic {nic.id}", _nic(nic)) for nic in vm.nics),
        *((f"share {share.tag}", share.path) for share in vm.shares),
        *([] if vm.vsock is None else [("vsock", _vsock(vm.vsock))]),
        *((f"pmem {pmem.id}", f"{_size(pmem.size_bytes)}  {pmem.path}") for pmem in vm.pmem),
        *((f"port {port.name}", port.path) for port in vm.ports),
        *([] if vm.watchdog is None else [("watchdog", vm.watchdog.action)]),
        *((f"label {key}", value) for key, value in vm.labels.items()),
        ("pid", _text(vm.pid)),
        ("boot time", "" if vm.boot_time_us is None else f"{vm.boot_time_us / 1000:.1f} ms"),
        ("created", _time(vm.created_at)),
        ("started", _time(vm.started_at)),
    ]
    _print_fields(fields)


def show_stats(stats: VmStats) -> None:
    """Print a VM's counters."""
    rows = [("memory", "rss_bytes", str(stats.memory_rss_bytes))]
    rows += [("vcpus", name, str(count)) for name, count in stats.vcpu_exits.items()]
    devices = {**stats.disks, **stats.nics, **stats.pmem, **stats.ports, "vsock": stats.vsock}
    for device, counters in devices.items():
        rows += [(device, name, str(count)) for name, count in counters.items()]
    rows.append(("console", "dropped_bytes", str(stats.console_dropped_bytes)))
    _print_table(("DEVICE", "COUNTER", "VALUE"), rows)


def show_kernels(kernels: Sequence[Kernel]) -> None:
    """Print kernels, one a line."""
    rows = (
        (each.name, each.format, each.entry, _size(each.size_bytes), _text(each.banner), each.id)
        for each in kernels
    )
    _print_table(("NAME", "FORMAT", "ENTRY", "SIZE", "BANNER", "ID"), rows)


def show_images(images: Sequence[Image]) -> None:
    """Print images, one a line."""
    rows = (
        (each.name, each.kind, _size(each.size_bytes), _time(each.created_at), each.id)
        for each in images
    )
    _print_table(("NAME", "KIND", "SIZE", "CREATED", "ID"), rows)


def show_artifact(artifact: Kernel | Image) -> None:
    """Print one kernel or image."""
    shown = artifact.model_dump(mode="json", exclude={"version"})
    _print_fields([(name.replace("_", " "), _text(value)) for name, value in shown.items()])


def show_operations(operations: Sequence[Operation]) -> None:
    """Print operations, one a line."""
    rows = (
        (each.id, each.kind, each.object.name or each.object.id, each.state.value, _done(each))
        for each in operations
    )
    _print_table(("ID", "KIND", "OBJECT", "STATE", "PROGRESS"), rows)


def _done(operation: Operation) -> str:
    progress = operation.progress
    if progress is None:
        return ""
    if progress.unit == "bytes":
        total = "" if progress.total is None else f" of {_size(progress.total)}"
        return f"{_size(progress.done)}{total}"
    return f"{progress.done}" + ("" if progress.total is None else f" of {progress.total}")


def show_operation(operation: Operation) -> None:
    """Print one operation with its log."""
    fields = [
        ("id", operation.id),
        ("kind", operation.kind),
        ("object", operation.object.name or operation.object.id),
        ("state", operation.state.value),
        ("progress", _done(operation)),
        *([] if operation.error is None else [("error", operation.error.detail)]),
        *(("log", line) for line in operation.log),
    ]
    _print_fields(fields)


def show_event(event: Event) -> None:
    """Print one event as one line, at once."""
    thing = event.object.name or event.object.id
    data = " ".join(f"{name}={value}" for name, value in event.data.items())
    line = (
        f"{event.id:>6}  {_time(event.at)}  {event.type:<20}  {thing}  {_text(event.actor)}  {data}"
    )
    print(line.rstrip(), flush=True)


def show_host(host: Host) -> None:
    """Print the host."""
    _print_fields(
        [
            ("hostname", host.hostname),
            ("hosteld", host.version),
            ("tier", host.tier),
            ("kernel", host.kernel),
            ("cpus", str(host.cpu_count)),
            ("memory", f"{_size(host.memory_available_bytes)} of {_size(host.memory_bytes)} free"),
            ("vms", f"{host.vm_running_count} of {host.vm_count} running"),
        ]
    )


def show_doctor(report: DoctorReport) -> None:
    """Print what the host can do, and what to do about each lack."""
    rows = ((each.name, each.status, each.detail, _text(each.remedy)) for each in report.checks)
    _print_table(("CHECK", "STATUS", "DETAIL", "REMEDY"), rows)
    print(f"\ntier: {report.tier}: {_TIERS[report.tier]}")
