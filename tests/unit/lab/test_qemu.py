# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from dataclasses import replace
from pathlib import Path

from lab.qemu import Disk, Forward, Machine, explain_death

MACHINE = Machine(
    kernel=Path("/k"),
    initrd=Path("/i"),
    control=Path("/control"),
    out=Path("/out,with,commas"),
    console=Path("/console"),
    agent_port=4000,
)


def words(machine: Machine) -> str:
    return " ".join(machine.command())


def test_forwards_bind_loopback_only_and_the_network_leads_nowhere() -> None:
    text = words(replace(MACHINE, forwards=(Forward(8080, 80),)))

    assert "user,id=net,restrict=on," in text
    assert "hostfwd=tcp:127.0.0.1:4000-10.0.2.15:1," in text
    assert "hostfwd=tcp:127.0.0.1:8080-10.0.2.15:80" in text


def test_the_root_of_this_machine_is_shared_read_only() -> None:
    assert "path=/,mount_tag=root,security_model=none,readonly=on" in words(MACHINE)


def test_commas_in_paths_are_doubled() -> None:
    assert "path=/out,,with,,commas," in words(MACHINE)


def test_images_are_read_only_and_scratch_is_not() -> None:
    disks = (Disk("venv", Path("/v")), Disk("scratch", Path("/s"), writable=True))

    text = words(replace(MACHINE, disks=disks))

    assert "file=/v,readonly=on" in text
    assert "file=/s,cache=unsafe" in text


def test_icount_means_one_cpu_and_one_thread() -> None:
    text = words(replace(MACHINE, icount=True, cpus=4))

    assert "-smp 1 " in text
    assert "thread=single" in text
    assert "-icount shift=0,sleep=off" in text


def test_a_taken_port_is_named() -> None:
    stderr = "-netdev user,...: Could not set up host forwarding rule 'tcp:127.0.0.1:8080-:80'"

    assert str(explain_death(stderr, "", (Forward(8080, 80),))) == (
        "port 127.0.0.1:8080 is in use: choose another one"
    )


def test_what_init_says_is_passed_on() -> None:
    error = explain_death("", "noise\nlab: failed: no image venv\n", ())

    assert str(error) == "the lab did not start: no image venv"


def test_otherwise_the_end_of_what_qemu_said_is_quoted() -> None:
    error = explain_death("warning\ncannot set up guest memory\n", "console", ())

    assert str(error).endswith("warning | cannot set up guest memory")


def test_silence_is_told_as_such() -> None:
    assert str(explain_death("", "", ())).endswith("it printed nothing")
