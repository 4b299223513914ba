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
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* A thread answers within microseconds; one that waits for a processor or a disk later, and the
 * guest is not to wait for it. */
#define ANSWER_TIMEOUT_NS (10 * 1000 * 1000)
#define MAX_SCANS 100
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

/* futex(2), with not even a return address pushed: what a thread that counts as still writes to its
 * stack can be lost. */
static inline void wait_while_wanted(void)
{
	register const void *timeout __asm__("r10") = NULL;
	long ret = SYS_futex;

	__asm__ volatile("syscall"
			 : "+a"(ret)
			 : "D"(&stillness.is_wanted), "S"(FUTEX_WAIT_PRIVATE), "d"(1), "r"(timeout)
			 : "rcx", "r11", "memory");
}

static void stand_still(int signal)
{
	(void)signal;
	if (!__atomic_load_n(&stillness.is_wanted, __ATOMIC_ACQUIRE))
		return;
	__atomic_fetch_add(&stillness.n_still, 1, __ATOMIC_SEQ_CST);
	while (__atomic_load_n(&stillness.is_wanted, __ATOMIC_SEQ_CST))
		wait_while_wanted();
	__atomic_fetch_sub(&stillness.n_still, 1, __ATOMIC_RELEASE);
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

/* Signal one thread unless it has been told; 1 told now, 0 not, or -errno. */
static int tell(int task_fd, const char *name)
{
	pid_t tid = (pid_t)strtol(name, NULL, 10);

	if (tid == (pid_t)syscall(SYS_gettid) || was_told(tid) || is_kernel_worker(task_fd, name))
		return 0;
	if (stillness.n_told == MAX_THREADS)
		return -E2BIG;
	if (tgkill(getpid(), tid, SIGRTMIN + 1) < 0)
		return errno == ESRCH ? 0 : -errno; /* ESRCH: it has ended */
	stillness.told[stillness.n_told++] = tid;
	return 1;
}

/* Signal every thread that the directory shows; the number of those told now, or -errno. */
static int scan(int task_fd, nlink_t *n_seen)
{
	_Alignas(struct dirent64) char buffer[4096];
	int n_new = 0;
	ssize_t got;

	*n_seen = 0;
	if (lseek(task_fd, 0, SEEK_SET) < 0)
		return -errno;
	while ((got = getdents64(task_fd, buffer, sizeof(buffer))) > 0) {
		for (ssize_t at = 0; at < got;) {
			const struct dirent64 *entry = (const struct dirent64 *)(buffer + at);
			int told;

			at += entry->d_reclen;
			if (entry->d_name[0] == '.')
				continue;
			told = tell(task_fd, entry->d_name);
			if (told < 0)
				return told;
			n_new += told;
			++*n_seen;
		}
	}
	return got < 0 ? -errno : n_new;
}

/* As scan(), for all of them: when a thread ends meanwhile the directory may skip another one. */
static int tell_all(int task_fd)
{
	struct stat before, after;
	nlink_t n_seen;
	int n_new = 0;

	for (int i = 0; i < MAX_SCANS; i++) {
		int n;

		if (fstat(task_fd, &before) < 0)
			return -errno;
		n = scan(task_fd, &n_seen);
		if (n < 0)
			return n;
		n_new += n;
		if (fstat(task_fd, &after) < 0)
			return -errno;
		/* One link a thread, beside "." and "..". */
		if (before.st_nlink == n_seen + 2 && after.st_nlink == n_seen + 2)
			return n_new;
	}
	return -EAGAIN;
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
