# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A VM's life through the API, with guests of a few bytes on a real KVM."""

from __future__ import annotations

from pathlib import Path

import pytest

from devices.legacy.i8042 import CTRL_ALT_DEL, MAX_PENDING_BYTES
from lab.hosteld import is_running
from lab.rest import ApiFailure, Console, Json
from tests.support import tiny_kernel as tiny
from tests.support.hostel import Hostel, has_tap

# Long enough between two dots that a pause falls between them, short enough not to wait for.
TICKING = tiny.boot_timer() + tiny.forever(tiny.say(".") + tiny.delay(20_000))
QUIET = tiny.boot_timer() + tiny.HALT


def stops_with(hostel: Hostel, name: str, code: str) -> Json:
    vm = hostel.api.wait_state(name, "stopped")
    assert vm["reason"]["code"] == code
    return vm


def test_a_guest_starts_pauses_resumes_and_dies(hostel: Hostel) -> None:
    name = hostel.create(TICKING)
    assert hostel.api.vm(name)["state"] == "stopped"
    started = hostel.api.act(name, "start")
    assert started["state"] == "running"
    assert is_running(started["pid"])
    ticked = hostel.api.wait_vm(name, lambda vm: vm["boot_time_us"] is not None, "timed")
    assert ticked["boot_time_us"] > 0
    console = Console(hostel.api, name)
    seen = console.wait_for("..")

    assert hostel.api.act(name, "pause")["state"] == "paused"
    seen = len(hostel.console(name))
    assert hostel.api.vm(name)["state"] == "paused"
    assert len(hostel.console(name)) == seen

    assert hostel.api.act(name, "resume")["state"] == "running"
    console.wait_for(".", after=seen)

    killed = hostel.api.act(name, "kill")
    assert killed["state"] == "stopped"
    assert killed["pid"] is None
    assert not is_running(started["pid"])
    hostel.delete(name)
    with pytest.raises(ApiFailure, match="404"):
        hostel.api.vm(name)


def test_a_guest_entered_by_pvh_runs(hostel: Hostel) -> None:
    kernel = hostel.kernel(tiny.boot_timer() + tiny.say("pvh here") + tiny.HALT, pvh=True)
    assert hostel.api.get(f"/v1/kernels/{kernel}")["entry"] == "pvh"
    body = {"name": "by-pvh", "kernel": kernel, "memory_mib": 16, "start": True}
    hostel.api.post("/v1/vms?wait=60", body)
    Console(hostel.api, "by-pvh").wait_for("pvh here")
    hostel.delete("by-pvh")


def test_a_guest_that_powers_off_is_stopped_for_that_reason(hostel: Hostel) -> None:
    code = tiny.say("bye") + tiny.out(tiny.SLEEP_CONTROL, tiny.SLEEP_S5) + tiny.HALT
    name = hostel.run(code)
    stops_with(hostel, name, "guest_poweroff")
    assert hostel.console(name) == "bye"
    hostel.wait_workers()
    hostel.delete(name)


def test_a_guest_that_resets_itself_boots_again(hostel: Hostel) -> None:
    reset = tiny.out(tiny.I8042_COMMAND, tiny.I8042_RESET)
    name = hostel.run(tiny.say("boot ") + reset + tiny.HALT)
    console = Console(hostel.api, name)
    console.wait_for("boot boot boot")
    assert hostel.api.vm(name)["state"] == "running"
    hostel.delete(name)


def test_a_guest_that_resets_itself_stops_if_that_is_wanted(hostel: Hostel) -> None:
    reset = tiny.out(tiny.I8042_COMMAND, tiny.I8042_RESET)
    name = hostel.run(reset + tiny.HALT, on_reboot="stop")
    stops_with(hostel, name, "guest_reboot")
    hostel.delete(name)


def test_a_panic_is_told_and_the_guest_kept(hostel: Hostel) -> None:
    name = hostel.run(tiny.out(tiny.PVPANIC, tiny.PVPANIC_PANICKED) + tiny.HALT)
    vm = hostel.api.wait_vm(name, lambda vm: vm["reason"] is not None, "told of a panic")
    assert (vm["state"], vm["reason"]["code"]) == ("running", "guest_panic")
    hostel.delete(name)


def test_a_panic_stops_the_guest_if_that_is_wanted(hostel: Hostel) -> None:
    code = tiny.out(tiny.PVPANIC, tiny.PVPANIC_PANICKED) + tiny.HALT
    name = hostel.run(code, on_panic="stop")
    stops_with(hostel, name, "guest_panic")
    hostel.delete(name)


def is_kept_for_a_look(hostel: Hostel, name: str, exit_kind: str) -> Json:
    """Return a VM that has crashed: its worker lives, tells what happened, and runs no vCPU."""
    vm = hostel.api.wait_state(name, "crashed")
    assert vm["pid"] is not None
    assert is_running(vm["pid"])
    hostel.wait_workers(vm["pid"])
    exits = hostel.api.get(f"/v1/vms/{name}/stats")["vcpu_exits"]
    assert exits[exit_kind] == 1
    assert hostel.api.get(f"/v1/vms/{name}/stats")["vcpu_exits"] == exits
    assert hostel.console(name) == "x"
    return vm


def test_a_triple_fault_is_a_crash_that_can_be_started_again(hostel: Hostel) -> None:
    name = hostel.run(tiny.say("x") + tiny.TRIPLE_FAULT)
    pid = hostel.api.vm(name)["pid"]
    vm = is_kept_for_a_look(hostel, name, "shutdown")
    assert vm["reason"]["code"] == "triple_fault"
    assert vm["pid"] == pid
    assert set(vm["actions"]) == {"start", "kill"}
    # A start takes a new worker, and the one that was kept is gone then.
    hostel.api.act(name, "start")
    again = hostel.api.wait_state(name, "crashed")
    assert again["pid"] != pid
    hostel.wait_workers(again["pid"])
    hostel.delete(name)
    hostel.wait_workers()


def test_an_instruction_that_kvm_lacks_is_told_with_its_place(hostel: Hostel) -> None:
    if hostel.api.get("/v1/host")["tier"] != "direct":
        pytest.skip("a full host runs every instruction")
    code = tiny.say("x") + b"\x0f\xae\x28"  # xrstor: KVM's emulator has no such thing
    name = hostel.run(code)
    pid = hostel.api.vm(name)["pid"]
    vm = is_kept_for_a_look(hostel, name, "internal_error")
    assert vm["pid"] == pid
    assert vm["reason"]["code"] == "kvm_internal_error"
    detail = vm["reason"]["detail"]
    assert int(str(detail["rip"]), 0) == tiny.LOAD_GPA + len(tiny.say("x"))
    assert str(detail["instruction"]).startswith("0fae28")
    # A restarted hosteld finds it as it was.
    hostel.restart()
    adopted = hostel.api.vm(name)
    assert (adopted["state"], adopted["pid"], adopted["reason"]) == ("crashed", pid, vm["reason"])
    assert hostel.api.act(name, "kill")["pid"] is None
    hostel.wait_workers()
    hostel.delete(name)


def test_a_reset_boots_the_guest_again(hostel: Hostel) -> None:
    name = hostel.run(tiny.say("boot ") + tiny.HALT)
    console = Console(hostel.api, name)
    console.wait_for("boot ")
    hostel.api.act(name, "reset")
    console.wait_for("boot boot ")
    hostel.delete(name)


def test_keys_that_the_guest_never_reads_are_refused_when_no_more_fit(hostel: Hostel) -> None:
    name = hostel.run(QUIET)
    for _ in range(MAX_PENDING_BYTES // len(CTRL_ALT_DEL)):
        assert hostel.api.act(name, "ctrl-alt-del")["state"] == "running"
    with pytest.raises(ApiFailure) as failure:
        hostel.api.act(name, "ctrl-alt-del")
    problem = failure.value.problem
    assert (problem["status"], problem["code"]) == (409, "guest_ignores_keys")
    assert "use stop or reset" in problem["detail"]
    hostel.api.act(name, "reset")
    assert hostel.api.act(name, "ctrl-alt-del")["state"] == "running"
    hostel.delete(name)


def test_a_deaf_guest_is_killed_when_its_time_to_stop_is_over(hostel: Hostel) -> None:
    name = hostel.run(QUIET)
    vm = hostel.api.act(name, "stop", {"timeout_s": 0.2})
    assert vm["state"] == "stopped"
    assert vm["reason"] is not None
    hostel.delete(name)


def test_a_deaf_guest_lives_on_if_it_must_not_be_killed(hostel: Hostel) -> None:
    name = hostel.run(QUIET)
    with pytest.raises(ApiFailure):
        hostel.api.act(name, "stop", {"timeout_s": 0.2, "force": False})
    assert hostel.api.wait_state(name, "running")["pid"] is not None
    hostel.delete(name)


def test_a_vm_can_be_started_many_times(hostel: Hostel) -> None:
    name = hostel.create(QUIET)
    for _ in range(5):
        hostel.api.act(name, "start")
        hostel.api.wait_vm(name, lambda vm: vm["boot_time_us"] is not None, "timed")
        hostel.api.act(name, "kill")
    hostel.delete(name)


@pytest.mark.parametrize("vcpus", [2, 16])
def test_a_guest_with_several_vcpus_starts_and_pauses(hostel: Hostel, vcpus: int) -> None:
    name = hostel.run(QUIET, vcpus=vcpus)
    assert hostel.api.act(name, "pause")["state"] == "paused"
    assert hostel.api.act(name, "resume")["state"] == "running"
    hostel.delete(name)


def test_a_tap_lives_as_long_as_its_vm(hostel: Hostel) -> None:
    name = hostel.create(QUIET, nics=[{"id": "net0", "tap": hostel.tap("tap0")}])
    hostel.api.act(name, "start")
    assert has_tap(hostel.tap("tap0"))
    assert [nic["tap"] for nic in hostel.api.vm(name)["nics"]] == [hostel.tap("tap0")]
    hostel.delete(name)
    assert not has_tap(hostel.tap("tap0"))


def test_a_wrong_state_names_the_state_and_what_it_allows(hostel: Hostel) -> None:
    name = hostel.create(QUIET)
    with pytest.raises(ApiFailure) as failure:
        hostel.api.act(name, "pause")
    problem = failure.value.problem
    assert (problem["status"], problem["state"]) == (409, "stopped")
    assert problem["allowed"] == ["start"]
    hostel.delete(name)


def test_a_running_vm_is_deleted_only_by_force(hostel: Hostel) -> None:
    name = hostel.run(QUIET)
    with pytest.raises(ApiFailure, match="409"):
        hostel.api.delete(f"/v1/vms/{name}")
    hostel.delete(name)
    hostel.wait_workers()
    assert not list((hostel.daemon.runtime_dir / "vms").iterdir())
    assert not list((hostel.daemon.state_dir / "vms").iterdir())


def test_a_cable_is_pulled_while_the_guest_runs(hostel: Hostel) -> None:
    tap = hostel.tap("cable")
    nics = [{"id": "net0", "tap": tap, "backend": "tap", "queues": 2}]
    name = hostel.run(QUIET, nics=nics)
    carrier = Path("/sys/class/net", tap, "carrier")
    assert carrier.read_text().strip() == "1"
    path = f"/v1/vms/{name}/nics/net0"
    hostel.api.call("PATCH", path, {"link": "down"})
    assert carrier.read_text().strip() == "0"
    hostel.api.call("PATCH", path, {"tx_limit": {"bytes_per_s": 1 << 20, "ops_per_s": 100}})
    hostel.api.act(name, "reset")
    assert hostel.api.vm(name)["nics"][0]["tx_limit"]["ops_per_s"] == 100
    assert carrier.read_text().strip() == "0"
    hostel.api.call("PATCH", path, {"link": "up"})
    assert carrier.read_text().strip() == "1"
    hostel.delete(name)
    assert not has_tap(tap)
