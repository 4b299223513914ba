# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Virtual machines and what is done to them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Final

from fastapi import Query
from starlette.requests import Request
from starlette.responses import Response

from ..body import read_model, read_optional_model
from ..models.limits import RateGroupPatch
from ..models.resources import Operation
from ..models.vms import (
    DiskCreate,
    DiskPatch,
    NicCreate,
    NicPatch,
    StopRequest,
    Vm,
    VmAction,
    VmCreate,
    VmPatch,
    VmStats,
)
from ..openapi import (
    VmPage,
    accepted,
    bare,
    if_match,
    if_none_match,
    problems,
    success,
    takes,
)
from ..ports import DetachQuery, DeviceKind
from ..reply import (
    call_of,
    etag_of,
    json_response,
    object_response,
    operation_response,
    precondition,
    service_of,
)
from ..route import make_router
from .parameters import Detach, DiskPath, GroupPath, NicPath, VmPath, VmQuery, Wait

router = make_router("vms", "/v1/vms")

_CREATE_EXAMPLE: Final[dict[str, Any]] = {
    "name": "web-1",
    "vcpus": 2,
    "memory_mib": 256,
    "kernel": "debian",
    "disks": [{"id": "root", "image": "debian"}],
    "nics": [{"id": "net0"}],
    "start": True,
}
_ACTION_SUMMARIES: Final[dict[VmAction, str]] = {
    VmAction.START: "Start a stopped or crashed VM.",
    VmAction.PAUSE: "Stop its vCPUs where they are.",
    VmAction.RESUME: "Let a paused VM run on.",
    VmAction.STOP: "Press the power button, wait, then kill if asked.",
    VmAction.KILL: "Pull the plug.",
    VmAction.RESET: "Press the reset button.",
    VmAction.CTRL_ALT_DEL: "Press Ctrl-Alt-Del.",
}
_ACTION_NOTES: Final[dict[VmAction, str]] = {
    VmAction.CTRL_ALT_DEL: " 409 `guest_ignores_keys`: the keys were lost, since the guest has not"
    " read those before them, or has its keyboard disabled."
}


def vm_response(request: Request, vm: Vm, status: int = 200) -> Response:
    """Return one VM with its ETag."""
    location = f"/v1/vms/{vm.id}" if status == 201 else None
    return object_response(request, vm, tag=etag_of(vm), status=status, location=location)


def _vm_or_operation(request: Request, outcome: Vm | Operation, status: int = 200) -> Response:
    if isinstance(outcome, Operation):
        return operation_response(outcome)
    return vm_response(request, outcome, status)


@router.post(
    "",
    summary="Create a VM, and start it if asked.",
    status_code=201,
    responses={
        **success(Vm, "It is there.", status=201, is_object=True, has_location=True),
        **accepted(),
        **problems(408, 409, 413, 415, 507),
    },
    openapi_extra=takes(VmCreate, _CREATE_EXAMPLE),
)
async def create_vm(request: Request, wait: Wait = 1.0) -> Response:
    """The reply is the VM, or an operation when that takes longer than `wait` seconds."""
    wanted = await read_model(request, VmCreate)
    outcome = await service_of(request).create_vm(wanted, call_of(request, wait))
    return _vm_or_operation(request, outcome, 201)


@router.get(
    "/{vm}",
    summary="Show a VM.",
    responses={
        **success(Vm, "The VM.", is_object=True),
        **bare(304, "It still has the version in If-None-Match."),
        **problems(404),
    },
    openapi_extra=if_none_match(),
)
async def get_vm(request: Request, vm: VmPath) -> Response:
    """A VM is addressed by its name or its id."""
    return vm_response(request, await service_of(request).get_vm(vm))


@router.get(
    "",
    summary="List VMs in order of name.",
    responses={**success(VmPage, "One page."), **problems()},
)
async def list_vms(request: Request, query: VmQuery) -> Response:
    """Filter by state and label; page with `limit` and `cursor`."""
    return json_response(await service_of(request).list_vms(query))


@router.patch(
    "/{vm}",
    summary="Change a VM.",
    responses={
        **success(Vm, "The changed VM.", is_object=True),
        **problems(404, 408, 409, 412, 413, 415, 507),
    },
    openapi_extra=takes(VmPatch, {"labels": {"env": "test"}}, has_if_match=True),
)
async def patch_vm(request: Request, vm: VmPath, wait: Wait = 1.0) -> Response:
    """What is left out stays. vCPUs, memory, kernel and cmdline need a stopped VM."""
    patch = await read_model(request, VmPatch)
    ref, version = await precondition(request, vm, service_of(request).get_vm)
    changed = await service_of(request).patch_vm(ref, patch, call_of(request, wait, version))
    return vm_response(request, changed)


@router.delete(
    "/{vm}",
    summary="Delete a VM and its own disks.",
    status_code=204,
    responses={
        **bare(204, "It is gone."),
        **accepted(),
        **problems(404, 409, 412, 507),
    },
    openapi_extra=if_match(),
)
async def delete_vm(
    request: Request,
    vm: VmPath,
    force: Annotated[bool, Query(description="Kill it first if it runs.")] = False,
    wait: Wait = 1.0,
) -> Response:
    """Disks made from an image go with it; a disk used by path stays."""
    ref, version = await precondition(request, vm, service_of(request).get_vm)
    outcome = await service_of(request).delete_vm(ref, force, call_of(request, wait, version))
    return Response(status_code=204) if outcome is None else operation_response(outcome)


@router.patch(
    "/{vm}/disks/{disk}",
    summary="Grow a disk, change its limits, or put another file behind it.",
    responses={
        **success(Vm, "The VM with the changed disk.", is_object=True),
        **problems(404, 408, 409, 412, 413, 415, 507),
    },
    openapi_extra=takes(DiskPatch, {"size_mib": 4096}, has_if_match=True),
)
async def patch_disk(request: Request, vm: VmPath, disk: DiskPath, wait: Wait = 1.0) -> Response:
    """A running guest is told of a new size; a new limit or file counts at once.

    Another file takes over between two requests: those under way end on the old one. A failure
    leaves that in place.
    """
    patch = await read_model(request, DiskPatch)
    ref, version = await precondition(request, vm, service_of(request).get_vm)
    call = call_of(request, wait, version)
    return vm_response(request, await service_of(request).patch_disk(ref, disk, patch, call))


@router.patch(
    "/{vm}/rate-groups/{group}",
    summary="Change the limits that disks share.",
    responses={
        **success(Vm, "The VM with the changed rate group.", is_object=True),
        **problems(404, 408, 409, 412, 413, 415, 507),
    },
    openapi_extra=takes(RateGroupPatch, {"rate_limit": {"ops_per_s": 5000}}, has_if_match=True),
)
async def patch_rate_group(
    request: Request, vm: VmPath, group: GroupPath, wait: Wait = 1.0
) -> Response:
    """It counts at once, also for requests that wait for the old limits."""
    patch = await read_model(request, RateGroupPatch)
    ref, version = await precondition(request, vm, service_of(request).get_vm)
    call = call_of(request, wait, version)
    return vm_response(request, await service_of(request).patch_rate_group(ref, group, patch, call))


@router.patch(
    "/{vm}/nics/{nic}",
    summary="Change a network interface.",
    responses={
        **success(Vm, "The VM with the changed interface.", is_object=True),
        **problems(404, 408, 409, 412, 413, 415, 507),
    },
    openapi_extra=takes(NicPatch, {"link": "down"}, has_if_match=True),
)
async def patch_nic(request: Request, vm: VmPath, nic: NicPath, wait: Wait = 1.0) -> Response:
    """A running guest sees it at once: with `link`, its carrier goes or comes."""
    patch = await read_model(request, NicPatch)
    ref, version = await precondition(request, vm, service_of(request).get_vm)
    call = call_of(request, wait, version)
    return vm_response(request, await service_of(request).patch_nic(ref, nic, patch, call))


@router.post(
    "/{vm}/disks",
    summary="Attach a disk.",
    responses={
        **success(Vm, "The VM with the disk as its last one.", is_object=True),
        **accepted(),
        **problems(404, 408, 409, 412, 413, 415, 507),
    },
    openapi_extra=takes(DiskCreate, {"id": "data", "path": "/srv/data.raw"}, has_if_match=True),
)
async def attach_disk(request: Request, vm: VmPath, wait: Wait = 1.0) -> Response:
    """A running guest is told, and needs no rescan. Copying an `image` may take its time."""
    return await _attach(request, vm, await read_model(request, DiskCreate), wait)


@router.post(
    "/{vm}/nics",
    summary="Attach a network interface.",
    responses={
        **success(Vm, "The VM with the interface as its last one.", is_object=True),
        **accepted(),
        **problems(404, 408, 409, 412, 413, 415, 507),
    },
    openapi_extra=takes(NicCreate, {"id": "net1"}, has_if_match=True),
)
async def attach_nic(request: Request, vm: VmPath, wait: Wait = 1.0) -> Response:
    """A running guest is told, and needs no rescan."""
    return await _attach(request, vm, await read_model(request, NicCreate), wait)


async def _attach(
    request: Request, vm: str, wanted: DiskCreate | NicCreate, wait_s: float
) -> Response:
    ref, version = await precondition(request, vm, service_of(request).get_vm)
    outcome = await service_of(request).attach(ref, wanted, call_of(request, wait_s, version))
    return _vm_or_operation(request, outcome)


@router.delete(
    "/{vm}/disks/{disk}",
    summary="Detach a disk.",
    responses={
        **success(Vm, "The VM without the disk.", is_object=True),
        **accepted(),
        **problems(404, 409, 412, 507),
    },
    openapi_extra=if_match(),
)
async def detach_disk(
    request: Request, vm: VmPath, disk: DiskPath, how: Detach, wait: Wait = 1.0
) -> Response:
    """A disk made from an image is deleted; one used by path stays.

    A running guest is asked for it: 409 `guest_keeps_device` when it does not let go in time, and
    then nothing has changed.
    """
    return await _detach(request, vm, ("disk", disk), how, wait)


@router.delete(
    "/{vm}/nics/{nic}",
    summary="Detach a network interface.",
    responses={
        **success(Vm, "The VM without the interface.", is_object=True),
        **accepted(),
        **problems(404, 409, 412, 507),
    },
    openapi_extra=if_match(),
)
async def detach_nic(
    request: Request, vm: VmPath, nic: NicPath, how: Detach, wait: Wait = 1.0
) -> Response:
    """A running guest is asked for it.

    409 `guest_keeps_device` when it does not let go in time, and then nothing has changed.
    """
    return await _detach(request, vm, ("nic", nic), how, wait)


async def _detach(
    request: Request, vm: str, device: tuple[DeviceKind, str], how: DetachQuery, wait_s: float
) -> Response:
    ref, version = await precondition(request, vm, service_of(request).get_vm)
    call = call_of(request, wait_s, version)
    return _vm_or_operation(request, await service_of(request).detach(ref, device, how, call))


@router.get(
    "/{vm}/stats",
    summary="Read a running VM's counters.",
    responses={**success(VmStats, "Counters since its start."), **problems(404, 409)},
)
async def get_vm_stats(request: Request, vm: VmPath) -> Response:
    """Rates are for the reader to make: take two and divide."""
    return json_response(await service_of(request).vm_stats(vm))


def _action_route(action: VmAction) -> Callable[..., Coroutine[Any, Any, Response]]:
    async def act(request: Request, vm: VmPath, wait: Wait = 1.0) -> Response:
        stop = None
        if action is VmAction.STOP:
            stop = await read_optional_model(request, StopRequest)
        ref, version = await precondition(request, vm, service_of(request).get_vm)
        call = call_of(request, wait, version)
        outcome = await service_of(request).act_on_vm(ref, action, stop, call)
        return _vm_or_operation(request, outcome)

    act.__name__ = f"{action.name.lower()}_vm"
    return act


def _add_actions() -> None:
    for action, summary in _ACTION_SUMMARIES.items():
        is_stop = action is VmAction.STOP
        extra = takes(StopRequest, {"timeout_s": 10}, is_required=False, has_if_match=True)
        router.add_api_route(
            f"/{{vm}}/{action.value}",
            _action_route(action),
            methods=["POST"],
            summary=summary,
            description="409 names the state the VM is in and the actions it allows."
            + _ACTION_NOTES.get(action, ""),
            responses={
                **success(Vm, "The VM as it is now.", is_object=True),
                **accepted(),
                **problems(404, 408, 409, 412, 413, 415, 507),
            },
            openapi_extra=extra if is_stop else if_match(),
        )


_add_actions()
