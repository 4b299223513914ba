/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#include "timer.h"

#include <errno.h>
#include <sys/timerfd.h>
#include <time.h>

#define NS_PER_S 1000000000ULL

int timer_create_fd(void)
{
	int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);

	return fd < 0 ? -errno : fd;
}

int timer_set(int fd, uint64_t delay_ns)
{
	struct itimerspec spec = {
	    .it_value = {.tv_sec = (time_t)(delay_ns / NS_PER_S),
			 .tv_nsec = (long)(delay_ns % NS_PER_S)},
	};

	return timerfd_settime(fd, 0, &spec, NULL) < 0 ? -errno : 0;
}
