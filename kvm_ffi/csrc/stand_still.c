/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "stand_still.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* A running thread answers within microseconds, one that the host's scheduler keeps waiting later.
 */
#define ANSWER_TIMEOUT_NS (100 * 1000 * 1000)
#define POLL_NS (20 * 1000)
/* vCPUs, engines, and the kernel's own threads in this process. */
#define MAX_THREADS 256
/* include/linux/sched.h: threads of io_uring and vhost. They take no signals, and write only where
 * I/O was asked for: to guest memory and to rings. */
#define PF_IO_WORKER 0x00000010ul
#define PF_USER_WORKER 0x00004000ul

/* Static, so that a handler that comes late finds it. */
static struct {
	uint32_t is_wanted; /* futex */
	uint32_t n_still;
	pid_t told[MAX_THREADS];
	uint32_t n_told;
} stillness;

static void stand_still(int signal)
{
	int saved_errno = errno;

	(void)signal;
	if (__atomic_load_n(&stillness.is_wanted, __ATOMIC_ACQUIRE)) {
		__atomic_fetch_add(&stillness.n_still, 1, __ATOMIC_SEQ_CST);
		while (__atomic_load_n(&stillness.is_wanted, __ATOMIC_SEQ_CST))
			syscall(SYS_futex, &stillness.is_wanted, FUTEX_WAIT_PRIVATE, 1, NULL);
		__atomic_fetch_sub(&stillness.n_still, 1, __ATOMIC_RELEASE);
	}
	errno = saved_errno;
}

int stand_still_install(void)
{
	struct sigaction action = {.sa_handler = stand_still, .sa_flags = SA_RESTART};

	sigfillset(&action.sa_mask);
	return sigaction(SIGRTMIN + 1, &action, NULL) < 0 ? -errno : 0;
}

static bool was_told(pid_t tid)
{
	for (uint32_t i = 0; i < stillness.n_told; i++) {
		if (stillness.told[i] == tid)
			return true;
	}
	return false;
}

/* Whether a thread is the kernel's: by the flags in /proc/PID/task/TID/stat (proc(5)). */
static bool is_kernel_worker(int task_fd, const char *tid)
{
	char path[32], text[512];
	unsigned long flags;
	const char *behind_name;
	ssize_t got;
	int fd;

	(void)snprintf(path, sizeof(path), "%.20s/stat", tid);
	fd = openat(task_fd, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false; /* it has ended, or will be asked and not answer */
	got = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (got <= 0)
		return false;
	text[got] = '\0';
	/* The name may hold anything, a parenthesis too; state, ppid ... flags come behind it. */
	behind_name = strrchr(text, ')');
	if (!behind_name || sscanf(behind_name, ") %*c %*d %*d %*d %*d %*d %lu", &flags) != 1)
		return false;
	return flags & (PF_IO_WORKER | PF_USER_WORKER);
}

/* Signal every thread that has not been told; the number of those, or -errno. */
static int tell_all(int task_fd)
{
	_Alignas(struct dirent64) char buffer[4096];
	pid_t self = (pid_t)syscall(SYS_gettid);
	int n_new = 0;
	ssize_t got;

	if (lseek(task_fd, 0, SEEK_SET) < 0)
		return -errno;
	while ((got = getdents64(task_fd, buffer, sizeof(buffer))) > 0) {
		for (ssize_t at = 0; at < got;) {
			const struct dirent64 *entry = (const struct dirent64 *)(buffer + at);
			pid_t tid = (pid_t)strtol(entry->d_name, NULL, 10);

			at += entry->d_reclen;
			if (tid <= 0 || tid == self || was_told(tid) ||
			    is_kernel_worker(task_fd, entry->d_name))
				continue;
			if (stillness.n_told == MAX_THREADS)
				return -E2BIG;
			if (tgkill(getpid(), tid, SIGRTMIN + 1) < 0)
				continue; /* it has ended */
			stillness.told[stillness.n_told++] = tid;
			n_new++;
		}
	}
	return got < 0 ? -errno : n_new;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int wait_for_all(void)
{
	const struct timespec pause = {.tv_nsec = POLL_NS};
	uint64_t deadline = now_ns() + ANSWER_TIMEOUT_NS;

	while (__atomic_load_n(&stillness.n_still, __ATOMIC_SEQ_CST) < stillness.n_told) {
		if (now_ns() > deadline)
			return -ETIMEDOUT; /* one that ended after it was told, or hangs in the
					      kernel */
		nanosleep(&pause, NULL);
	}
	return 0;
}

int stand_still_begin(int task_fd)
{
	int n_new, err = 0;

	stillness.n_told = 0;
	__atomic_store_n(&stillness.is_wanted, 1, __ATOMIC_SEQ_CST);
	/* A thread may have begun another one just before it stood still: until there is no new
	 * one. */
	while (err == 0 && (n_new = tell_all(task_fd)) != 0)
		err = n_new < 0 ? n_new : wait_for_all();
	if (err < 0)
		stand_still_end();
	return err;
}

void stand_still_end(void)
{
	const struct timespec pause = {.tv_nsec = POLL_NS};

	__atomic_store_n(&stillness.is_wanted, 0, __ATOMIC_SEQ_CST);
	syscall(SYS_futex, &stillness.is_wanted, FUTEX_WAKE_PRIVATE, INT32_MAX);
	/* So that the next time begins with none; each needs only to be scheduled. */
	while (__atomic_load_n(&stillness.n_still, __ATOMIC_ACQUIRE) != 0)
		nanosleep(&pause, NULL);
}
