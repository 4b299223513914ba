# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The programs: hosteld (supervisor), zygote and worker."""
