/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* The kernel's vhost interface, for vhost.cdef. */
#ifndef HOSTEL_VHOST_UAPI_H
#define HOSTEL_VHOST_UAPI_H

#include <linux/vhost.h>

#endif
