# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The command line: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from api.cli.main import app
from api.cli.specs import (
    BadSpec,
    parse_disk,
    parse_label,
    parse_nic,
    parse_pmem,
    parse_rate_group,
    parse_share,
)
from api.models.common import ObjectRef
from api.models.resources import OperationState
from api.models.vms import VmState
from api.version import hostel_version
from tests.api.live import DEADLINE_S, LiveServer

ROOT = Path(__file__).parents[2]
CREATE = [
    *("vm", "create", "web-1", "--kernel", "debian", "--disk", "root=image:debian"),
    *("--nic", "net0", "--vcpus", "2", "--memory", "256", "--start"),
]
VM = ObjectRef(kind="vm", id="1", name="web-1")


class Cli:
    """Runs commands against a live daemon."""

    def __init__(self, live: LiveServer) -> None:
        self.live = live
        self.environ = {"HOSTEL_SOCKET": live.path, "HOSTEL_URL": "", "HOSTEL_TOKEN": ""}

    def run(self, *words: str, code: int = 0) -> Result:
        result = CliRunner().invoke(app, list(words), env=self.environ)
        assert result.exit_code == code, result.output
        return result

    def json(self, *words: str) -> Any:  # noqa: ANN401 - whatever JSON holds
        return json.loads(self.run(*words, "--json").stdout)


@pytest.fixture
def cli(live: LiveServer) -> Cli:
    return Cli(live)


def test_create_of_the_manual_makes_a_running_vm(cli: Cli) -> None:
    assert cli.run(*CREATE).stdout == "web-1 is running\n"
    (vm,) = cli.live.service.vms.values()
    assert (vm.vcpus, vm.memory_mib, vm.state) == (2, 256, VmState.RUNNING)
    assert vm.disks[0].image == "debian"
    assert vm.nics[0].id == "net0"


def test_a_vsock_device_is_asked_for_and_shown(cli: Cli) -> None:
    cli.run("vm", "create", "web-1", "--kernel", "debian", "--vsock", "unix,cid=7")
    assert cli.json("vm", "show", "web-1")["vsock"]["cid"] == 7
    assert "cid 7  /run/hostel/vsock/1/v.sock" in cli.run("vm", "show", "web-1").stdout
    cli.run("vm", "create", "web-2", "--kernel", "debian", "--vsock", "vhost,cid=8")
    assert "cid 8  vhost" in cli.run("vm", "show", "web-2").stdout


def test_persistent_memory_is_asked_for_and_shown(cli: Cli) -> None:
    pmem = ("--pmem", "data=/srv/data", "--pmem", "fixed=/srv/fixed,ro")
    cli.run("vm", "create", "web-1", "--kernel", "debian", *pmem)
    shown = cli.json("vm", "show", "web-1")["pmem"]
    assert [(p["path"], p["read_only"]) for p in shown] == [
        ("/srv/data", False),
        ("/srv/fixed", True),
    ]
    assert "2.0 MiB  /srv/data" in cli.run("vm", "show", "web-1").stdout
    cli.run("vm", "create", "web-2", "--kernel", "debian", "--pmem", "/srv/data", code=2)


def test_ports_are_asked_for_and_shown(cli: Cli) -> None:
    ports = ("--port", "tty,console", "--port", "agent")
    cli.run("vm", "create", "web-1", "--kernel", "debian", *ports)
    shown = cli.json("vm", "show", "web-1")["ports"]
    assert [(port["name"], port["console"]) for port in shown] == [("tty", True), ("agent", False)]
    assert "/run/hostel/vms/1/ports/agent" in cli.run("vm", "show", "web-1").stdout
    cli.run("vm", "create", "web-2", "--kernel", "debian", "--port", "tty,serial", code=2)


def test_a_watchdog_is_asked_for_and_shown(cli: Cli) -> None:
    cli.run("vm", "create", "web-1", "--kernel", "debian", "--watchdog", "pause")
    assert cli.json("vm", "show", "web-1")["watchdog"] == {"action": "pause"}
    cli.run("vm", "create", "web-2", "--kernel", "debian", "--watchdog", "bark", code=2)


@pytest.mark.parametrize("vsock", ["unix,port=7", "tcp", "unix,cid=2", "unix,cid=x"])
def test_a_vsock_device_that_cannot_be_is_a_usage_error(cli: Cli, vsock: str) -> None:
    cli.run("vm", "create", "web-1", "--kernel", "debian", "--vsock", vsock, code=2)


def test_vm_is_changed_by_set(cli: Cli) -> None:
    cli.run("vm", "create", "web-1", "--kernel", "debian", "--label", "old=1")
    words = ("--vcpus", "2", "--memory", "64", "--cmdline", "quiet", "--label", "env=prod")
    words += ("--kernel", "new", "--initrd", "early", "--on-reboot", "stop", "--on-panic", "reset")
    assert cli.run("vm", "set", "web-1", "--name", "web-2", *words).stdout == "web-2 is stopped\n"
    (vm,) = cli.live.service.vms.values()
    assert (vm.name, vm.vcpus, vm.memory_mib, vm.cmdline) == ("web-2", 2, 64, "quiet")
    assert (vm.kernel, vm.initrd, vm.on_reboot, vm.on_panic) == ("new", "early", "stop", "reset")
    assert vm.labels == {"env": "prod"}
    assert cli.json("vm", "set", "web-2", "--no-labels")["labels"] == {}
    assert vm.vcpus == 2


def test_set_of_nothing_or_of_what_cannot_be_is_a_usage_error(cli: Cli) -> None:
    cli.run("vm", "create", "web-1", "--kernel", "debian")
    for words in ([], ["--vcpus", "0"], ["--label", "x"], ["--label", "a=b", "--no-labels"]):
        assert cli.run("vm", "set", "web-1", *words, code=2).stderr.startswith("hostel: ")
    (vm,) = cli.live.service.vms.values()
    assert vm.version == 1


def test_cable_is_pulled(cli: Cli) -> None:
    cli.run(*CREATE)
    done = cli.run("vm", "set-nic", "web-1", "net0", "--link", "down")
    assert done.stdout == "interface net0: link changed\n"
    assert cli.json("vm", "set-nic", "web-1", "net0", "--link", "up")["nics"][0]["link"] == "up"
    assert "nic_not_found" in cli.run("vm", "set-nic", "web-1", "x", "--link", "up", code=1).stderr
    cli.run("vm", "set-nic", "web-1", "net0", "--link", "loose", code=2)
    cli.run("vm", "set-nic", "web-1", "net0", code=2)


def test_nic_is_limited_and_freed(cli: Cli) -> None:
    cli.run(*CREATE)
    limited = cli.json("vm", "set-nic", "web-1", "net0", "--rx-bps", "1000", "--rx-pps", "50")
    assert limited["nics"][0]["rx_limit"]["ops_per_s"] == 50
    freed = cli.json("vm", "set-nic", "web-1", "net0", "--rx-bps", "0")
    assert freed["nics"][0]["rx_limit"] is None


def test_rate_group_is_limited_and_let_go(cli: Cli) -> None:
    disks = ("--disk", "a=/a,group=all", "--disk", "b=/b,group=all")
    cli.run("vm", "create", "web-1", "--kernel", "debian", *disks, "--rate-group", "all,iops=10")
    shown = cli.run("vm", "show", "web-1").stdout
    assert "rate group all" in shown
    assert "10 requests/s" in shown
    done = cli.run("vm", "limit-group", "web-1", "all", "--bps", "4096", "--iops", "5")
    assert done.stdout == "rate group all: 4096 bytes/s and 5 requests/s\n"
    assert cli.run("vm", "limit-group", "web-1", "all").stdout == "rate group all: no limit\n"
    assert cli.json("vm", "limit-group", "web-1", "all")["rate_groups"][0]["rate_limit"] is None
    assert "rate_group_not_found" in cli.run("vm", "limit-group", "web-1", "x", code=1).stderr


def test_disk_is_grown(cli: Cli) -> None:
    cli.run(*CREATE)
    assert cli.run("vm", "grow-disk", "web-1", "root", "8").stdout == "disk root is 8 MiB\n"
    (vm,) = cli.live.service.vms.values()
    assert vm.disks[0].size_bytes == 8 << 20
    assert "disk_not_found" in cli.run("vm", "grow-disk", "web-1", "none", "8", code=1).stderr
    cli.run("vm", "grow-disk", "web-1", "root", "0", code=2)


def test_disk_has_another_file(cli: Cli) -> None:
    cli.run(*CREATE)
    swapped = cli.run("vm", "swap-disk", "web-1", "root", "/srv/other.raw").stdout
    assert swapped.startswith("disk root is /srv/other.raw, ")
    shown = cli.json("vm", "swap-disk", "web-1", "root", "/srv/third.raw")["disks"][0]
    assert (shown["path"], shown["image"]) == ("/srv/third.raw", None)
    here = cli.json("vm", "swap-disk", "web-1", "root", "other.raw")["disks"][0]
    assert here["path"] == str(Path("other.raw").absolute())


def test_devices_come_and_go_by_the_command_line(cli: Cli) -> None:
    cli.run(*CREATE)
    vm = cli.json("vm", "attach-disk", "web-1", "data=/srv/data.raw,ro")
    assert vm["disks"][-1]["read_only"] is True
    assert cli.json("vm", "attach-nic", "web-1", "net9,mtu=1400")["nics"][-1]["id"] == "net9"
    cli.live.service.kept_devices.add("data")
    assert "guest_keeps_device" in cli.run("vm", "detach-disk", "web-1", "data", code=1).stderr
    rest = cli.json("vm", "detach-disk", "web-1", "data", "--force")["disks"]
    assert [disk["id"] for disk in rest] == ["root"]
    rest = cli.json("vm", "detach-nic", "web-1", "net9")["nics"]
    assert [nic["id"] for nic in rest] == ["net0"]
    assert "write ID=" in cli.run("vm", "attach-disk", "web-1", "data", code=2).stderr


def test_create_prints_the_vm_as_json(cli: Cli) -> None:
    vm = cli.json(*CREATE, "--label", "env=prod", "--cmdline", "quiet")
    assert (vm["name"], vm["labels"], vm["cmdline"]) == ("web-1", {"env": "prod"}, "quiet")


def test_vm_is_steered_from_start_to_delete(cli: Cli) -> None:
    cli.run("vm", "create", "web-1", "--kernel", "debian")
    for action, state in [
        ("start", "running"),
        ("pause", "paused"),
        ("resume", "running"),
        ("reset", "running"),
        ("ctrl-alt-del", "running"),
        ("kill", "stopped"),
    ]:
        assert cli.run("vm", action, "web-1").stdout == f"web-1 is {state}\n"
    cli.run("vm", "start", "web-1")
    cli.run("vm", "stop", "web-1", "--timeout", "5", "--no-kill")
    assert cli.live.service.stops[-1] is not None
    assert cli.live.service.stops[-1].model_dump() == {"timeout_s": 5, "force": False}
    assert cli.run("vm", "delete", "web-1").stdout == "web-1 is deleted\n"


def test_list_is_a_table_or_json(cli: Cli) -> None:
    cli.run(*CREATE)
    lines = cli.run("vm", "list").stdout.splitlines()
    assert lines[0].split() == ["NAME", "STATE", "VCPUS", "MEMORY", "KERNEL", "ID"]
    assert lines[1].split()[:2] == ["web-1", "running"]
    assert [vm["name"] for vm in cli.json("vm", "list")] == ["web-1"]
    assert cli.json("vm", "list", "--state", "stopped") == []


def test_show_and_stats_tell_of_devices(cli: Cli) -> None:
    cli.run(*CREATE)
    assert "/state/debian" in cli.run("vm", "show", "web-1").stdout
    assert "read_bytes" in cli.run("vm", "stats", "web-1").stdout
    assert cli.json("vm", "show", "web-1")["nics"][0]["tap"] == "tap0"
    assert cli.json("vm", "stats", "web-1")["disks"] == {"root": {"read_bytes": 512}}


def test_values_are_no_markup(cli: Cli) -> None:
    cli.run("vm", "create", "web-1", "--kernel", "debian", "--cmdline", "a[red]b")
    assert "a[red]b" in cli.run("vm", "show", "web-1").stdout


@pytest.mark.parametrize("kind", ["kernel", "image"])
def test_kernels_and_images_have_their_commands(cli: Cli, kind: str, tmp_path: Path) -> None:
    cli.run(kind, "import", "debian", "/boot/file")
    file = tmp_path / "file"
    file.write_bytes(b"\x7fELF" * 1000)
    made = cli.json(kind, "import", "tiny", str(file), "--upload")
    assert made["size_bytes"] == 4000
    assert "tiny" in cli.run(kind, "list").stdout
    assert [each["name"] for each in cli.json(kind, "list")] == ["debian", "tiny"]
    assert "4000" in cli.run(kind, "show", "tiny").stdout
    assert cli.json(kind, "show", "tiny") == made
    assert cli.json(kind, "delete", "tiny") == {"deleted": "tiny"}
    assert cli.run(kind, "delete", "debian").stdout == "debian is deleted\n"


def test_image_kind_is_checked(cli: Cli) -> None:
    assert (
        "must be disk or initrd"
        in cli.run(*["image", "import", "a", "/b", "--kind", "x"], code=2).stderr
    )


def test_upload_of_a_missing_file_is_wrong_usage(cli: Cli) -> None:
    result = cli.run("kernel", "import", "a", "/nowhere/file", "--upload", code=2)
    assert result.stderr == (
        "hostel: /nowhere/file: No such file or directory; name a file that you may read\n"
    )


def test_operation_is_shown_instead_of_waited_for(cli: Cli) -> None:
    cli.run(*CREATE)
    cli.live.service.is_slow = True
    operation = cli.json("vm", "stop", "web-1", "--no-wait")
    assert operation["kind"] == "vm.stop"
    assert "begun" in cli.run("operation", "show", operation["id"]).stdout
    assert "running" in cli.run("operation", "list").stdout
    assert cli.json("operation", "show", operation["id"])["state"] == "running"
    assert cli.json("operation", "cancel", operation["id"])["state"] == "cancelled"
    assert cli.json("operation", "list")[0]["id"] == operation["id"]
    slow = cli.run("vm", "delete", "web-1", "--force", "--no-wait").stdout
    assert re.fullmatch(r"deleting web-1: operation [0-9a-f]+\n", slow)


def test_events_are_lines(cli: Cli) -> None:
    cli.run(*CREATE)
    cli.run("vm", "pause", "web-1")
    lines = cli.run("events", "--json").stdout.splitlines()
    assert [json.loads(line)["type"] for line in lines] == ["vm.created", "vm.pause"]
    assert "vm.pause" in cli.run("events", "--after", "1").stdout
    assert "vm.created" not in cli.run("events", "--after", "1").stdout


def test_logs_are_printed_whole(cli: Cli) -> None:
    cli.run(*CREATE)
    data = b"line\n" * 500_000  # more than one read
    cli.live.run(cli.live.service.say("web-1", data))
    assert cli.run("vm", "logs", "web-1").stdout_bytes == data
    assert cli.run("vm", "logs", "web-1", "--offset", "-5").stdout == "line\n"
    assert cli.json("vm", "logs", "web-1", "--offset", "-5") == {"output": "line\n"}


def test_followed_logs_end_with_the_vm(cli: Cli) -> None:
    cli.run(*CREATE)
    cli.live.run(cli.live.service.say("web-1", b"bye\n"))
    process = subprocess.Popen(
        command("vm", "logs", "web-1", "-f"), stdout=subprocess.PIPE, env=environ(cli), cwd=ROOT
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"bye\n"
        cli.run("vm", "delete", "web-1", "--force")
        assert process.stdout.read() == b""
    assert process.returncode == 0


def test_host_is_shown(cli: Cli) -> None:
    assert "direct" in cli.run("host").stdout
    assert cli.json("host")["cpu_count"] == 2


def test_doctor_asks_the_daemon_and_names_the_remedy(cli: Cli) -> None:
    shown = cli.run("doctor", code=1).stdout
    assert "modprobe tun" in shown
    assert shown.splitlines()[-1].startswith("tier: direct: ")
    report = json.loads(cli.run("doctor", "--json", code=1).stdout)
    assert report["tier"] == "direct"
    assert [check["status"] for check in report["checks"]] == ["ok", "missing"]


def fake_hosteld(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = directory / "hosteld"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(directory / "hostel")])


def test_doctor_asks_the_program_when_no_daemon_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = '{"name": "kvm", "status": "ok", "detail": "API 12", "remedy": null}'
    report = f'{{"tier": "full", "checks": [{check}]}}'
    fake_hosteld(tmp_path, f"echo '{report}'", monkeypatch)
    result = CliRunner().invoke(app, ["--socket", str(tmp_path / "none"), "doctor"])
    assert result.exit_code == 0
    assert "API 12" in result.stdout
    assert "tier: full: stock kernels run here" in result.stdout
    assert "hosteld --doctor" in result.stderr


@pytest.mark.parametrize("script", ["echo broken >&2; exit 1", "echo '{}'"])
def test_doctor_tells_when_the_program_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    fake_hosteld(tmp_path, script, monkeypatch)
    result = CliRunner().invoke(app, ["--socket", str(tmp_path / "none"), "doctor"])
    assert result.exit_code == 3
    assert "--doctor failed" in result.stderr


def test_doctor_waits_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.cli.host.DOCTOR_DEADLINE_S", 0.1)
    fake_hosteld(tmp_path, "exec sleep 60", monkeypatch)
    result = CliRunner().invoke(app, ["--socket", str(tmp_path / "none"), "doctor"])
    assert (result.exit_code, "took longer" in result.stderr) == (3, True)


def test_refusal_is_one_line_and_exit_1(cli: Cli) -> None:
    result = cli.run("vm", "show", "none", code=1)
    assert (result.stdout, result.stderr) == (
        "",
        "hostel: vm none is not there [vm_not_found]\n",
    )


def test_failed_operation_is_exit_1(cli: Cli) -> None:
    cli.run(*CREATE)
    cli.live.service.is_slow = True
    operation = cli.live.service.operation("vm.stop", VM)
    cli.live.run(cli.live.service.finish(operation.id, OperationState.CANCELLED))
    cli.live.service.operation = lambda kind, ref: cli.live.service.operations[operation.id]  # type: ignore[method-assign]
    assert "vm.stop was cancelled" in cli.run("vm", "stop", "web-1", code=1).stderr


def test_no_daemon_is_exit_3_with_what_to_do(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--socket", str(tmp_path / "none"), "vm", "list"])
    assert result.exit_code == 3
    assert "HOSTEL_SOCKET" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["vm", "create"], "Missing argument"),
        (["vm", "create", "a", "--kernel", "k", "--vcpus", "99"], "vcpus=99: must be 1..16"),
        (["vm", "create", "A", "--kernel", "k"], "name"),
        (["vm", "create", "a", "--kernel", "k", "--disk", "root"], "write ID=image:NAME"),
        (["vm", "list", "--state", "asleep"], "must be one of creating"),
        (["vm", "fly"], "No such command"),
        (["kernel", "import", "A", "/x"], 'name="A": must match'),
    ],
)
def test_wrong_usage_is_exit_2(cli: Cli, words: list[str], says: str) -> None:
    assert says in cli.run(*words, code=2).stderr


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("root=image:debian", {"id": "root", "image": "debian"}),
        ("root=image:debian,size=512", {"id": "root", "image": "debian", "size_mib": 512}),
        ("data=/dev/vg0/a,ro", {"id": "data", "path": "/dev/vg0/a", "read_only": True}),
        ("data=path:/a:b", {"id": "data", "path": "/a:b"}),
        (
            "data=/a,cache=none,io=threads,iops=100,bps=4096,group=tenant",
            {
                "id": "data",
                "path": "/a",
                "cache": "none",
                "io_engine": "threads",
                "rate_limit": {"ops_per_s": 100, "bytes_per_s": 4096},
                "rate_group": "tenant",
            },
        ),
    ],
)
def test_disk_is_read_as_written(text: str, disk: dict[str, Any]) -> None:
    assert parse_disk(text) == disk


@pytest.mark.parametrize(
    "text",
    [
        *("root", "=image:a", "root=", "root=debian", "root=image:a,rw", "root=image:a,size=x"),
        "root=https://a/b",
    ],
)
def test_unreadable_disk_says_how_to_write_it(text: str) -> None:
    with pytest.raises(BadSpec, match=re.escape(repr(text))):
        parse_disk(text)


def test_relative_paths_begin_where_the_command_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text, name in (("d=./a,ro", "a"), ("d=x/a", "x/a"), ("d=path:a", "a"), ("d=../a", "../a")):
        assert parse_disk(text)["path"] == f"{tmp_path}/{name}"
    assert parse_share("src=work")["path"] == f"{tmp_path}/work"
    assert parse_pmem("data=file,ro")["path"] == f"{tmp_path}/file"
    assert parse_nic("net0,socket=vhu0")["socket"] == f"{tmp_path}/vhu0"


def test_rate_group_is_read_as_written() -> None:
    assert parse_rate_group("all") == {"id": "all", "rate_limit": None}
    limit = {"ops_per_s": 100, "bytes_per_s": 4096}
    assert parse_rate_group("all,iops=100,bps=4096") == {"id": "all", "rate_limit": limit}
    for text in ("all,burst=1", "all,iops=x", "all,iops"):
        with pytest.raises(BadSpec, match=re.escape(repr(text))):
            parse_rate_group(text)


def test_nic_is_read_as_written() -> None:
    assert parse_disk("d=/f,format=qcow2") == {"id": "d", "path": "/f", "format": "qcow2"}
    assert parse_disk("d=nbd+unix:///x?socket=/s") == {
        "id": "d",
        "nbd": "nbd+unix:///x?socket=/s",
    }
    assert parse_share("src=/d,ro") == {"tag": "src", "path": "/d", "read_only": True}
    nic = parse_nic("net0,tap=tap7,bridge=br0,mac=02:00:00:00:00:01,mtu=1400,backend=tap,queues=2")
    assert nic == {
        "id": "net0",
        "tap": "tap7",
        "bridge": "br0",
        "mac": "02:00:00:00:00:01",
        "mtu": 1400,
        "backend": "tap",
        "queues": 2,
    }


@pytest.mark.parametrize("text", ["net0,tap", "net0,vlan=3", "net0,mtu=x"])
def test_unreadable_nic_is_refused(text: str) -> None:
    with pytest.raises(BadSpec):
        parse_nic(text)


def test_label_needs_a_value() -> None:
    assert parse_label("a=b=c") == ("a", "b=c")
    with pytest.raises(BadSpec):
        parse_label("a")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "api.cli.main", *words]


def environ(cli: Cli) -> dict[str, str]:
    return os.environ | cli.environ


def test_real_process_prints_json_alone_on_stdout(cli: Cli) -> None:
    run = subprocess.run(
        command(*CREATE, "--json"),
        env=environ(cli),
        cwd=ROOT,
        capture_output=True,
        timeout=DEADLINE_S,
        check=True,
    )
    assert json.loads(run.stdout)["name"] == "web-1"
    assert run.stderr == b""


def test_version_is_printed() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"hostel {hostel_version()}\n")


def commands(group: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:  # noqa: ANN401
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *words, name)
        else:
            yield (*words, name), command


def test_help_names_every_argument_alike_and_no_type_of_python() -> None:
    found = dict(commands(typer.main.get_command(app)))
    assert ("vm", "create") in found
    for words, command in found.items():
        shown = CliRunner().invoke(app, [*words, "--help"]).stdout
        assert "list[" not in shown, words
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        assert all((each.metavar or "").isupper() for each in arguments), words


def test_disk_help_names_all_that_can_be_written() -> None:
    shown = " ".join(CliRunner().invoke(app, ["vm", "create", "--help"]).stdout.split())
    for word in ("ro", "size=", "format=", "cache=", "io=", "bps=", "iops=", "group="):
        assert f",{word}" in shown


def test_help_loads_neither_client_nor_models(cli: Cli) -> None:
    code = (
        "import sys; from api.cli import main; "
        "print(*{'httpx', 'pydantic', 'rich', 'websockets', 'fastapi'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert run.stdout.strip() == b""


def test_console_joins_a_terminal_and_gives_it_back(cli: Cli) -> None:
    cli.run(*CREATE)
    cli.live.run(cli.live.service.say("web-1", b"login: "))
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    process = subprocess.Popen(
        command("vm", "console", "web-1"),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environ(cli),
        cwd=ROOT,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.read(7) == b"login: "
        assert termios.tcgetattr(theirs) != before
        os.write(ours, b"root\r\x03")  # Ctrl-C is the guest's
        cli.live.wait_until(lambda: bytes(*cli.live.service.typed.values()) == b"root\r\x03")
        os.write(ours, b"bye\x1dignored")
        assert process.wait(DEADLINE_S) == 0
    assert bytes(*cli.live.service.typed.values()) == b"root\r\x03bye"
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


def test_killed_console_gives_the_terminal_back(cli: Cli) -> None:
    cli.run(*CREATE)
    cli.live.run(cli.live.service.say("web-1", b"x"))
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    process = subprocess.Popen(
        command("vm", "console", "web-1"),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environ(cli),
        cwd=ROOT,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"
        process.terminate()
        assert process.wait(DEADLINE_S) == 128 + 15
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


def test_piped_console_types_its_input_and_leaves(cli: Cli) -> None:
    cli.run(*CREATE)
    run = subprocess.run(
        command("vm", "console", "web-1"),
        input=b"ls\n",
        env=environ(cli),
        cwd=ROOT,
        capture_output=True,
        timeout=DEADLINE_S,
        check=True,
    )
    assert run.stderr == b""
    cli.live.wait_until(lambda: bytes(*cli.live.service.typed.values()) == b"ls\n")


def test_console_types_a_whole_file_and_shows_the_answer(cli: Cli, tmp_path: Path) -> None:
    cli.run(*CREATE)
    cli.live.service.does_echo = True
    file = tmp_path / "input"
    file.write_bytes(b"ls\n" * 5000)
    with file.open("rb") as source:
        run = subprocess.run(
            command("vm", "console", "web-1"),
            stdin=source,
            env=environ(cli),
            cwd=ROOT,
            capture_output=True,
            timeout=DEADLINE_S,
            check=True,
        )
    assert bytes(*cli.live.service.typed.values()) == b"ls\n" * 5000
    assert run.stdout == b"ls\n" * 5000


def test_console_of_a_missing_vm_is_exit_1(cli: Cli) -> None:
    run = subprocess.run(
        command("vm", "console", "none"),
        stdin=subprocess.DEVNULL,
        env=environ(cli),
        cwd=ROOT,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (run.returncode, run.stderr) == (1, b"hostel: vm none is not there [vm_not_found]\n")
