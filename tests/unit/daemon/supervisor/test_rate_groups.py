# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Limits that several disks of a VM share, as its record has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from api.errors import Invalid, NotFound
from api.models.limits import RateGroup, RateGroupPatch, RateLimit
from api.models.vms import DiskCreate, Vm
from daemon.supervisor.service import Supervisor
from tests.support.supervisor import CALL, Harness

LIMIT = RateLimit(ops_per_s=100, ops_burst=5)
GROUPS = [{"id": "all", "rate_limit": {"ops_per_s": 7}}]


@pytest.fixture
def disks(harness: Harness) -> list[dict[str, Any]]:
    """Two disks of the group."""
    paths = [harness.path / "a.raw", harness.path / "b.raw"]
    for path in paths:
        path.write_bytes(bytes(4096))
    return [{"id": Path(path).stem, "path": str(path), "rate_group": "all"} for path in paths]


def test_a_group_that_the_vm_has_not_is_refused_with_those_that_it_has(
    harness: Harness, disks: list[dict[str, Any]]
) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        with pytest.raises(Invalid, match="has no rate group all; it has: none") as refused:
            await harness.create("a", disks=disks[1:])
        assert refused.value.field == "disks.0.rate_group"
        await harness.create("a", disks=disks[:1], rate_groups=GROUPS)
        other = DiskCreate.model_validate({**disks[1], "rate_group": "other"})
        with pytest.raises(Invalid, match="no rate group other; it has: all") as refused:
            await supervisor.attach("a", other, CALL)
        assert refused.value.field == "rate_group"
        with pytest.raises(NotFound, match="no rate group other; it has: all"):
            await supervisor.patch_rate_group("a", "other", RateGroupPatch(rate_limit=LIMIT), CALL)

    harness.run(scenario)


def test_a_group_is_changed_kept_and_shared_by_a_disk_that_comes_later(
    harness: Harness, disks: list[dict[str, Any]]
) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        made = await harness.start("a", disks=disks[:1], rate_groups=GROUPS)
        assert made.rate_groups == [RateGroup(id="all", rate_limit=RateLimit(ops_per_s=7))]
        patch = RateGroupPatch(rate_limit=LIMIT)
        vm = await supervisor.patch_rate_group("a", "all", patch, CALL)
        assert vm.rate_groups == [RateGroup(id="all", rate_limit=LIMIT)]
        outcome = await supervisor.attach("a", DiskCreate.model_validate(disks[1]), CALL)
        assert isinstance(outcome, Vm)
        assert [disk.rate_group for disk in outcome.disks] == ["all", "all"]
        assert (await harness.event_types()).count("vm.rate_group_limited") == 1

    async def after_a_restart(supervisor: Supervisor) -> None:
        vm = await supervisor.get_vm("a")
        assert vm.rate_groups == [RateGroup(id="all", rate_limit=LIMIT)]
        assert [disk.rate_group for disk in vm.disks] == ["all", "all"]
        vm = await supervisor.patch_rate_group("a", "all", RateGroupPatch(rate_limit=None), CALL)
        assert vm.rate_groups == [RateGroup(id="all", rate_limit=None)]

    harness.run(scenario)
    harness.run(after_a_restart)
