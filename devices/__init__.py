# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Device models; they run only inside a VM worker."""
