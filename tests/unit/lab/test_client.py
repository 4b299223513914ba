# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The agent and the client, joined by a socket pair or loopback instead of an emulated host."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import client
from lab.agent import Agent, refusal
from lab.client import HEADER, STATUS, Command, Endpoint, Execution, frames

TOKEN = "t" * 32
beat = Execution._beat


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        agent = Agent({"token": TOKEN, "idle_s": 0}, listener)
        server = threading.Thread(target=agent.serve)
        server.start()
        yield Endpoint(listener.getsockname()[1], TOKEN)
        agent.stopping.set()
        server.join()


def run(endpoint: Endpoint, *argv: str, cwd: str = "/", timeout_s: float | None = 20) -> int:
    env = {"PATH": os.environ["PATH"]}
    return Execution(endpoint, Command(argv, cwd, env, timeout_s=timeout_s)).run()


def test_frames_are_taken_whole_and_the_rest_is_left() -> None:
    whole = HEADER.pack(b"o", 3) + b"abc"
    buffer = bytearray(whole + whole[:6])

    assert list(frames(buffer)) == [(b"o", b"abc")]
    assert bytes(buffer) == whole[:6]


def test_frame_of_a_missing_program_says_so_like_a_shell() -> None:
    frame = refusal(FileNotFoundError(2, "No such file", "prog"), "prog", "/")

    assert STATUS.unpack_from(frame, HEADER.size) == (127,)
    assert frame.endswith(b"prog: No such file")


def test_frame_of_a_missing_directory_is_a_failure_of_the_lab() -> None:
    frame = refusal(FileNotFoundError(2, "No such file", "/dir"), "prog", "/dir")

    assert STATUS.unpack_from(frame, HEADER.size) == (125,)


@pytest.mark.slow
def test_outputs_are_kept_apart_and_the_status_is_passed_on(
    endpoint: Endpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(endpoint, "sh", "-c", "echo out; echo err >&2; exit 7") == 7
    assert capfd.readouterr() == ("out\n", "err\n")


@pytest.mark.slow
def test_a_command_that_a_signal_ends_gives_128_and_its_number(endpoint: Endpoint) -> None:
    assert run(endpoint, "sh", "-c", "kill -9 $$") == 137


@pytest.mark.slow
def test_a_missing_program_gives_127(endpoint: Endpoint, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(endpoint, "no-such-program") == 127
    assert "no-such-program" in capfd.readouterr().err


@pytest.mark.slow
def test_a_silent_command_s_host_is_kept_awake(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = []
    monkeypatch.setattr(client, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(Execution, "_beat", lambda self, to: beats.append(beat(self, to)))
    # The agent takes them for what they are: the command ends by itself.
    assert run(endpoint, "sh", "-c", "sleep 0.3; exit 3") == 3
    assert beats


@pytest.mark.slow
def test_a_command_that_runs_too_long_gives_124(
    endpoint: Endpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(endpoint, "sleep", "100", timeout_s=0.2) == 124
    assert "ran past 0.2 s" in capfd.readouterr().err


@pytest.mark.slow
def test_what_a_command_leaves_in_the_background_is_not_waited_for(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    assert run(endpoint, "sh", "-c", f"sleep 100 & echo $! > {pid_file}") == 0
    os.kill(int(pid_file.read_text()), 9)


@pytest.mark.slow
def test_a_vanished_caller_ends_its_command(endpoint: Endpoint, tmp_path: Path) -> None:
    started = tmp_path / "started"
    os.mkfifo(started)
    ended = tmp_path / "ended"
    os.mkfifo(ended)
    script = f"trap 'echo yes > {ended}; exit' TERM; echo yes > {started}; sleep 100 & wait"
    connection = endpoint.request(
        "exec", id="x", argv=["sh", "-c", script], cwd="/", env={"PATH": "/bin"}, stdin=False
    )
    assert started.read_text() == "yes\n"

    connection.close()

    assert ended.read_text() == "yes\n"


@pytest.mark.slow
def test_a_wrong_token_gets_no_answer(endpoint: Endpoint) -> None:
    assert endpoint.call("ping")
    assert not Endpoint(endpoint.port, "wrong").call("ping")


@pytest.mark.slow
def test_an_agent_that_nobody_uses_stops() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        agent = Agent({"token": TOKEN, "idle_s": 0.1}, listener)
        server = threading.Thread(target=agent.serve)
        server.start()
        server.join(10)
        assert not server.is_alive()
