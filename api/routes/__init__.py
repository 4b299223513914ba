# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""One module per REST resource."""
