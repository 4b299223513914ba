/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* Timers that expire as readable descriptors: timerfd_create(2), CLOCK_MONOTONIC. */
#ifndef HOSTEL_TIMER_H
#define HOSTEL_TIMER_H

#include <stdint.h>

/* Return a timer that does not run, or -errno. */
int timer_create_fd(void);
/* Have a timer expire once after a delay, or with 0 not at all: 0, or -errno. */
int timer_set(int fd, uint64_t delay_ns);

#endif
