/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* A tap as its reader sees it; Linux Documentation/networking/tuntap.rst. */
#ifndef HOSTEL_NET_TAP_H
#define HOSTEL_NET_TAP_H

#include <stdbool.h>
#include <stdint.h>

/* Set a tap's header size and offloads to what the driver negotiated: 0, -EINVAL for a
 * tap without IFF_VNET_HDR, or the errno of the ioctl. */
int net_tap_configure(int tap_fd, uint64_t features);
/* Let the host steer packets to one queue of a multi-queue tap, or no longer: 0, or -errno. */
int net_tap_set_queue(int tap_fd, bool is_attached);
/* Plug or unplug the cable, as the host sees it: 0, or -errno. */
int net_tap_set_carrier(int tap_fd, bool is_up);

#endif
