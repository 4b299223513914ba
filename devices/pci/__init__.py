# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""PCI host bridge, functions and MSI-X."""
