# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""vhost-user: devices whose queues another process serves.

The back end (qemu-storage-daemon, virtiofsd, a switch ...) gets guest RAM and, for each queue, the
guest's kick and interrupt as eventfds. So nothing of ours is on the way of a request.

    wire.py     messages, deadlines, and what a back end may answer
    link.py     one back end: connected, lost, connected again
    device.py   a virtio device on a link, and the kinds that there are

Source: QEMU docs/interop/vhost-user.rst.
"""
