/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * Stops every other thread of the process, wherever it is, for a moment.
 *
 * Each gets a signal whose handler waits. A thread in the handler writes to no memory, and no
 * system call of it is under way in the kernel; where one was it is begun again, or ends with
 * EINTR.
 */
#ifndef HOSTEL_STAND_STILL_H
#define HOSTEL_STAND_STILL_H

/* Have SIGRTMIN + 1 mean this; once, before stand_still_begin(). 0 or -errno. */
int stand_still_install(void);

/* task_fd: the process's own /proc/self/task. 0 when all stand still, until stand_still_end().
 * Until then allocate nothing and take no lock: one that stands still may hold it. -ETIMEDOUT when
 * some thread does not answer; all run on then. Not from two threads at once. */
int stand_still_begin(int task_fd);
void stand_still_end(void);

#endif
