# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""One VM: its machine, its vCPU threads and its control socket."""
