# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The hostel command."""
