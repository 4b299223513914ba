# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What runs inside guests: a stock Debian kernel, an initramfs and a small root disk."""
