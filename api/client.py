# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The client library: typed, synchronous, over the Unix socket or TCP.

::

    with HostelClient.from_environ() as hostel:
        vm = hostel.settle(hostel.create_vm(VmCreate(name="web-1", kernel="debian")), Vm)
        for data in hostel.follow_log(vm.id): ...

What the daemon refuses is raised as the ``ApiError`` that it is there; `Unreachable` means that
there was no answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from .endpoint import Endpoint, find_endpoint
from .errors import ApiError, Internal, Invalid, error_from_problem
from .models.common import Page, Problem
from .models.limits import RateGroupPatch
from .models.resources import (
    Event,
    Host,
    Image,
    ImageImport,
    Kernel,
    KernelImport,
    Operation,
    OperationState,
)
from .models.vms import (
    ConsoleInput,
    DiskCreate,
    DiskPatch,
    NicCreate,
    NicPatch,
    StopRequest,
    Vm,
    VmAction,
    VmCreate,
    VmPatch,
    VmState,
    VmStats,
)

M = TypeVar("M", bound=BaseModel)
Params = Mapping[str, str | int | float | bool | None]

# What the daemon waits for in one request; longer waits are made of several.
WAIT_S: Final = 30.0
# On top of that, for the reply to arrive.
REPLY_S: Final = 30.0
# The event stream sends a heartbeat every 15 s.
SILENCE_S: Final = 60.0
PAGE_LIMIT: Final = 1000


class Unreachable(Exception):
    """There was no answer: no daemon, no permission, or the connection broke."""

    def __init__(self, endpoint: Endpoint, reason: str) -> None:
        super().__init__(f"no answer from hosteld at {endpoint}: {reason}")
        self.endpoint = endpoint


class OperationFailed(ApiError):
    """An operation ended without success."""

    def __init__(self, operation: Operation) -> None:
        problem = operation.error
        detail = f"{operation.kind} was cancelled" if problem is None else problem.detail
        super().__init__("cancelled" if problem is None else problem.code, detail)
        self.operation = operation
        if problem is not None:
            self.status, self.title = problem.status, problem.title


class HostelClient:
    """A connection to one daemon.

    Threads: one at a time.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        transport = httpx.HTTPTransport(uds=endpoint.socket) if endpoint.url is None else None
        headers = {} if endpoint.token is None else {"Authorization": f"Bearer {endpoint.token}"}
        self._http = httpx.Client(
            transport=transport,
            base_url=endpoint.base_url,
            headers=headers,
            timeout=httpx.Timeout(WAIT_S + REPLY_S, connect=10.0),
            # Proxies of the environment are for the web, not for this host.
            trust_env=False,
        )

    @classmethod
    def from_environ(cls) -> Self:
        """Return a client of the daemon that the environment names."""
        return cls(find_endpoint(os.environ, os.geteuid()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # VMs

    def list_vms(self, *, state: VmState | None = None, label: str | None = None) -> list[Vm]:
        """Return all VMs in order of name."""
        return self._all("/v1/vms", Vm, {"state": state, "label": label})

    def create_vm(self, wanted: VmCreate, *, wait_s: float = WAIT_S) -> Vm | Operation:
        """Create a VM, and start it if asked."""
        reply = self._send("POST", "/v1/vms", wanted, {"wait": wait_s})
        return _outcome(reply, Vm)

    def get_vm(self, ref: str) -> Vm:
        """Return one VM by name or id."""
        return _parse(self._send("GET", url_path("vms", ref)), Vm)

    def patch_vm(self, ref: str, patch: VmPatch, *, if_match: str | None = None) -> Vm:
        """Change a VM; ``if_match`` is the ETag that it must have."""
        headers = {} if if_match is None else {"If-Match": if_match}
        return _parse(self._send("PATCH", url_path("vms", ref), patch, headers=headers), Vm)

    def delete_vm(
        self, ref: str, *, force: bool = False, wait_s: float = WAIT_S
    ) -> Operation | None:
        """Delete a VM and its own disks; None when it is gone."""
        params: Params = {"force": force, "wait": wait_s}
        reply = self._send("DELETE", url_path("vms", ref), params=params)
        return None if reply.status_code == 204 else _parse(reply, Operation)

    def act_on_vm(
        self,
        ref: str,
        action: VmAction,
        stop: StopRequest | None = None,
        *,
        wait_s: float = WAIT_S,
    ) -> Vm | Operation:
        """Start, pause, resume, stop, kill, reset or send Ctrl-Alt-Del."""
        path = url_path("vms", ref, action.value)
        return _outcome(self._send("POST", path, stop, {"wait": wait_s}), Vm)

    def patch_nic(self, ref: str, nic_id: str, patch: NicPatch) -> Vm:
        """Change a network interface."""
        return _parse(self._send("PATCH", url_path("vms", ref, "nics", nic_id), patch), Vm)

    def patch_disk(self, ref: str, disk_id: str, patch: DiskPatch) -> Vm:
        """Give a disk its new size, file or limits."""
        return _parse(self._send("PATCH", url_path("vms", ref, "disks", disk_id), patch), Vm)

    def patch_rate_group(self, ref: str, group_id: str, patch: RateGroupPatch) -> Vm:
        """Give a rate group its new limits."""
        path = url_path("vms", ref, "rate-groups", group_id)
        return _parse(self._send("PATCH", path, patch), Vm)

    def attach(
        self, ref: str, wanted: DiskCreate | NicCreate, *, wait_s: float = WAIT_S
    ) -> Vm | Operation:
        """Give a VM one more disk or network interface, at once if it runs."""
        path = url_path("vms", ref, "disks" if isinstance(wanted, DiskCreate) else "nics")
        return _outcome(self._send("POST", path, wanted, {"wait": wait_s}), Vm)

    def detach(
        self,
        ref: str,
        device: tuple[Literal["disk", "nic"], str],
        *,
        force: bool = False,
        timeout_s: float | None = None,
        wait_s: float = WAIT_S,
    ) -> Vm | Operation:
        """Take a disk or a network interface from a VM; ``force`` does not ask the guest."""
        path = url_path("vms", ref, f"{device[0]}s", device[1])
        params: Params = {"force": force, "timeout_s": timeout_s, "wait": wait_s}
        return _outcome(self._send("DELETE", path, params=params), Vm)

    def vm_stats(self, ref: str) -> VmStats:
        """Return a running VM's counters."""
        return _parse(self._send("GET", url_path("vms", ref, "stats")), VmStats)

    # consoles

    def read_log(
        self, ref: str, *, offset: int = 0, limit: int = 1 << 20
    ) -> tuple[int, bytes, int]:
        """Return (offset, bytes, end) of the console log; a negative offset counts from its end."""
        params: Params = {"offset": offset, "limit": limit}
        reply = self._send("GET", url_path("vms", ref, "console", "log"), params=params)
        headers = reply.headers
        return int(headers["Console-Offset"]), reply.content, int(headers["Console-End-Offset"])

    def follow_log(self, ref: str, *, offset: int = 0) -> Iterator[bytes]:
        """Yield the console log from ``offset`` on, as it grows, until the VM is deleted."""
        params: Params = {"offset": offset, "follow": True}
        path = url_path("vms", ref, "console", "log")
        # A guest may be silent for days.
        with self._stream(path, params, silence_s=None) as reply:
            yield from reply.iter_raw()

    def type_into(self, ref: str, data: bytes) -> int:
        """Type into the console; returns how many bytes the guest took."""
        reply = self._send("POST", url_path("vms", ref, "console", "input"), content=data)
        return _parse(reply, ConsoleInput).accepted_bytes

    # kernels and images

    def list_kernels(self) -> list[Kernel]:
        """Return all kernels in order of name."""
        return self._all("/v1/kernels", Kernel, {})

    def get_kernel(self, ref: str) -> Kernel:
        """Return one kernel by name or id."""
        return _parse(self._send("GET", url_path("kernels", ref)), Kernel)

    def import_kernel(self, wanted: KernelImport, *, wait_s: float = WAIT_S) -> Kernel | Operation:
        """Import a kernel from a path of the daemon's host."""
        return _outcome(self._send("POST", "/v1/kernels", wanted, {"wait": wait_s}), Kernel)

    def upload_kernel(
        self, name: str, data: Iterable[bytes], *, sha256: str | None = None, wait_s: float = WAIT_S
    ) -> Kernel | Operation:
        """Import a kernel from this side's bytes."""
        params: Params = {"name": name, "sha256": sha256, "wait": wait_s}
        return _outcome(self._upload("/v1/kernels/upload", params, data), Kernel)

    def delete_kernel(self, ref: str) -> None:
        """Delete a kernel that no VM uses."""
        self._send("DELETE", url_path("kernels", ref))

    def list_images(self) -> list[Image]:
        """Return all images in order of name."""
        return self._all("/v1/images", Image, {})

    def get_image(self, ref: str) -> Image:
        """Return one image by name or id."""
        return _parse(self._send("GET", url_path("images", ref)), Image)

    def import_image(self, wanted: ImageImport, *, wait_s: float = WAIT_S) -> Image | Operation:
        """Import an image from a path of the daemon's host."""
        return _outcome(self._send("POST", "/v1/images", wanted, {"wait": wait_s}), Image)

    def upload_image(
        self,
        name: str,
        data: Iterable[bytes],
        *,
        kind: Literal["disk", "initrd"] = "disk",
        sha256: str | None = None,
        wait_s: float = WAIT_S,
    ) -> Image | Operation:
        """Import an image from this side's bytes."""
        params: Params = {"name": name, "kind": kind, "sha256": sha256, "wait": wait_s}
        return _outcome(self._upload("/v1/images/upload", params, data), Image)

    def delete_image(self, ref: str) -> None:
        """Delete an image that no VM uses."""
        self._send("DELETE", url_path("images", ref))

    # operations, events, host

    def list_operations(self) -> list[Operation]:
        """Return the operations, the newest first."""
        return self._all("/v1/operations", Operation, {})

    def get_operation(self, operation_id: str, *, wait_s: float = 0) -> Operation:
        """Return an operation, at its end or after ``wait_s`` seconds (0..60)."""
        path = url_path("operations", operation_id)
        return _parse(self._send("GET", path, params={"wait": wait_s}), Operation)

    def cancel_operation(self, operation_id: str) -> Operation:
        """Ask an operation to stop."""
        return _parse(self._send("DELETE", url_path("operations", operation_id)), Operation)

    def settle(self, outcome: M | Operation, model: type[M]) -> M:
        """Return the object, after the end of its operation if there is one.

        Raises:
            OperationFailed: the operation failed or was cancelled.
        """
        if isinstance(outcome, model):
            return outcome
        assert isinstance(outcome, Operation)
        operation = self.finish(outcome)
        return model.model_validate_json(json.dumps(operation.result))

    def finish(self, operation: Operation) -> Operation:
        """Wait for the end of an operation.

        Raises:
            OperationFailed: it failed or was cancelled.
        """
        while operation.state is OperationState.RUNNING:
            operation = self.get_operation(operation.id, wait_s=WAIT_S)
        if operation.state is not OperationState.SUCCEEDED:
            raise OperationFailed(operation)
        return operation

    def list_events(self, *, after: int = 0, limit: int = 100) -> list[Event]:
        """Return events above ``after``, in order."""
        reply = self._send("GET", "/v1/events", params={"after": after, "limit": limit})
        return _parse(reply, Page[Event]).items

    def follow_events(self, *, after: int | None = None) -> Iterator[Event]:
        """Yield events above ``after``, or new ones only, until the daemon stops."""
        params: Params = {"after": after}
        with self._stream("/v1/events/stream", params, silence_s=SILENCE_S) as reply:
            kind = ""
            for line in reply.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    kind = value
                elif name == "data" and kind == "problem":
                    raise error_from_problem(Problem.model_validate_json(value))
                elif name == "data":
                    yield Event.model_validate_json(value)

    def host(self) -> Host:
        """Describe the host."""
        return _parse(self._send("GET", "/v1/host"), Host)

    # HTTP

    def _send(
        self,
        method: str,
        path: str,
        body: BaseModel | None = None,
        params: Params | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | Iterable[bytes] | None = None,
    ) -> httpx.Response:
        headers = dict(headers or {})
        if body is not None:
            content = body.model_dump_json(exclude_unset=True).encode()
            headers["Content-Type"] = "application/json"
        given = {name: value for name, value in (params or {}).items() if value is not None}
        with self._reaching():
            reply = self._http.request(method, path, params=given, headers=headers, content=content)
        if reply.is_error:
            raise _error_of(reply)
        return reply

    def _upload(self, path: str, params: Params, data: Iterable[bytes]) -> httpx.Response:
        headers = {"Content-Type": "application/octet-stream"}
        return self._send("POST", path, params=params, headers=headers, content=data)

    @contextmanager
    def _stream(
        self, path: str, params: Params, *, silence_s: float | None
    ) -> Iterator[httpx.Response]:
        given = {name: value for name, value in params.items() if value is not None}
        timeout = httpx.Timeout(WAIT_S, read=silence_s)
        with (
            self._reaching(),
            self._http.stream("GET", path, params=given, timeout=timeout) as reply,
        ):
            if reply.is_error:
                reply.read()
                raise _error_of(reply)
            yield reply

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            if self.endpoint.socket is not None:
                # A plainer word than connect(2) has, and httpx would leave its socket open.
                Path(self.endpoint.socket).stat()
        except OSError as err:
            raise Unreachable(self.endpoint, err.strerror or str(err)) from err
        try:
            yield
        except httpx.TransportError as err:
            raise Unreachable(self.endpoint, str(err) or type(err).__name__) from err

    def _all(self, path: str, model: type[M], filters: Params) -> list[M]:
        """Return every object of a list, page by page."""
        items: list[M] = []
        cursor: str | None = None
        while True:
            params: Params = {**filters, "limit": PAGE_LIMIT, "cursor": cursor}
            reply = self._send("GET", path, params=params)
            page = _parse(reply, Page[model])  # type: ignore[valid-type]  # made at run time
            items += page.items
            cursor = page.next_cursor
            if cursor is None:
                return items


def url_path(*parts: str) -> str:
    """Return the path under ``/v1`` of these segments, each quoted.

    Raises:
        Invalid: one of them cannot be a segment; the daemon would take the path for another's.
    """
    for part in parts:
        if part in {"", ".", ".."} or "/" in part:
            raise Invalid("invalid_value", f"{part!r} is no name and no id")
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def _parse(reply: httpx.Response, model: type[M]) -> M:
    try:
        return model.model_validate_json(reply.content)
    except ValidationError as err:
        raise Internal(
            "not_understood",
            f"{reply.request.url.path}: the reply is no {model.__name__}; is hosteld of another "
            f"version? {err.error_count()} fields differ",
        ) from err


def _outcome(reply: httpx.Response, model: type[M]) -> M | Operation:
    return _parse(reply, Operation) if reply.status_code == 202 else _parse(reply, model)


def _error_of(reply: httpx.Response) -> ApiError:
    try:
        return error_from_problem(Problem.model_validate_json(reply.content))
    except ValidationError:
        text = reply.text[:200].strip()
        return Internal("not_hostel", f"HTTP {reply.status_code}, not from hosteld: {text}")


def as_json(value: BaseModel | Sequence[BaseModel]) -> str:
    """Return what the daemon sent, indented, for programs and people."""
    if isinstance(value, BaseModel):
        return value.model_dump_json(indent=2)
    return json.dumps([item.model_dump(mode="json") for item in value], indent=2)
