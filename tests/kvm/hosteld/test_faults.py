# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Processes that are killed, disks that fill, guests that are hostile."""

from __future__ import annotations

import contextlib
import os
import random
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.hosteld import Hosteld, is_running
from lab.rest import ApiFailure, Console
from tests.support import tiny_kernel as tiny
from tests.support.hostel import Hostel, has_tap, is_locked, kill, name_of

QUIET = tiny.boot_timer() + tiny.HALT
NOBODY = 65534
BUSY = tiny.boot_timer() + tiny.SPIN


@pytest.mark.parametrize("code", [QUIET, BUSY], ids=["halted", "spinning"])
def test_a_killed_worker_is_told_at_once_with_its_reason(hostel: Hostel, code: bytes) -> None:
    name = hostel.run(code, nics=[{"id": "net0", "tap": hostel.tap("fault")}])
    kill(hostel.api.vm(name)["pid"])
    vm = hostel.api.wait_state(name, "crashed", limit_s=10)
    assert vm["reason"]["code"] == "worker_killed"
    assert "SIGKILL" in vm["reason"]["message"]
    assert vm["pid"] is None
    assert not has_tap(hostel.tap("fault"))
    hostel.api.act(name, "start")
    hostel.delete(name)


def test_a_worker_killed_while_paused_is_told(hostel: Hostel) -> None:
    name = hostel.run(QUIET)
    pid = hostel.api.act(name, "pause")["pid"]
    kill(pid)
    assert hostel.api.wait_state(name, "crashed", limit_s=10)["reason"]["code"] == "worker_killed"
    hostel.delete(name)


def test_a_worker_killed_while_stopping_ends_the_stop(hostel: Hostel) -> None:
    name = hostel.run(QUIET)
    pid = hostel.api.vm(name)["pid"]
    hostel.api.request("POST", f"/v1/vms/{name}/stop?wait=0", {"timeout_s": 60})
    kill(pid)
    vm = hostel.api.wait_vm(name, lambda vm: vm["pid"] is None, "ended", limit_s=10)
    assert vm["state"] in {"crashed", "stopped"}
    assert vm["reason"]["code"] == "worker_killed"
    hostel.delete(name)


def _with_a_vm(hostel: Hostel) -> list[int]:
    return [pid for pid in hostel.workers() if name_of(pid).startswith("vm-")]


def test_a_worker_killed_while_starting_is_told(hostel: Hostel) -> None:
    """Killed as soon as it is seen, wherever in its start that is."""
    name = hostel.create(QUIET, vcpus=16, memory_mib=64)
    hostel.api.request("POST", f"/v1/vms/{name}/start?wait=0")
    while not (pids := _with_a_vm(hostel)) and hostel.api.vm(name)["state"] != "running":
        continue
    kill(pids[0] if pids else hostel.api.vm(name)["pid"])
    vm = hostel.api.wait_vm(name, lambda vm: vm["state"] != "starting", "past starting")
    vm = hostel.api.wait_vm(name, lambda vm: vm["pid"] is None, "ended", limit_s=10)
    assert vm["reason"]["code"] == "worker_killed"
    hostel.api.act(name, "start")
    hostel.delete(name)


def test_a_killed_worker_frees_its_disk(hostel: Hostel) -> None:
    path = hostel.directory / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    name = hostel.run(QUIET, disks=[{"id": "root", "path": str(path)}])
    assert is_locked(path)
    kill(hostel.api.vm(name)["pid"])
    hostel.api.wait_state(name, "crashed", limit_s=10)
    hostel.delete(name)
    assert not is_locked(path)
    assert path.stat().st_size == 1 << 20


def test_two_daemons_never_share_a_state_directory(hostel: Hostel, directory: Path) -> None:
    second = Hosteld(directory)
    second.state_dir = hostel.daemon.state_dir
    with pytest.raises(LabError, match="hosteld ended with status") as failure:
        second.start()
    assert "state" in str(failure.value)
    assert hostel.api.get("/v1/host")["vm_count"] >= 0


def test_two_daemons_never_share_a_runtime_directory(hostel: Hostel, directory: Path) -> None:
    second = Hosteld(directory)
    second.runtime_dir = hostel.daemon.runtime_dir
    # Its socket answers: that of the first. So it is started by hand, and must end by itself.
    with second.log.open("wb") as log:
        status = subprocess.run(second.argv, stdout=log, stderr=log, timeout=60).returncode
    assert status not in {0, -9}
    assert hostel.api.get("/v1/host")["vm_count"] >= 0


def test_a_host_without_kvm_says_so_and_serves_everything_else(directory: Path) -> None:
    config = directory / "config.toml"
    config.write_text(f'kvm_device = "{directory}/no-kvm"\n')
    hostel = Hostel(directory, ["--config", str(config)])
    try:
        hostel.start()
        assert hostel.api.get("/v1/host")["tier"] == "any"
        name = hostel.create(QUIET)
        with pytest.raises(ApiFailure, match="no-kvm") as failure:
            hostel.api.act(name, "start")
        assert failure.value.status in {502, 503}
        hostel.delete(name)
    finally:
        hostel.end()


class UnprivilegedHosteld(Hosteld):
    """One whose root is bound by files' modes, as any other user is."""

    @property
    def argv(self) -> list[str]:
        return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *super().argv]


def test_a_kvm_without_permission_says_what_to_do(directory: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a device node")
    node = directory / "kvm"
    os.mknod(node, 0o600 | stat.S_IFCHR, Path("/dev/kvm").stat().st_rdev)
    try:
        os.close(os.open(node, os.O_RDWR))
    except PermissionError:
        pytest.skip(f"{directory} is on a file system without device nodes")
    os.chown(node, NOBODY, NOBODY)
    config = directory / "config.toml"
    config.write_text(f'kvm_device = "{node}"\n')
    hostel = Hostel(directory)
    hostel.daemon = UnprivilegedHosteld(directory, ["--config", str(config)])
    try:
        hostel.start()
        assert hostel.api.get("/v1/host")["tier"] == "any"
        name = hostel.create(QUIET)
        with pytest.raises(ApiFailure) as failure:
            hostel.api.act(name, "start")
        assert (failure.value.status, failure.value.code) == (502, "kvm_permission")
        detail = failure.value.problem["detail"]
        assert f"{node}: Permission denied for uid 0" in detail
        assert "usermod -a -G kvm" in detail
        hostel.wait_workers()
        # Nothing else was wrong: with the right to open it the same VM runs.
        os.chown(node, 0, 0)
        assert hostel.api.act(name, "start")["state"] == "running"
        hostel.delete(name)
    finally:
        hostel.end()


@pytest.fixture
def small_disk(directory: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    path = directory / "small"
    path.mkdir()
    options = ["-t", "tmpfs", "-o", "size=8m,mode=755", "tmpfs", str(path)]
    mount = subprocess.run(["mount", *options], check=False, capture_output=True, text=True)
    if mount.returncode != 0:
        pytest.skip(f"mounting is not permitted: {mount.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> None:
    """Write to a file until its file system has no room left."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))


def test_a_full_state_directory_is_told_and_harms_no_guest(
    directory: Path, small_disk: Path
) -> None:
    hostel = Hostel(directory)
    hostel.daemon.state_dir = small_disk / "state"
    try:
        hostel.start()
        running = hostel.run(tiny.say("up") + tiny.echo())
        stopped = hostel.create(QUIET)
        filler = small_disk / "filler"
        fill(filler)
        image = {"name": "big", "path": str(filler)}
        with pytest.raises(ApiFailure) as failure:
            hostel.api.post("/v1/images?wait=60", image)
        assert failure.value.status == 507
        hostel.api.type(running, "x")
        assert hostel.api.vm(running)["state"] == "running"
        filler.unlink()
        hostel.api.act(stopped, "start")
        for name in (running, stopped):
            hostel.delete(name)
    finally:
        hostel.end()


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Have a directory on a read-only mount of its file system, for whatever opens it from now on.

    Linux remounts no file system read-only while files on it are open for writing, and hosteld
    always has some: what it has open stays writable.
    """
    subprocess.run(["mount", "--bind", str(path), str(path)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(path)], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("has_state", [False, True], ids=["empty", "used before"])
def test_a_start_on_a_read_only_file_system_says_so(
    directory: Path, small_disk: Path, has_state: bool
) -> None:
    hostel = Hostel(directory)
    hostel.daemon.state_dir = small_disk / "state"
    if has_state:
        hostel.start()
        hostel.end()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(LabError, match="hosteld ended with status 2") as failure:
        hostel.start()
    hostel.end()
    assert "Read-only file system: mount it read-write" in str(failure.value)
    assert str(small_disk / "state") in str(failure.value)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    try:
        hostel.start()
        hostel.delete(hostel.run(QUIET))
    finally:
        hostel.end()


def test_a_state_directory_that_becomes_read_only_is_told_and_harms_no_guest(
    directory: Path, small_disk: Path
) -> None:
    hostel = Hostel(directory)
    hostel.daemon.state_dir = small_disk / "state"
    try:
        hostel.start()
        running = hostel.run(tiny.say("up") + tiny.echo())
        stopped = hostel.create(QUIET)
        kernel = hostel.kernel(tiny.boot_timer() + tiny.SPIN)
        started = {"name": "later", "kernel": kernel, "memory_mib": 16, "start": True}
        with read_only(small_disk):
            refusals = {
                "a start": lambda: hostel.api.act(stopped, "start"),
                "a VM that is to start": lambda: hostel.api.post("/v1/vms?wait=60", started),
                "an import": lambda: hostel.kernel(tiny.SPIN),
            }
            for what, request in refusals.items():
                with pytest.raises(ApiFailure, match="Read-only file system") as failure:
                    request()
                assert failure.value.status == 507, what
                assert "writ" in failure.value.problem["detail"], what  # read-write, writable
            hostel.api.type(running, "x")
            Console(hostel.api, running).wait_for("upx")
            hostel.api.act(running, "pause")
            assert hostel.api.act(running, "resume")["state"] == "running"
            assert hostel.api.vm(stopped)["state"] == "stopped"
        assert hostel.api.act(stopped, "start")["state"] == "running"
        assert hostel.api.vm(running)["state"] == "running"
        left = [vm["name"] for vm in hostel.api.get("/v1/vms")["items"]]
        for name in left:
            hostel.delete(name)
        hostel.wait_workers()
        assert not list((hostel.daemon.state_dir / "vms").iterdir())
    finally:
        hostel.end()


# PCI slots that the hostile guest's disk, interface and entropy device are in.
HOSTILE_SLOTS = (1, 17, 25)
BARS, BAR_BYTES = 0xC000_0000, 0x8000


def write_pci(slot: int, register: int, value: int) -> bytes:
    """Write four bytes to a configuration register."""
    address = 0x8000_0000 | slot << 11 | register
    return tiny.out32(0xCF8, address) + tiny.out32(0xCFC, value)


def write_memory(address: int, length: int, value: int) -> bytes:
    """Mov edi, address; mov [rdi], value."""
    opcode = {1: b"\xc6\x07", 2: b"\x66\xc7\x07", 4: b"\xc7\x07"}[length]
    code = b"\xbf" + address.to_bytes(4, "little") + opcode
    return code + (value & (1 << 8 * length) - 1).to_bytes(length, "little")


def hostile(seed: int) -> bytes:
    """Some thousand bytes that write garbage to every device the machine has, again and again.

    Ports: PCI's address and data, i8042, RTC, GED, COM1. Then the BARs of the virtio devices, which
    are put back where they belong in each round; half of the writes are to the common registers.
    """
    chance = random.Random(seed)
    ports = [0xCF8, 0xCFC, 0xCFE, 0x60, 0x64, 0x70, 0x71, 0x3F9, 0x3FB, 0x3FC, 0x5C0, 0x80]
    body = b""
    for port in chance.choices(ports, k=40):
        value = chance.getrandbits(32)
        if port == 0xCF8:
            slot = chance.choice([0, *HOSTILE_SLOTS, 31])
            value = 0x8000_0000 | slot << 11 | chance.randrange(0, 256, 4)
        if port == 0x64 and value & 0xFF == tiny.I8042_RESET:
            value ^= 1
        body += b"\x66\xba" + port.to_bytes(2, "little") + b"\xb8" + value.to_bytes(4, "little")
        body += chance.choice([b"\xee", b"\x66\xef", b"\xef", b"\xec", b"\xed"])
    for index, slot in enumerate(HOSTILE_SLOTS):
        body += write_pci(slot, 0x04, 0) + write_pci(slot, 0x10, BARS + index * BAR_BYTES)
        body += write_pci(slot, 0x04, 0x6)
    for _ in range(120):
        bar, length = BARS + chance.randrange(3) * BAR_BYTES, chance.choice([1, 2, 4])
        offset = chance.choice([chance.randrange(0x40), chance.randrange(BAR_BYTES)]) & -length
        values = [0, 1, 3, 8, 11, 15, 0xFFFF, chance.getrandbits(32)]
        body += write_memory(bar + offset, length, chance.choice(values))
    return body


# How a guest may end by what it does itself. All else that ends a worker is a defect of ours.
GUEST_ENDS = {
    "stopped": {"guest_poweroff"},
    "crashed": {"triple_fault", "kvm_internal_error"},
}


@pytest.mark.parametrize("seed", range(4))
def test_a_hostile_guest_harms_only_itself(hostel: Hostel, seed: int) -> None:
    path = hostel.directory / f"hostile-{seed}.raw"
    path.write_bytes(bytes(1 << 20))
    # The loop's jump is a near one: the body is longer than a short one reaches.
    body = tiny.boot_timer() + hostile(seed)
    code = body + b"\xe9" + (-(len(body) + 5)).to_bytes(4, "little", signed=True)
    name = hostel.run(
        code,
        rng=True,
        disks=[{"id": "root", "path": str(path)}],
        nics=[{"id": "net0", "tap": hostel.tap(f"evil{seed}")}],
    )
    pid = hostel.api.vm(name)["pid"]
    hostel.api.wait_vm(name, lambda vm: vm["boot_time_us"] is not None, "timed")
    for _ in range(20):
        vm = hostel.api.vm(name)
    if vm["state"] == "running":
        assert vm["reason"] is None
        assert vm["pid"] == pid
    else:
        assert vm["reason"]["code"] in GUEST_ENDS[vm["state"]], vm
    if vm["state"] != "stopped":
        assert is_running(pid)
        assert hostel.api.act(name, "kill")["reason"] is None
    log = next(hostel.daemon.state_dir.glob(f"vms/{vm['id']}/worker.log")).read_text()
    assert "Traceback" not in log
    hostel.delete(name)
