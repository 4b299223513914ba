# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The lifecycle table, enumerated wholly."""

from __future__ import annotations

import itertools

import pytest

from api.errors import Conflict
from api.models.vms import VmAction, VmState
from daemon.supervisor import lifecycle

S, A = VmState, VmAction

# What is allowed, written down a second time: every pair that is not here must be refused.
ALLOWED = {
    (S.STOPPED, A.START): S.STARTING,
    (S.CRASHED, A.START): S.STARTING,
    (S.RUNNING, A.PAUSE): S.PAUSED,
    (S.PAUSED, A.RESUME): S.RUNNING,
    (S.RUNNING, A.STOP): S.STOPPING,
    (S.STARTING, A.KILL): S.STOPPED,
    (S.RUNNING, A.KILL): S.STOPPED,
    (S.PAUSED, A.KILL): S.STOPPED,
    (S.STOPPING, A.KILL): S.STOPPED,
    (S.CRASHED, A.KILL): S.STOPPED,
    (S.RUNNING, A.RESET): S.RUNNING,
    (S.RUNNING, A.CTRL_ALT_DEL): S.RUNNING,
}
PAIRS = list(itertools.product(VmState, VmAction))
REFUSED = [pair for pair in PAIRS if pair not in ALLOWED]


@pytest.mark.parametrize(("state", "action"), list(ALLOWED))
def test_an_allowed_action_leads_to_its_state(state: VmState, action: VmAction) -> None:
    assert lifecycle.check_action("a", state, action) is ALLOWED[state, action]


@pytest.mark.parametrize(("state", "action"), REFUSED)
def test_a_refused_action_names_the_state_and_what_it_allows(
    state: VmState, action: VmAction
) -> None:
    with pytest.raises(Conflict) as caught:
        lifecycle.check_action("a", state, action)
    assert caught.value.state == state.value
    assert caught.value.allowed == [a.value for a in VmAction if (state, a) in ALLOWED]
    assert state.value in caught.value.detail


def test_every_state_has_a_rule() -> None:
    assert set(lifecycle.TABLE) == set(VmState)


@pytest.mark.parametrize("state", list(VmState))
def test_allowed_actions_are_those_of_the_table(state: VmState) -> None:
    assert lifecycle.allowed_actions(state) == [a for a in VmAction if (state, a) in ALLOWED]


@pytest.mark.parametrize("state", [S.STOPPED, S.CRASHED, S.DELETING])
def test_a_vm_at_rest_is_deleted_without_force(state: VmState) -> None:
    lifecycle.check_delete("a", state, force=False)


@pytest.mark.parametrize("state", [S.STARTING, S.RUNNING, S.PAUSED, S.STOPPING])
def test_a_live_vm_is_deleted_only_with_force(state: VmState) -> None:
    lifecycle.check_delete("a", state, force=True)
    with pytest.raises(Conflict, match="delete with force"):
        lifecycle.check_delete("a", state, force=False)


def test_a_vm_that_is_being_made_is_not_deleted() -> None:
    with pytest.raises(Conflict, match="nothing is allowed now"):
        lifecycle.check_delete("a", S.CREATING, force=True)


@pytest.mark.parametrize("state", [s for s in VmState if s not in (S.STOPPED, S.CRASHED)])
def test_a_shape_changes_only_at_rest(state: VmState) -> None:
    with pytest.raises(Conflict) as caught:
        lifecycle.check_reshape("a", state, "vcpus")
    assert caught.value.field == "vcpus"
    assert caught.value.allowed == ["stopped", "crashed"]


@pytest.mark.parametrize("state", list(VmState))
def test_an_outcome_outside_the_table_is_a_defect(state: VmState) -> None:
    with pytest.raises(AssertionError, match="no way from deleting"):
        lifecycle.check_outcome(S.DELETING, S.RUNNING)
    lifecycle.check_outcome(state, state)


@pytest.mark.parametrize("state", list(VmState))
def test_every_state_but_the_last_leads_on_to_deleting(state: VmState) -> None:
    reached = {state}
    while len(reached) != len(
        grown := reached.union(
            *(
                lifecycle.TABLE[s].outcomes | set(lifecycle.TABLE[s].actions.values())
                for s in reached
            )
        )
    ):
        reached = grown
    assert S.DELETING in reached
