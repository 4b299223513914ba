# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A guest's network, between its driver and a tap of the host."""

from __future__ import annotations

import hashlib
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.guests import Guest
from tests.support.hostel import Hostel
from tests.support.linux import LinuxGuest

TAP = "hg-net"
MAC = "02:00:00:00:77:03"
MTU = 1400
HOST = "10.77.3.1"
ADDRESS = "10.77.3.2"
PAYLOAD = bytes(i * 7 & 0xFF for i in range(4 << 20))
LIMIT_S = 120.0


@pytest.fixture(scope="module", params=["vhost", "tap"])
def net(hostel: Hostel, guest: Guest, request: pytest.FixtureRequest) -> Iterator[LinuxGuest]:
    hostel.api.post(
        "/v1/vms?wait=60",
        {
            "name": "net",
            "kernel": "debian",
            "initrd": "initrd",
            # No root disk: a shell in the initramfs is there sooner.
            "cmdline": "console=ttyS0 quiet reboot=k panic=-1",
            "vcpus": 2,
            "nics": [{"id": "net0", "tap": TAP, "mac": MAC, "mtu": MTU, "backend": request.param}],
        },
    )
    net = LinuxGuest(hostel, guest, "net")
    with net.running("a shell in the initramfs"):
        for words in (f"addr add {HOST}/24 dev {TAP}", f"link set {TAP} up"):
            subprocess.run(["ip", *words.split()], check=True)
        net.ask(f"ip addr add {ADDRESS}/24 dev eth0; ip link set eth0 up")
        yield net


def test_the_guest_has_its_address_and_mtu(net: LinuxGuest) -> None:
    assert net.ask("cat /sys/class/net/eth0/address") == MAC
    assert net.ask("cat /sys/class/net/eth0/mtu") == str(MTU)
    assert net.ask("cat /sys/class/net/eth0/carrier") == "1"


def test_packets_are_moved_by_whom_was_asked(net: LinuxGuest) -> None:
    # vhost's thread is called after the thread that became its owner: a vCPU's.
    owners = {f"vhost-{path.name}" for path in Path(f"/proc/{net.vm['pid']}/task").iterdir()}
    names = {path.read_text().strip() for path in Path("/proc").glob("[0-9]*/task/*/comm")}
    assert bool(owners & names) == (net.vm["nics"][0]["backend"] == "vhost")


def test_both_pairs_of_queues_are_in_use(net: LinuxGuest) -> None:
    assert net.ask("ls -d /sys/class/net/eth0/queues/tx-* | wc -l") == "2"
    assert len(list(Path("/sys/class/net", TAP, "queues").glob("tx-*"))) == 2


def test_the_guest_changes_its_address_on_the_wire(net: LinuxGuest) -> None:
    change = "ip link set eth0 down; ip link set eth0 address {}; ip link set eth0 up"
    for address in ("02:00:00:00:77:99", MAC):
        net.ask(change.format(address))
        # The host may stick to the old address for a second.
        net.ask(f"ping -c 4 -W 10 {HOST}")
        neighbours = subprocess.run(["ip", "neigh"], capture_output=True, text=True, check=True)
        assert address in neighbours.stdout


def test_a_pulled_cable_is_seen_on_both_ends(net: LinuxGuest) -> None:
    path = "/v1/vms/net/nics/net0"
    carrier = "for i in $(seq 50); do read c < /sys/class/net/eth0/carrier; "
    carrier += "[ $c = {} ] && break; usleep 100000; done; echo $c"
    net.hostel.api.call("PATCH", path, {"link": "down"})
    try:
        assert net.ask(carrier.format(0)) == "0"
        assert Path("/sys/class/net", TAP, "carrier").read_text().strip() == "0"
        assert " 0% packet loss" not in net.sh(f"ping -c 1 -W 1 {HOST}").text
    finally:
        net.hostel.api.call("PATCH", path, {"link": "up"})
    assert net.ask(carrier.format(1)) == "1"
    assert " 0% packet loss" in net.ask(f"ping -c 2 -W 10 {HOST}")


def test_a_pause_loses_no_connection(net: LinuxGuest) -> None:
    net.hostel.api.act("net", "pause")
    net.hostel.api.act("net", "resume")
    assert " 0% packet loss" in net.ask(f"ping -c 2 -W 10 {HOST}")


def test_the_guest_reaches_the_host(net: LinuxGuest) -> None:
    assert " 0% packet loss" in net.ask(f"ping -c 3 -W 10 {HOST}")


def test_the_host_reaches_the_guest(net: LinuxGuest) -> None:
    argv = ["busybox", "ping", "-c", "3", "-W", "10", "-s", "1300", ADDRESS]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert " 0% packet loss" in done.stdout


def test_a_stream_to_the_guest_arrives_whole(net: LinuxGuest) -> None:
    net.ask("nc -l -p 5001 < /dev/null > /in & sleep 1")
    with socket.create_connection((ADDRESS, 5001), timeout=LIMIT_S) as connection:
        connection.sendall(PAYLOAD)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    digest = net.ask("wait; sha256sum < /in").split()[0]
    assert digest == hashlib.sha256(PAYLOAD).hexdigest()


def test_a_stream_from_the_guest_arrives_whole(net: LinuxGuest) -> None:
    received = bytearray()
    with socket.create_server((HOST, 5002)) as listener:
        listener.settimeout(LIMIT_S)
        thread = threading.Thread(target=_receive, args=(listener, received))
        thread.start()
        digest = net.ask(f"nc {HOST} 5002 < /in; sha256sum < /in").split()[0]
        thread.join(LIMIT_S)
    assert hashlib.sha256(received).hexdigest() == digest


def _receive(listener: socket.socket, into: bytearray) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(LIMIT_S)
        while data := connection.recv(65536):
            into += data


def test_no_checksum_was_wrong(net: LinuxGuest) -> None:
    assert _checksum_errors(net.ask("cat /proc/net/snmp"), "Tcp") == 0
    assert _checksum_errors(Path("/proc/net/snmp").read_text(), "Tcp") == 0


def test_a_wrong_checksum_is_seen_by_the_guest(net: LinuxGuest) -> None:
    """The host must not vouch for packets that it did not check."""
    before = _checksum_errors(net.ask("cat /proc/net/snmp"), "Udp")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind((TAP, 0))
        wire.send(_datagram(is_sound=True))
        wire.send(_datagram(is_sound=False))
    # A ping behind them: when it is answered, they have been taken.
    net.ask(f"ping -c 1 -W 10 {HOST}")
    after = _checksum_errors(net.ask("cat /proc/net/snmp"), "Udp")
    assert after == before + 1


def test_the_counters_tell_of_the_packets(net: LinuxGuest) -> None:
    stats = net.hostel.api.get("/v1/vms/net/stats")
    assert stats["nics"]["net0"]["rx_bytes"] > len(PAYLOAD)
    assert stats["nics"]["net0"]["tx_bytes"] > len(PAYLOAD)
    details = stats["nic_details"]["net0"]
    assert details["backend"] == net.vm["nics"][0]["backend"]
    assert details["active_pairs"] == 2
    assert details["queues"]["control"]["requests"] > 0
    assert details["queues"]["control"]["errors"] == 0


def _datagram(*, is_sound: bool) -> bytes:
    payload = b"hostel" * 4
    addresses = socket.inet_aton(HOST) + socket.inet_aton(ADDRESS)
    length = 8 + len(payload)
    udp = struct.pack("!HHHH", 4000, 4001, length, 0)
    checksum = _checksum(addresses + struct.pack("!BBH", 0, 17, length) + udp + payload)
    udp = struct.pack("!HHHH", 4000, 4001, length, checksum if is_sound else checksum ^ 0x5555)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 1, 0, 64, 17, 0) + addresses
    head = head[:10] + struct.pack("!H", _checksum(head)) + head[12:]
    ethernet = bytes.fromhex(MAC.replace(":", "")) + b"\x02\0\0\0\0\x01" + b"\x08\x00"
    return ethernet + head + udp + payload


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _checksum_errors(snmp: str, protocol: str) -> int:
    names, values = (line.split() for line in snmp.splitlines() if line.startswith(f"{protocol}:"))
    return int(dict(zip(names, values, strict=True))["InCsumErrors"])
