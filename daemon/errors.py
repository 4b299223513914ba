# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Errors between the processes of one Hostel.

ProtocolError       a peer sent what the protocol does not know, or went away in the middle
WorkerError         a worker refused or failed a request: .code
 +- WorkerGone      there is no worker behind the socket any more
 +- WorkerTimeout   it did not answer in time
"""

from __future__ import annotations


class ProtocolError(Exception):
    """A message that breaks the control protocol."""


class WorkerError(Exception):
    """A worker, or the zygote, could not do what was asked; ``code`` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class WorkerGone(WorkerError):
    """The process at the other end has ended."""

    def __init__(self, message: str) -> None:
        super().__init__("worker_gone", message)


class WorkerTimeout(WorkerError):
    """No answer within the deadline."""

    def __init__(self, op: str, seconds: float) -> None:
        super().__init__("worker_timeout", f"no answer to {op} within {seconds:g} s")
