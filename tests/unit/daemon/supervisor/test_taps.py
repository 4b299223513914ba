# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Taps, as far as they can be told without making one: what went wrong, and what to do."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from api.errors import ApiError, HostFailure, Invalid
from daemon.supervisor import taps
from daemon.supervisor.records import Backend, NicRecord

NIC = NicRecord("net0", "hosteltest0", "02:00:00:00:00:01", None, None)


@pytest.mark.parametrize(
    ("number", "status", "code", "advice"),
    [
        (errno.EBUSY, 409, "tap_in_use", "another VM or program"),
        (errno.EPERM, 502, "tap_permission", "ip tuntap add hosteltest0 mode tap vnet_hdr user"),
        (errno.EINVAL, 422, "tap_taken", "choose another name"),
        (errno.ENOMEM, 502, "tap_failed", os.strerror(errno.ENOMEM)),
    ],
)
def test_what_the_kernel_refuses_is_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, number: int, status: int, code: str, advice: str
) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(taps, "_TUN_DEVICE", os.devnull)
    monkeypatch.setattr("daemon.supervisor.taps.fcntl.ioctl", refuse)
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208  names, and nothing held open
    with pytest.raises(ApiError, match=advice) as caught:
        taps.open_taps(NIC, 3, 1)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert caught.value.field == "nics.3.tap"
    assert set(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def test_a_host_without_tun_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "_TUN_DEVICE", "/nowhere/tun")
    with pytest.raises(ApiError, match="modprobe tun"):
        taps.open_taps(NIC, 0, 1)


def test_an_interface_that_is_no_tap_is_refused() -> None:
    with pytest.raises(Invalid, match="no tap"):
        taps.check_name("lo", "nics.0.tap")
    taps.check_name("hosteltest0", "nics.0.tap")


@pytest.mark.parametrize("name", ["lo", "nobridge0"])
def test_what_is_no_bridge_is_refused(name: str) -> None:
    with pytest.raises(Invalid, match="ip link add"):
        taps.check_bridge(name, "nics.0.bridge")


@pytest.mark.parametrize(("backend", "opened"), [("auto", 2), ("vhost", 2), ("tap", 0)])
def test_vhost_is_opened_for_every_pair_where_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, opened: int
) -> None:
    monkeypatch.setattr(taps, "_VHOST_DEVICE", os.devnull)
    fds = taps.open_vhost(replace(NIC, backend=backend), 0, 2)
    assert len(fds) == opened
    for fd in fds:
        os.close(fd)


def test_vhost_is_not_opened_for_what_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "_VHOST_DEVICE", os.devnull)
    assert taps.open_vhost(replace(NIC, tx_limit={"ops_per_s": 5}), 0, 2) == []


def test_a_host_without_vhost_is_told_only_who_insists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "_VHOST_DEVICE", "/nowhere/vhost-net")
    assert taps.open_vhost(NIC, 0, 1) == []
    with pytest.raises(HostFailure, match="modprobe vhost_net") as caught:
        taps.open_vhost(replace(NIC, backend="vhost"), 2, 1)
    assert (caught.value.code, caught.value.field) == ("vhost_unavailable", "nics.2.backend")


def test_a_guest_receives_what_its_tap_sends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory = tmp_path / NIC.tap / "statistics"
    directory.mkdir(parents=True)
    for number, side in enumerate(("rx", "tx")):
        for what in ("packets", "bytes", "dropped"):
            (directory / f"{side}_{what}").write_text(f"{number + 1}{len(what)}\n")
    monkeypatch.setattr(taps, "_SYS_NET", tmp_path)
    found = taps.counters(NIC.tap)
    assert (found["rx_packets"], found["tx_packets"], found["tx_bytes"]) == (27, 17, 15)
    assert taps.counters("gone") == {}
