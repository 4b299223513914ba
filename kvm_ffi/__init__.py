# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""KVM file descriptors, guest memory and the C core."""
