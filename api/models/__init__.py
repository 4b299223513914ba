# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The one definition of every shape on the wire (pydantic only)."""
