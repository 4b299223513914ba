# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""One Debian guest through its life: each test goes on where the one before has left it."""

from __future__ import annotations

import hashlib
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.sync.client import ClientConnection, unix_connect

from lab.guests import Guest
from lab.hosteld import is_running
from tests.support.hostel import Hostel, has_tap
from tests.support.linux import LinuxGuest

MIB = 1 << 20
DATA_MIB = 16
GROWN_MIB = 24
VCPUS = 2
MEMORY_MIB = 256
TAP = "hg-main"
PATTERN = bytes(range(256)) * (4 * MIB // 256)


@pytest.fixture(scope="module")
def files(hostel: Hostel) -> dict[str, Path]:
    """The raw files behind the guest's data disks."""
    data = hostel.directory / "data.raw"
    data.write_bytes(bytes(DATA_MIB * MIB))
    fixed = hostel.directory / "fixed.raw"
    fixed.write_bytes(PATTERN)
    return {"data": data, "fixed": fixed}


@pytest.fixture(scope="module")
def main(hostel: Hostel, guest: Guest, files: dict[str, Path]) -> Iterator[LinuxGuest]:
    hostel.api.post(
        "/v1/vms?wait=60",
        {
            "name": "main",
            "vcpus": VCPUS,
            "memory_mib": MEMORY_MIB,
            "kernel": "debian",
            "initrd": "initrd",
            "cmdline": guest.cmdline,
            "disks": [
                {"id": "root", "image": "root"},
                {"id": "data", "path": str(files["data"])},
                {"id": "fixed", "path": str(files["fixed"]), "read_only": True},
            ],
            "nics": [{"id": "net0", "tap": TAP, "mac": "02:00:00:00:77:02", "mtu": 1400}],
            "rng": True,
        },
    )
    main = LinuxGuest(hostel, guest, "main")
    with main.running():
        yield main


def test_it_boots_from_its_disk_and_times_its_boot(main: LinuxGuest) -> None:
    assert main.vm["state"] == "running"
    assert main.vm["boot_time_us"] > 0
    assert "/dev/vda / ext4 rw" in main.ask("cat /proc/mounts")


def test_it_has_its_vcpus_and_memory(main: LinuxGuest) -> None:
    assert main.ask("grep -c ^processor /proc/cpuinfo") == str(VCPUS)
    kib = int(main.ask("sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"))
    assert 0.7 * MEMORY_MIB < kib / 1024 <= MEMORY_MIB


def test_its_clock_is_the_host_s(main: LinuxGuest) -> None:
    source = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
    assert main.ask(f"cat {source}") in {"kvm-clock", "tsc"}
    assert abs(int(main.ask("date +%s")) - time.time()) < 60


def test_its_disks_are_known_by_their_ids(main: LinuxGuest) -> None:
    serials = main.ask("for s in /sys/block/vd?/serial; do cat $s; echo; done").split()
    assert serials == ["root", "data", "fixed"]


def test_what_it_writes_and_syncs_is_in_the_host_s_file(
    main: LinuxGuest, files: dict[str, Path]
) -> None:
    main.ask("dd if=/dev/urandom of=/tmp/random bs=64k count=64")
    main.ask("dd if=/tmp/random of=/dev/vdb bs=64k seek=16 conv=notrunc,fsync")
    digest = main.ask("sha256sum < /tmp/random").split()[0]
    written = files["data"].read_bytes()[MIB : 5 * MIB]
    assert hashlib.sha256(written).hexdigest() == digest


def test_what_the_host_wrote_is_what_it_reads(main: LinuxGuest) -> None:
    digest = main.ask("dd if=/dev/vdc bs=64k iflag=direct 2> /dev/null | sha256sum").split()[0]
    assert digest == hashlib.sha256(PATTERN).hexdigest()


def test_a_read_only_disk_takes_no_write(main: LinuxGuest, files: dict[str, Path]) -> None:
    assert main.ask("cat /sys/block/vdc/ro") == "1"
    # By its words: busybox's dd ends with status 0 all the same.
    answer = main.sh("echo x | dd of=/dev/vdc bs=512 count=1 conv=fsync")
    assert "Operation not permitted" in answer.text
    assert files["fixed"].read_bytes() == PATTERN


def test_a_discard_gives_the_host_its_room_back(main: LinuxGuest, files: dict[str, Path]) -> None:
    before = files["data"].stat().st_blocks
    main.ask("blkdiscard -o 0 -l 8388608 /dev/vdb")
    assert files["data"].stat().st_blocks < before
    assert files["data"].stat().st_size == DATA_MIB * MIB
    assert main.ask("head -c 8388608 /dev/vdb | tr -d '\\0' | wc -c") == "0"


def test_a_grown_disk_is_seen_at_once(main: LinuxGuest) -> None:
    path = "/v1/vms/main/disks/root"
    size = int(main.ask("cat /sys/block/vda/size")) * 512 // MIB
    main.hostel.api.call("PATCH", path, {"size_mib": size + GROWN_MIB})
    seen = main.ask(
        f"for i in $(seq 50); do read s < /sys/block/vda/size; "
        f"[ $s = {(size + GROWN_MIB) * 2048} ] && break; usleep 100000; done; echo $s"
    )
    assert int(seen) == (size + GROWN_MIB) * 2048
    assert "capacity change" in main.ask("dmesg")


def test_it_has_entropy_from_the_host(main: LinuxGuest) -> None:
    assert "virtio" in main.ask("cat /sys/class/misc/hw_random/rng_current")
    first, second = (main.ask("head -c 64 /dev/hwrng | sha256sum") for _ in range(2))
    assert first != second
    assert main.ask("head -c 100000 /dev/hwrng | wc -c") == "100000"


def test_two_see_one_console_and_a_late_one_the_recent_past(main: LinuxGuest) -> None:
    uri = "ws://localhost/v1/vms/main/console"
    path = str(main.hostel.daemon.socket)
    with unix_connect(path, uri) as first, unix_connect(path, uri) as second:
        first.send(b"echo from the fi''rst\n")
        assert "from the first" in _read(second, "from the first")
        second.send("echo from the sec''ond\n")
        assert "from the second" in _read(first, "from the second")
    with unix_connect(path, uri) as late:
        assert "from the first" in _read(late, "from the second")


def _read(connection: ClientConnection, marker: str) -> str:
    text = ""
    while marker not in text:
        piece = connection.recv(timeout=60)
        text += piece if isinstance(piece, str) else piece.decode(errors="replace")
    return text


def test_a_pause_stops_it_and_a_resume_harms_nothing(main: LinuxGuest) -> None:
    before = float(main.ask("cat /proc/uptime").split()[0])
    assert main.hostel.api.act("main", "pause")["state"] == "paused"
    time.sleep(30)  # longer than the 20 s after which Linux calls a vCPU stuck
    assert main.hostel.api.act("main", "resume")["state"] == "running"
    after = float(main.ask("cat /proc/uptime").split()[0])
    assert after >= before
    assert not re.search("soft lockup|rcu.*stall|hung task", main.ask("dmesg"))


def test_its_counters_tell_what_it_did(main: LinuxGuest) -> None:
    stats = main.hostel.api.get("/v1/vms/main/stats")
    assert set(stats["disks"]) == {"root", "data", "fixed"}
    assert sum(stats["disks"]["data"].values()) > 4 * MIB
    assert sum(stats["vcpu_exits"].values()) > 0
    assert stats["memory_rss_bytes"] > 32 * MIB
    assert stats["console_dropped_bytes"] == 0


def test_a_killed_hosteld_finds_it_again_and_its_console_goes_on(main: LinuxGuest) -> None:
    before = main.vm
    offset = main.log_end()
    main.type("echo asked before; sleep 3; echo said mean''while")
    main.hostel.daemon.kill()
    assert is_running(before["pid"])
    main.hostel.daemon.start()
    after = main.vm
    assert (after["pid"], after["state"]) == (before["pid"], "running")
    main.attach(offset)
    assert main.console is not None
    main.console.wait_for("said meanwhile", limit_s=60)
    assert main.ask("echo $((6 * 7))") == "42"


def test_a_reboot_keeps_what_its_disk_holds(main: LinuxGuest) -> None:
    main.ask("echo kept > /root/kept; sync")
    pid, offset = main.vm["pid"], main.log_end()
    main.type("reboot")
    main.attach(offset)
    main.log_in()
    assert main.ask("cat /root/kept") == "kept"
    assert main.vm["pid"] == pid


def test_the_power_button_powers_it_off(main: LinuxGuest) -> None:
    vm = main.hostel.api.act("main", "stop", {"timeout_s": 60, "force": False})
    assert vm["state"] == "stopped"
    assert vm["reason"] is None  # it did what was asked
    assert vm["pid"] is None
    subprocess.run(["e2fsck", "-fn", vm["disks"][0]["path"]], check=True, capture_output=True)


def test_a_stop_and_a_start_keep_what_its_disk_holds(main: LinuxGuest) -> None:
    main.hostel.api.call("PATCH", "/v1/vms/main", {"on_reboot": "stop"})
    main.start()
    assert main.ask("cat /root/kept") == "kept"


def test_a_reboot_stops_it_if_that_is_wanted(main: LinuxGuest) -> None:
    main.type("reboot")
    main.wait_ended("guest_reboot")


def test_nothing_of_it_is_left_once_it_is_deleted(main: LinuxGuest, files: dict[str, Path]) -> None:
    disk = Path(main.vm["disks"][0]["path"])
    assert disk.exists()
    main.delete()
    assert not disk.exists()
    assert not has_tap(TAP)
    assert files["data"].exists()
    main.hostel.wait_workers()
    assert list((main.hostel.daemon.state_dir / "vms").iterdir()) == []
    # For the fixture, which deletes what is there.
    main.hostel.create(b"\xf4", name="main")
