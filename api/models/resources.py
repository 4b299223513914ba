# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Kernels, images, operations, events and the host."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from .common import HostPath, Json, Name, ObjectRef, Problem, Request, Response, Sha256, Timestamp


class KernelImport(Request):
    """A kernel to take from a path of the host."""

    name: Name
    path: HostPath
    sha256: Sha256 | None = Field(default=None, description="Refuse the file if it differs.")


class ImageImport(Request):
    """A raw disk image or an initrd to take from a path of the host."""

    name: Name
    kind: Literal["disk", "initrd"] = "disk"
    path: HostPath
    sha256: Sha256 | None = Field(default=None, description="Refuse the file if it differs.")


class Kernel(Response):
    """An imported kernel; a bzImage is unpacked once, here, and entered as ELF."""

    id: str
    name: str
    sha256: str = Field(description="Of the file as it was imported.")
    size_bytes: int
    format: Literal["bzImage", "elf"]
    compression: str | None = Field(description="Of a bzImage's payload.", examples=["xz"])
    entry: Literal["linux64", "pvh"]
    banner: str | None = Field(description="The kernel's own version text, if it carries one.")
    created_at: Timestamp
    version: int


class Image(Response):
    """An imported disk image or initrd. Immutable."""

    id: str
    name: str
    kind: Literal["disk", "initrd"]
    sha256: str
    size_bytes: int
    created_at: Timestamp
    version: int


class OperationState(StrEnum):
    """Where an operation is."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Progress(Response):
    """How far an operation has come."""

    done: int
    total: int | None
    unit: Literal["bytes", "steps"]


class Operation(Response):
    """Something that takes longer than a request may."""

    id: str
    kind: str = Field(examples=["vm.stop", "kernel.import"])
    object: ObjectRef
    state: OperationState
    progress: Progress | None
    result: Json | None = Field(description="The object, once it succeeded.")
    error: Problem | None
    log: list[str] = Field(description="What it did, one line a step.")
    may_cancel: bool
    created_at: Timestamp
    finished_at: Timestamp | None


class Event(Response):
    """Something that happened; ids grow and are never used twice."""

    id: int = Field(description="The cursor: pass as `after` to get what came later.")
    at: Timestamp
    type: str = Field(examples=["vm.started"])
    object: ObjectRef
    actor: str | None = Field(description="Who asked for it.", examples=["unix:uid=0"])
    data: Json


Tier = Literal["any", "direct", "full"]


class Check(Response):
    """One thing that this host can or cannot do, and what to do about a lack."""

    name: str = Field(examples=["kvm"])
    status: Literal["ok", "warning", "missing"]
    detail: str
    remedy: str | None


class DoctorReport(Response):
    """What a host can do, as `hosteld --doctor` and `hostel doctor` tell it."""

    tier: Tier
    checks: list[Check]


class Host(Response):
    """The host and the daemon."""

    hostname: str
    version: str
    tier: Tier = Field(
        description="any: no KVM; direct: KVM that interprets ring 0; full: runs stock kernels."
    )
    kernel: str
    cpu_count: int
    memory_bytes: int
    memory_available_bytes: int
    vm_count: int
    vm_running_count: int
    api_extensions: list[str]
    checks: list[Check]


class ApiRoot(Response):
    """Where to start."""

    name: str = "Hostel"
    version: str = Field(description="Of the daemon.", examples=["0.1.0"])
    api_versions: list[str] = Field(examples=[["v1"]])
    api_extensions: list[str] = Field(
        description="What was added to v1 since its first release, oldest first."
    )
    links: dict[str, str] = Field(description="Path of each collection by its name.")
