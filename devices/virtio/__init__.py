# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""virtio 1.2 devices over PCI."""
