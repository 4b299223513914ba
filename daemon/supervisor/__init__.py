# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""hosteld: the long-running daemon."""
