# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Real taps: made, brought up, put on a bridge, gone with the last descriptor."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from api.errors import Conflict, Invalid
from daemon.supervisor import taps
from daemon.supervisor.records import NicRecord
from kvm_ffi.net_tap import Tap

TAP = f"htest{os.getpid() % 10_000}"
BRIDGE = f"hbr{os.getpid() % 10_000}"
SYS = Path("/sys/class/net")

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="making taps needs root"),
    pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="no /dev/net/tun"),
]


def nic(*, tap: str = TAP, mtu: int | None = None, bridge: str | None = None) -> NicRecord:
    return NicRecord("net0", tap, "02:00:00:00:00:01", mtu, bridge)


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], check=False, capture_output=True).returncode == 0


@pytest.fixture
def bridge() -> Iterator[str]:
    if shutil.which("ip") is None or not ip("link", "add", BRIDGE, "type", "bridge"):
        pytest.skip("this host cannot make bridges")
    yield BRIDGE
    ip("link", "del", BRIDGE)


def test_a_tap_is_up_with_its_mtu_and_gone_with_its_descriptor() -> None:
    (fd,) = taps.open_taps(nic(mtu=1400), 0, 1)
    assert (SYS / TAP / "mtu").read_text().strip() == "1400"
    assert int((SYS / TAP / "flags").read_text(), 16) & 1
    os.close(fd)
    assert not (SYS / TAP).exists()


def test_a_tap_in_use_is_refused() -> None:
    (fd,) = taps.open_taps(nic(), 0, 1)
    with pytest.raises(Conflict, match="in use"):
        taps.open_taps(nic(), 1, 1)
    os.close(fd)


def test_an_interface_that_is_no_tap_is_refused() -> None:
    with pytest.raises(Invalid, match="choose another name"):
        taps.open_taps(nic(tap="lo"), 0, 1)


def test_an_mtu_that_the_kernel_refuses_leaves_no_tap() -> None:
    with pytest.raises(Invalid, match="refuses mtu 67"):
        taps.open_taps(nic(mtu=67), 0, 1)
    assert not (SYS / TAP).exists()


def test_a_missing_bridge_leaves_no_tap() -> None:
    with pytest.raises(Invalid, match="cannot join nobridge0"):
        taps.open_taps(nic(bridge="nobridge0"), 0, 1)
    assert not (SYS / TAP).exists()


def test_a_tap_joins_its_bridge(bridge: str) -> None:
    taps.check_bridge(bridge, "f")
    (fd,) = taps.open_taps(nic(bridge=bridge), 0, 1)
    assert (SYS / bridge / "brif" / TAP).exists()
    os.close(fd)


def test_a_persistent_tap_is_used_and_stays(bridge: str) -> None:
    if not ip("tuntap", "add", TAP, "mode", "tap", "vnet_hdr"):
        pytest.skip("this host's ip cannot make taps")
    try:
        taps.check_name(TAP, "f")
        for _ in range(2):
            os.close(taps.open_taps(nic(bridge=bridge), 0, 1)[0])
        assert (SYS / bridge / "brif" / TAP).exists()
    finally:
        ip("link", "del", TAP)


def tx_queues() -> int:
    return len(list((SYS / TAP / "queues").glob("tx-*")))


def test_a_tap_has_a_queue_for_each_pair() -> None:
    fds = taps.open_taps(nic(), 0, 3)
    assert len(fds) == tx_queues() == 3
    tap = Tap(fds)
    tap.detach(2)
    tap.detach(2)
    assert tx_queues() == 2
    tap.attach(2)
    assert tx_queues() == 3
    tap.set_carrier(False)
    assert (SYS / TAP / "carrier").read_text().strip() == "0"
    tap.close()
    assert not (SYS / TAP).exists()


def test_a_tap_of_several_queues_that_another_reads_is_refused() -> None:
    fds = taps.open_taps(nic(), 0, 2)
    with pytest.raises(Conflict, match="in use"):
        taps.open_taps(nic(), 1, 2)
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize(("options", "opened"), [((), 1), (("multi_queue",), 2)])
def test_a_tap_that_is_there_keeps_its_kind(options: tuple[str, ...], opened: int) -> None:
    if not ip("tuntap", "add", TAP, "mode", "tap", "vnet_hdr", *options):
        pytest.skip("this host's ip cannot make taps")
    try:
        fds = taps.open_taps(nic(), 0, 2)
        assert len(fds) == opened
        for fd in fds:
            os.close(fd)
        # One pair on a tap of several queues too.
        (fd,) = taps.open_taps(nic(), 0, 1)
        os.close(fd)
    finally:
        ip("link", "del", TAP)


def test_queues_that_a_tap_does_not_have_are_refused() -> None:
    if not ip("tuntap", "add", TAP, "mode", "tap", "vnet_hdr"):
        pytest.skip("this host's ip cannot make taps")
    try:
        with pytest.raises(Invalid, match="multi_queue") as caught:
            taps.open_taps(replace(nic(), queues=2), 1, 2)
        assert caught.value.field == "nics.1.queues"
    finally:
        ip("link", "del", TAP)
