# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Kernels and disk images: import, checking, unpacking."""
