# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The HTTP API, its models, the client library and the CLI."""
