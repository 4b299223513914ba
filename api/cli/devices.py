# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""``hostel vm`` once more: what is done to a VM's disks and network interfaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .specs import absolute, parse_disk, parse_nic
from .support import Json, NoWait, print_json, session, settle
from .vm import Ref, print_outcome, read
from .vm import app as vm_app

if TYPE_CHECKING:
    from ..models.limits import RateLimit
    from ..models.vms import Vm

app = vm_app

Pull = Annotated[
    bool, typer.Option("--force", help="Pull it out without asking the guest; it may lose data.")
]
LetGo = Annotated[
    float, typer.Option("--timeout", min=0, max=600, help="Seconds that the guest has to let go.")
]
Bps = Annotated[int | None, typer.Option(min=1, help="Bytes per second.")]
Iops = Annotated[int | None, typer.Option(min=1, help="Requests per second.")]


@app.command("grow-disk")
def grow_disk(
    context: typer.Context,
    vm: Ref,
    disk: Annotated[str, typer.Argument(metavar="DISK", help="The disk's id.")],
    size: Annotated[int, typer.Argument(metavar="MIB", min=1, help="Its new size in MiB.")],
    as_json: Json = False,
) -> None:
    """Give a disk more space; a running guest is told."""
    with session(context) as client:
        from ..models.vms import DiskPatch

        changed = client.patch_disk(vm, disk, DiskPatch(size_mib=size))
        if as_json:
            print_json(changed)
            return
        now = next(found for found in changed.disks if found.id == disk)
        print(f"disk {disk} is {now.size_bytes >> 20} MiB")


@app.command("swap-disk")
def swap_disk(
    context: typer.Context,
    vm: Ref,
    disk: Annotated[str, typer.Argument(metavar="DISK", help="The disk's id.")],
    path: Annotated[
        str, typer.Argument(metavar="FILE", help="What it shall use: a path on the daemon's host.")
    ],
    as_json: Json = False,
) -> None:
    """Put another file behind a disk; a running guest goes on with that."""
    with session(context) as client:
        from ..models.vms import DiskPatch

        patch = read(lambda: DiskPatch(path=absolute(path)), DiskPatch)
        changed = client.patch_disk(vm, disk, patch)
        if as_json:
            print_json(changed)
            return
        now = next(found for found in changed.disks if found.id == disk)
        print(f"disk {disk} is {now.path}, {now.size_bytes >> 20} MiB")


@app.command("limit-disk")
def limit_disk(
    context: typer.Context,
    vm: Ref,
    disk: Annotated[str, typer.Argument(metavar="DISK", help="The disk's id.")],
    bps: Bps = None,
    iops: Iops = None,
    as_json: Json = False,
) -> None:
    """Limit a disk, at once; without limits, take away those that it has."""
    with session(context) as client:
        from ..models.vms import DiskPatch

        limit = _limit(bps, iops)
        changed = client.patch_disk(vm, disk, DiskPatch(rate_limit=limit))
        _print_limit(changed, f"disk {disk}", limit, as_json=as_json)


@app.command("limit-group")
def limit_group(
    context: typer.Context,
    vm: Ref,
    group: Annotated[str, typer.Argument(metavar="GROUP", help="The rate group's id.")],
    bps: Bps = None,
    iops: Iops = None,
    as_json: Json = False,
) -> None:
    """Limit the disks of a rate group in sum, at once; without limits, let them go."""
    with session(context) as client:
        from ..models.limits import RateGroupPatch

        limit = _limit(bps, iops)
        changed = client.patch_rate_group(vm, group, RateGroupPatch(rate_limit=limit))
        _print_limit(changed, f"rate group {group}", limit, as_json=as_json)


def _limit(bps: int | None, iops: int | None) -> RateLimit | None:
    from ..models.limits import RateLimit

    return RateLimit(bytes_per_s=bps, ops_per_s=iops) if bps or iops else None


def _print_limit(changed: Vm, what: str, limit: RateLimit | None, *, as_json: bool) -> None:
    if as_json:
        print_json(changed)
        return
    from . import tables

    print(f"{what}: {tables.limit_text(limit)}")


@app.command("set-nic")
def set_nic(
    context: typer.Context,
    vm: Ref,
    nic: Annotated[str, typer.Argument(metavar="NIC", help="The interface's id.")],
    link: Annotated[str | None, typer.Option(help="up or down: plug its cable in, or out.")] = None,
    rx_bps: Annotated[int | None, typer.Option(help="Bytes received per second; 0: any.")] = None,
    rx_pps: Annotated[int | None, typer.Option(help="Packets received per second.")] = None,
    tx_bps: Annotated[int | None, typer.Option(help="Bytes sent per second; 0: any.")] = None,
    tx_pps: Annotated[int | None, typer.Option(help="Packets sent per second.")] = None,
    as_json: Json = False,
) -> None:
    """Change a network interface, at once. 0 takes a direction's limits away."""
    with session(context) as client:
        from ..models.vms import NicPatch

        wanted: dict[str, Any] = {} if link is None else {"link": link}
        for name, bps, pps in (("rx_limit", rx_bps, rx_pps), ("tx_limit", tx_bps, tx_pps)):
            if bps is not None or pps is not None:
                limit = {"bytes_per_s": bps or None, "ops_per_s": pps or None}
                wanted[name] = limit if bps or pps else None
        patch = read(lambda: NicPatch.model_validate(wanted), NicPatch)
        changed = client.patch_nic(vm, nic, patch)
        if as_json:
            print_json(changed)
            return
        print(f"interface {nic}: {', '.join(wanted)} changed")


@app.command("attach-disk")
def attach_disk(
    context: typer.Context,
    vm: Ref,
    disk: Annotated[
        str,
        typer.Argument(
            metavar="DISK", help="As vm create --disk has it: ID=FILE, then ,ro and so on."
        ),
    ],
    no_wait: NoWait = False,
    as_json: Json = False,
) -> None:
    """Attach a disk; a running guest sees it at once."""
    with session(context) as client:
        from ..models.vms import DiskCreate, Vm

        wanted = read(lambda: DiskCreate.model_validate(parse_disk(disk)), DiskCreate)
        outcome = client.attach(vm, wanted, wait_s=0 if no_wait else 30)
        print_outcome(settle(client, outcome, Vm, no_wait=no_wait), as_json=as_json)


@app.command("attach-nic")
def attach_nic(
    context: typer.Context,
    vm: Ref,
    nic: Annotated[
        str,
        typer.Argument(metavar="NIC", help="As vm create --nic has it: ID, then ,tap= and so on."),
    ],
    no_wait: NoWait = False,
    as_json: Json = False,
) -> None:
    """Attach a network interface; a running guest sees it at once."""
    with session(context) as client:
        from ..models.vms import NicCreate, Vm

        wanted = read(lambda: NicCreate.model_validate(parse_nic(nic)), NicCreate)
        outcome = client.attach(vm, wanted, wait_s=0 if no_wait else 30)
        print_outcome(settle(client, outcome, Vm, no_wait=no_wait), as_json=as_json)


@app.command("detach-disk")
def detach_disk(
    context: typer.Context,
    vm: Ref,
    disk: Annotated[str, typer.Argument(metavar="DISK", help="The disk's id.")],
    force: Pull = False,
    timeout: LetGo = 10,
    no_wait: NoWait = False,
    as_json: Json = False,
) -> None:
    """Detach a disk. A copy of an image is deleted; a disk used by path stays."""
    how = {"force": force, "timeout_s": timeout, "wait_s": 0 if no_wait else 30}
    _detach(context, vm, ("disk", disk), how, no_wait, as_json)


@app.command("detach-nic")
def detach_nic(
    context: typer.Context,
    vm: Ref,
    nic: Annotated[str, typer.Argument(metavar="NIC", help="The interface's id.")],
    force: Pull = False,
    timeout: LetGo = 10,
    no_wait: NoWait = False,
    as_json: Json = False,
) -> None:
    """Detach a network interface."""
    how = {"force": force, "timeout_s": timeout, "wait_s": 0 if no_wait else 30}
    _detach(context, vm, ("nic", nic), how, no_wait, as_json)


def _detach(
    context: typer.Context,
    vm: str,
    device: tuple[Literal["disk", "nic"], str],
    how: dict[str, Any],
    no_wait: bool,
    as_json: bool,
) -> None:
    with session(context) as client:
        from ..models.vms import Vm

        outcome = client.detach(vm, device, **how)
        print_outcome(settle(client, outcome, Vm, no_wait=no_wait), as_json=as_json)
