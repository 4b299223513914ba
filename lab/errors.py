# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What can go wrong in the lab itself, as opposed to in the command that it runs."""

from typing import Final

LAB_FAILED: Final = 125  # the status of env(1) and docker run for "could not even start it"
TIMED_OUT: Final = 124  # the status of timeout(1)


class LabError(Exception):
    """The lab could not do its part; the message is for the person at the terminal."""
