# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The program hosteld: its command line, its exit statuses, two of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.supervisor import dirs, run, sdnotify, zygotes
from daemon.supervisor.config import Config, ConfigError
from daemon.supervisor.main import main
from daemon.zygote import ZygoteHandle

ROOT = Path(__file__).resolve().parents[4]


def argv(directory: Path, *options: str) -> list[str]:
    dirs = ["--state-dir", str(directory / "state"), "--runtime-dir", str(directory / "run")]
    return [sys.executable, "-m", "daemon.supervisor.main", *dirs, *options]


class Daemon:
    """A hosteld as systemd would run it."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notices.bind("\0hostel-test-" + directory.name + str(os.getpid()))
        self.notices.settimeout(60)
        name = "@" + str(self.notices.getsockname()[1:], "ascii")
        self.process = subprocess.Popen(
            argv(directory, *options),
            cwd=ROOT,
            env={**os.environ, "NOTIFY_SOCKET": name, "WATCHDOG_USEC": "60000000"},
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, word: str) -> None:
        while word not in self.notices.recv(4096).decode():
            pass

    def get(self, path: str) -> tuple[int, bytes]:
        """Send one request over the Unix socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(self.directory / "run" / "hostel.sock"))
            head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            sock.sendall(head.encode())
            reply = b"".join(iter(lambda: sock.recv(65536), b""))
        head_bytes, _, body = reply.partition(b"\r\n\r\n")
        return int(head_bytes.split()[1]), body

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.end()

    def end(self) -> int:
        self.process.communicate(timeout=60)
        self.notices.close()
        return self.process.returncode


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path)
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.end()


def test_hosteld_serves_tells_systemd_and_stops_in_good_order(daemon: Daemon) -> None:
    daemon.wait_for("READY=1")
    daemon.wait_for("WATCHDOG=1")
    status, body = daemon.get("/v1/vms")
    assert (status, json.loads(body)["items"]) == (200, [])
    mode = (daemon.directory / "run" / "hostel.sock").stat().st_mode
    assert mode & 0o777 == 0o660
    daemon.process.send_signal(signal.SIGHUP)
    daemon.process.send_signal(signal.SIGTERM)
    daemon.wait_for("STOPPING=1")
    assert daemon.end() == 0
    assert not (daemon.directory / "run" / "hostel.sock").exists()


def test_a_second_daemon_on_the_directories_ends_with_the_pid_of_the_first(daemon: Daemon) -> None:
    daemon.wait_for("READY=1")
    second = subprocess.run(
        argv(daemon.directory), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert second.returncode == 2
    assert f"hosteld with pid {daemon.process.pid} runs on it already" in second.stderr
    assert daemon.get("/v1/vms")[0] == 200
    assert daemon.stop(signal.SIGINT) == 0


def test_a_killed_daemon_does_not_keep_the_next_one_out(daemon: Daemon) -> None:
    daemon.wait_for("READY=1")
    daemon.stop(signal.SIGKILL)
    after = Daemon(daemon.directory)
    after.wait_for("READY=1")
    assert after.stop() == 0


def test_a_state_directory_that_is_a_file_ends_with_status_2(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    done = subprocess.run(
        argv(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "cannot be made" in done.stderr


def test_a_hosteld_whose_zygote_cannot_start_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def spawn_mortal() -> tuple[socket.socket, int]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.close()
        return ours, os.posix_spawn("/bin/true", ["true"], {})

    said: list[str] = []
    monkeypatch.setattr(sdnotify, "notify", said.append)
    monkeypatch.setattr(zygotes, "spawn_zygote", spawn_mortal)
    monkeypatch.setattr(zygotes, "FIRST_BACKOFF_S", 0.001)
    layout = dirs.Layout(tmp_path / "state", tmp_path / "run")
    dirs.prepare(layout)
    config = Config(state_dir=str(layout.state), runtime_dir=str(layout.runtime))
    sock, pid = spawn_mortal()
    assert not run.serve(config, layout, ZygoteHandle(sock, pid), None, ()).is_clean
    assert "no zygote starts" in caplog.text
    assert not any("READY" in words for words in said)


def test_a_broken_database_ends_with_status_1_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "hostel.db").write_bytes(b"broken" * 1000)
    done = subprocess.run(
        argv(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "cannot open the database" in done.stderr


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("log_level = 3", [], "must be a str"),
        ("listen = '127.0.0.1:0'", [], "needs token_file"),
        ("", ["--listen", "0.0.0.0:80", "--token-file", "/t"], "loopback"),
        ("", ["--listen", "127.0.0.1:0", "--token-file", "/nowhere"], "No such file"),
    ],
)
def test_a_wrong_configuration_ends_with_status_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    options: list[str],
    message: str,
) -> None:
    path = tmp_path / "hosteld.toml"
    path.write_text(content)
    assert main(["--config", str(path), *options]) == 2
    assert message in capsys.readouterr().err


def test_json_without_doctor_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--json"])
    assert "--json goes with --doctor" in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("hosteld ")


def test_doctor_speaks_json_and_needs_no_directories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hosteld.toml"
    path.write_text(f"kvm_device = '{tmp_path}/kvm'\nstate_dir = '{tmp_path}/s'\n")
    assert main(["--config", str(path), "--doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["tier"] == "any"
    kvm = report["checks"][0]
    assert (kvm["name"], kvm["status"]) == ("kvm", "missing")
    assert "modprobe" in kvm["detail"] + (kvm["remedy"] or "")
    assert not (tmp_path / "s").exists()


def config(directory: Path, **settings: str) -> Config:
    return Config(state_dir=str(directory), runtime_dir=str(directory), **settings)  # type: ignore[arg-type]


def test_a_socket_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 107"):
        run.bind_unix(config(tmp_path, socket=f"{tmp_path}/{'x' * 100}"))


def test_a_file_in_place_of_the_socket_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "hostel.sock").write_text("mine")
    with pytest.raises(ConfigError, match="is no socket"):
        run.bind_unix(config(tmp_path))
    assert (tmp_path / "hostel.sock").read_text() == "mine"


def test_a_socket_that_someone_listens_on_is_not_taken(tmp_path: Path) -> None:
    with run.bind_unix(config(tmp_path)), pytest.raises(ConfigError, match="listens on it"):
        run.bind_unix(config(tmp_path))


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    run.bind_unix(config(tmp_path)).close()
    run.bind_unix(config(tmp_path)).close()


def test_an_unknown_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such group"):
        run.bind_unix(config(tmp_path, socket_group="no-such-group"))


def test_sockets_of_systemd_are_taken_for_this_process() -> None:
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0"}
    assert sdnotify.listen_fds(environ) == ()


def test_a_tcp_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=address):
            run.bind_tcp(address)
