# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A small client of hosteld's API over its Unix socket, for benchmarks and tests.

The standard library alone: on an emulated CPU the client library's imports take longer than a
guest's boot.
"""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

REQUEST_LIMIT_S: Final = 120.0
POLL_S: Final = 0.02

Json = dict[str, Any]


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket's path."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass(frozen=True)
class Reply:
    """An answer of the API."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Json:
        """The body, which must be a JSON object."""
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value


class ApiFailure(Exception):
    """An answer of 400 or more; ``code`` and ``status`` are the problem's own."""

    def __init__(self, call: str, reply: Reply) -> None:
        self.status = reply.status
        try:
            self.problem = reply.json
        except ValueError:
            self.problem = {}
        self.code = str(self.problem.get("code", ""))
        text = reply.body.decode(errors="replace")[:2000]
        super().__init__(f"{call}: {reply.status} {text}")


class Api:
    """Calls the API of the hosteld behind a Unix socket; a method may be used by many threads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = REQUEST_LIMIT_S,
    ) -> Reply:
        """Make one request and return its answer, whatever its status.

        Args:
            body: bytes as they are, or a value that is sent as JSON.
        """
        sent = dict(headers or {})
        data = body if isinstance(body, bytes) else None
        if body is not None and data is None:
            data = json.dumps(body).encode()
            sent.setdefault("content-type", "application/json")
        connection = UnixConnection(self.path, timeout_s)
        try:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            fields = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, fields, answer.read())
        finally:
            connection.close()

    def call(self, method: str, path: str, body: object = None, **options: Any) -> Json:  # noqa: ANN401
        """Make a request that must succeed, wait for its operation, and return the result.

        Raises:
            ApiFailure: the answer, or the operation's end, is a problem.
        """
        reply = self.request(method, path, body, **options)
        if reply.status >= 400:
            raise ApiFailure(f"{method} {path}", reply)
        if reply.status == 202 and "location" in reply.headers:
            return self._finish(reply.headers["location"])
        return reply.json if reply.body else {}

    def get(self, path: str) -> Json:
        """GET an object."""
        return self.call("GET", path)

    def post(self, path: str, body: object = None) -> Json:
        """POST, and wait for what it started."""
        return self.call("POST", path, body)

    def vm(self, name: str) -> Json:
        """Return a VM."""
        return self.get(f"/v1/vms/{name}")

    def act(self, name: str, action: str, body: object = None) -> Json:
        """Have an action done to a VM, and wait for its end."""
        return self.post(f"/v1/vms/{name}/{action}?wait=60", body)

    def type(self, name: str, text: str | bytes) -> None:
        """Type into a VM's console; the guest may be slow to read."""
        data = text.encode() if isinstance(text, str) else text
        deadline = time.monotonic() + 30
        while data:
            taken = self.post(f"/v1/vms/{name}/console/input", data)["accepted_bytes"]
            data = data[taken:]
            if data and time.monotonic() > deadline:
                raise TimeoutError(f"the guest of {name} does not read its console")

    def delete(self, path: str, *, force: bool = False) -> None:
        """DELETE an object, and wait until it is gone."""
        self.call("DELETE", f"{path}?wait=60" + ("&force=true" if force else ""))

    def wait_vm(
        self, name: str, claim: Callable[[Json], bool], what: str, limit_s: float = 60.0
    ) -> Json:
        """Return a VM as soon as a claim holds for it.

        Raises:
            TimeoutError: it did not come to hold.
        """
        deadline = time.monotonic() + limit_s
        while not claim(vm := self.vm(name)):
            if time.monotonic() > deadline:
                state = {key: vm[key] for key in ("state", "reason", "boot_time_us")}
                raise TimeoutError(f"{name} was not {what} in {limit_s:g} s: {state}")
            time.sleep(POLL_S)
        return vm

    def wait_state(self, name: str, state: str, limit_s: float = 60.0) -> Json:
        """Return a VM as soon as it is in a state."""
        return self.wait_vm(name, lambda vm: bool(vm["state"] == state), state, limit_s)

    def _finish(self, location: str) -> Json:
        deadline = time.monotonic() + REQUEST_LIMIT_S
        while True:
            operation = self.request("GET", f"{location}?wait=30").json
            if operation["state"] == "succeeded":
                return operation["result"] or {}
            if operation["state"] != "running":
                body = json.dumps(operation["error"] or operation).encode()
                status = int((operation["error"] or {}).get("status", 500))
                raise ApiFailure(f"operation {operation['kind']}", Reply(status, {}, body))
            if time.monotonic() > deadline:
                raise TimeoutError(f"operation {operation['kind']} did not end")


@dataclass
class Console:
    """Follows a VM's console log in a thread of its own.

    Threads: `text`, `wait_for` and `close` on any.
    """

    api: Api
    vm: str
    offset: int = 0
    _data: bytearray = field(default_factory=bytearray)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _is_over: bool = False

    def __post_init__(self) -> None:
        self._connection = UnixConnection(self.api.path, timeout_s=3600)
        path = f"/v1/vms/{self.vm}/console/log?offset={self.offset}&follow=true"
        self._connection.request("GET", path)
        # Kept: with `Connection: close` the connection forgets its socket once it has the headers.
        self._socket = self._connection.sock
        self._answer = self._connection.getresponse()
        if self._answer.status != 200:
            raise ApiFailure(path, Reply(self._answer.status, {}, self._answer.read()))
        threading.Thread(target=self._follow, daemon=True).start()

    @property
    def text(self) -> str:
        """All that has come so far, with line ends as Python has them."""
        with self._changed:
            return self._data.decode(errors="replace").replace("\r", "")

    @property
    def is_over(self) -> bool:
        """Whether the stream has ended."""
        return self._is_over

    def wait_for(self, marker: str, *, after: int = 0, limit_s: float = 60.0) -> int:
        """Wait until `marker` stands in `text` from `after` on; return where it ends.

        Raises:
            TimeoutError: it did not come; holds the last lines.
        """
        deadline = time.monotonic() + limit_s
        with self._changed:
            while (at := self._data_text().find(marker, after)) < 0:
                left = deadline - time.monotonic()
                if left <= 0 or (self._is_over and not self._changed.wait(0)):
                    tail = " | ".join(self._data_text().splitlines()[-8:])
                    why = "the console ended" if self._is_over else f"not in {limit_s:g} s"
                    raise TimeoutError(f"{self.vm}: no {marker!r}, {why}; it said: {tail}")
                self._changed.wait(left)
            return at + len(marker)

    def close(self) -> None:
        """Stop following."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended by itself

    def _data_text(self) -> str:
        return self._data.decode(errors="replace").replace("\r", "")

    def _follow(self) -> None:
        try:
            while data := self._answer.read1(65536):
                with self._changed:
                    self._data += data
                    self._changed.notify_all()
        except (OSError, ValueError, http.client.HTTPException):
            pass  # closed, by us or by hosteld's end: told by is_over
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()
            self._connection.close()
