# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""``hostel vm``: create, see and steer virtual machines."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .specs import (
    BadSpec,
    parse_disk,
    parse_label,
    parse_nic,
    parse_pmem,
    parse_port,
    parse_rate_group,
    parse_share,
    parse_vsock,
)
from .support import (
    EXIT_USAGE,
    Json,
    NoWait,
    endpoint_of,
    fail,
    group,
    print_json,
    session,
    settle,
)

if TYPE_CHECKING:
    from ..models.resources import Operation
    from ..models.vms import DiskCreate, DiskPatch, NicCreate, NicPatch, Vm, VmCreate, VmPatch

    W = TypeVar("W", VmCreate, VmPatch, DiskCreate, DiskPatch, NicCreate, NicPatch)

app = group("Create, see and steer virtual machines.")

Ref = Annotated[str, typer.Argument(metavar="VM", help="Name or id.")]
Timeout = Annotated[
    float, typer.Option(min=0, max=3600, help="Seconds that the guest has to power off.")
]

# Devices of a new VM, as specs.py reads them.
Disks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DISK",
        help="ID=image:NAME, ID=FILE or ID=nbd://..., then any of ,ro ,size=MIB ,format= ,cache= "
        ",io= ,bps= ,iops= ,group=. Again for more.",
    ),
]
Shares = Annotated[
    list[str] | None,
    typer.Option(metavar="SHARE", help="TAG=DIRECTORY, then perhaps ,ro. Again for more."),
]
Groups = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GROUP",
        help="A limit that disks share (,group=ID): ID, then ,bps= or ,iops=. Again for more.",
    ),
]
Nics = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NIC",
        help="ID, then any of ,tap= ,bridge= ,mac= ,mtu= ,backend= ,queues= ,link=, or ,socket=. "
        "Again for more.",
    ),
]
Vsock = Annotated[
    str | None,
    typer.Option(
        metavar="BACKEND", help="A vsock device: auto, unix or vhost, then perhaps ,cid=."
    ),
]
Ports = Annotated[
    list[str] | None,
    typer.Option(metavar="PORT", help="NAME, then perhaps ,console. Again for more."),
]
Pmems = Annotated[
    list[str] | None,
    typer.Option(metavar="PMEM", help="ID=FILE, then perhaps ,ro. Again for more."),
]
Watchdog = Annotated[
    str | None,
    typer.Option(metavar="ACTION", help="A watchdog that does: reset, poweroff, pause or none."),
]


def print_outcome(outcome: Vm | Operation, *, as_json: bool) -> None:
    """Print what became of a request: the VM's state, or the operation that goes on."""
    if as_json:
        print_json(outcome)
        return
    from ..models.vms import Vm
    from . import tables

    if isinstance(outcome, Vm):
        print(f"{outcome.name} is {outcome.state.value}")
    else:
        tables.show_operation(outcome)


def read(build: Callable[[], W], model: type[W]) -> W:
    """Build a request from options; what cannot be one is a usage error."""
    from pydantic import ValidationError

    from ..validation import explain

    try:
        return build()
    except BadSpec as err:
        fail(str(err), EXIT_USAGE)
    except ValidationError as err:
        fail(explain(err.errors()[0], model).detail, EXIT_USAGE)


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="1 to 63 of a-z, 0-9, '-', '.'.")],
    kernel: Annotated[str, typer.Option(help="An imported kernel.")],
    initrd: Annotated[str | None, typer.Option(help="An imported image of kind initrd.")] = None,
    cmdline: Annotated[str | None, typer.Option(help="Kernel command line.")] = None,
    vcpus: Annotated[int, typer.Option(help="1 to 16.")] = 1,
    memory: Annotated[int, typer.Option(metavar="MIB", help="Guest memory in MiB.")] = 256,
    disk: Disks = None,
    rate_group: Groups = None,
    share: Shares = None,
    nic: Nics = None,
    vsock: Vsock = None,
    port: Ports = None,
    pmem: Pmems = None,
    watchdog: Watchdog = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="LABEL", help="KEY=VALUE. Again for more.")
    ] = None,
    no_rng: Annotated[bool, typer.Option("--no-rng", help="No virtio-rng device.")] = False,
    on_reboot: Annotated[str, typer.Option(help="reset or stop.")] = "reset",
    on_panic: Annotated[str, typer.Option(help="keep, reset or stop.")] = "keep",
    start: Annotated[bool, typer.Option("--start", help="Start it at once.")] = False,
    no_wait: NoWait = False,
    as_json: Json = False,
) -> None:
    """Create a VM, and start it if asked."""
    wanted: dict[str, Any] = {
        "name": name,
        "kernel": kernel,
        "initrd": initrd,
        "vcpus": vcpus,
        "memory_mib": memory,
        "rng": not no_rng,
        "on_reboot": on_reboot,
        "on_panic": on_panic,
        "start": start,
        **({} if cmdline is None else {"cmdline": cmdline}),
        **({} if watchdog is None else {"watchdog": {"action": watchdog}}),
    }

    def build() -> VmCreate:
        wanted["disks"] = [parse_disk(text) for text in disk or ()]
        wanted["rate_groups"] = [parse_rate_group(text) for text in rate_group or ()]
        wanted["shares"] = [parse_share(text) for text in share or ()]
        wanted["nics"] = [parse_nic(text) for text in nic or ()]
        wanted["vsock"] = None if vsock is None else parse_vsock(vsock)
        wanted["ports"] = [parse_port(text) for text in port or ()]
        wanted["pmem"] = [parse_pmem(text) for text in pmem or ()]
        wanted["labels"] = dict(parse_label(text) for text in label or ())
        return VmCreate.model_validate(wanted)

    with session(context) as client:
        from ..models.vms import Vm, VmCreate

        request = read(build, VmCreate)
        outcome = client.create_vm(request, wait_s=0 if no_wait else 30)
        print_outcome(settle(client, outcome, Vm, no_wait=no_wait), as_json=as_json)


@app.command("list")
def list_vms(
    context: typer.Context,
    state: Annotated[str | None, typer.Option(help="Only VMs in this state.")] = None,
    label: Annotated[str | None, typer.Option(help="Only VMs with KEY or KEY=VALUE.")] = None,
    as_json: Json = False,
) -> None:
    """List VMs in order of name."""
    with session(context) as client:
        from ..models.vms import VmState

        if state is not None and state not in list(VmState):
            fail(f"state {state!r}: must be one of {', '.join(VmState)}", EXIT_USAGE)
        vms = client.list_vms(state=None if state is None else VmState(state), label=label)
        if as_json:
            print_json(vms)
            return
        from . import tables

        tables.show_vms(vms)


@app.command()
def show(context: typer.Context, vm: Ref, as_json: Json = False) -> None:
    """Show a VM."""
    with session(context) as client:
        found = client.get_vm(vm)
        if as_json:
            print_json(found)
            return
        from . import tables

        tables.show_vm(found)


@app.command("set")
def set_vm(
    context: typer.Context,
    vm: Ref,
    name: Annotated[str | None, typer.Option(help="Its new name.")] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL", help="KEY=VALUE. Again for more; all others go."),
    ] = None,
    no_labels: Annotated[bool, typer.Option("--no-labels", help="Remove all labels.")] = False,
    vcpus: Annotated[int | None, typer.Option(help="1 to 16.")] = None,
    memory: Annotated[int | None, typer.Option(metavar="MIB", help="Guest memory in MiB.")] = None,
    kernel: Annotated[str | None, typer.Option(help="An imported kernel.")] = None,
    initrd: Annotated[str | None, typer.Option(help="An imported image of kind initrd.")] = None,
    cmdline: Annotated[str | None, typer.Option(help="Kernel command line.")] = None,
    on_reboot: Annotated[str | None, typer.Option(help="reset or stop.")] = None,
    on_panic: Annotated[str | None, typer.Option(help="keep, reset or stop.")] = None,
    as_json: Json = False,
) -> None:
    """Change a VM. All but its name and labels can change only while it is stopped."""
    given = {
        "name": name,
        "vcpus": vcpus,
        "memory_mib": memory,
        "kernel": kernel,
        "initrd": initrd,
        "cmdline": cmdline,
        "on_reboot": on_reboot,
        "on_panic": on_panic,
    }
    wanted: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if label and no_labels:
        fail("give --label or --no-labels, not both", EXIT_USAGE)

    def build() -> VmPatch:
        if label or no_labels:
            wanted["labels"] = dict(parse_label(text) for text in label or ())
        return VmPatch.model_validate(wanted)

    with session(context) as client:
        from ..models.vms import VmPatch

        patch = read(build, VmPatch)
        if not wanted:
            fail("say what to set: see `hostel vm set --help`", EXIT_USAGE)
        print_outcome(client.patch_vm(vm, patch), as_json=as_json)


def _act(
    context: typer.Context,
    vm: str,
    action: str,
    *,
    no_wait: bool,
    as_json: bool,
    stop: dict[str, float | bool] | None = None,
) -> None:
    with session(context) as client:
        from ..models.vms import StopRequest, Vm, VmAction

        request = None if stop is None else StopRequest.model_validate(stop)
        wait_s = 0 if no_wait else 30
        outcome = client.act_on_vm(vm, VmAction(action), request, wait_s=wait_s)
        print_outcome(settle(client, outcome, Vm, no_wait=no_wait), as_json=as_json)


@app.command()
def start(context: typer.Context, vm: Ref, no_wait: NoWait = False, as_json: Json = False) -> None:
    """Start a stopped or crashed VM."""
    _act(context, vm, "start", no_wait=no_wait, as_json=as_json)


@app.command()
def stop(
    context: typer.Context,
    vm: Ref,
    timeout: Timeout = 30.0,
    no_kill: Annotated[
        bool, typer.Option("--no-kill", help="Do not kill it when the time is up.")
    ] = False,
    no_wait: NoWait = False,
    as_json: Json = False,
) -> None:
    """Press the power button, wait, then kill."""
    how = {"timeout_s": timeout, "force": not no_kill}
    _act(context, vm, "stop", no_wait=no_wait, as_json=as_json, stop=how)


@app.command()
def pause(context: typer.Context, vm: Ref, no_wait: NoWait = False, as_json: Json = False) -> None:
    """Stop a VM's vCPUs where they are."""
    _act(context, vm, "pause", no_wait=no_wait, as_json=as_json)


@app.command()
def resume(context: typer.Context, vm: Ref, no_wait: NoWait = False, as_json: Json = False) -> None:
    """Let a paused VM run on."""
    _act(context, vm, "resume", no_wait=no_wait, as_json=as_json)


@app.command()
def kill(context: typer.Context, vm: Ref, no_wait: NoWait = False, as_json: Json = False) -> None:
    """Pull the plug."""
    _act(context, vm, "kill", no_wait=no_wait, as_json=as_json)


@app.command()
def reset(context: typer.Context, vm: Ref, no_wait: NoWait = False, as_json: Json = False) -> None:
    """Press the reset button."""
    _act(context, vm, "reset", no_wait=no_wait, as_json=as_json)


@app.command("ctrl-alt-del")
def ctrl_alt_del(
    context: typer.Context, vm: Ref, no_wait: NoWait = False, as_json: Json = False
) -> None:
    """Press Ctrl-Alt-Del."""
    _act(context, vm, "ctrl-alt-del", no_wait=no_wait, as_json=as_json)


@app.command()
def delete(
    context: typer.Context,
    vm: Ref,
    force: Annotated[bool, typer.Option("--force", help="Kill it first if it runs.")] = False,
    no_wait: NoWait = False,
    as_json: Json = False,
) -> None:
    """Delete a VM and its own disks."""
    with session(context) as client:
        operation = client.delete_vm(vm, force=force, wait_s=0 if no_wait else 30)
        if operation is not None and not no_wait:
            operation = client.finish(operation)
        if as_json:
            print(json.dumps({"deleted": vm}) if operation is None else operation.model_dump_json())
        elif operation is not None and no_wait:
            print(f"deleting {vm}: operation {operation.id}")
        else:
            print(f"{vm} is deleted")


@app.command()
def stats(context: typer.Context, vm: Ref, as_json: Json = False) -> None:
    """Show a running VM's counters."""
    with session(context) as client:
        counters = client.vm_stats(vm)
        if as_json:
            print_json(counters)
            return
        from . import tables

        tables.show_stats(counters)


@app.command()
def logs(
    context: typer.Context,
    vm: Ref,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows.")] = False,
    offset: Annotated[int, typer.Option(help="Byte to start at; negative: from the end.")] = 0,
    as_json: Json = False,
) -> None:
    """Print what a VM has printed on its console."""
    with session(context) as client:
        from ..terminal import show_bytes, show_json

        display = show_json if as_json else show_bytes
        if follow:
            for data in client.follow_log(vm, offset=offset):
                display(data)
            return
        end = None
        while end is None or offset < end:
            start_at, data, size = client.read_log(vm, offset=offset)
            # Only to where it ended when we began: a chatty guest is what --follow is for.
            end = size if end is None else end
            offset = start_at + len(data)
            if data:
                display(data)


@app.command()
def console(
    context: typer.Context,
    vm: Ref,
    offset: Annotated[
        int | None, typer.Option(help="Byte of the log to start at; left out: the last 16 KiB.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Attach this terminal to a VM's console; Ctrl-] leaves."""
    with session(context):
        import os
        import sys

        from ..terminal import attach, open_console, show_bytes, show_json

        source = sys.stdin.fileno()
        with open_console(endpoint_of(context), vm, offset) as connection:
            if os.isatty(source):
                print(f"attached to {vm}; Ctrl-] leaves\r", file=sys.stderr)
            attach(connection, source=source, show=show_json if as_json else show_bytes)
