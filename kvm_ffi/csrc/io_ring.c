/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "io_ring.h"

#include <errno.h>
#include <linux/time_types.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NS_PER_SEC 1000000000u
/* Linux 5.11 has waits with a timeout, 5.13 polls that fire more than once; the latter came
 * with resource tags. */
#define NEEDED_FEATURES                                                                            \
	(IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG | IORING_FEAT_RSRC_TAGS)
/* Threads of the kernel that do what would block: enough to keep a disk busy. */
#define MAX_KERNEL_THREADS 8u

/* From the newest kernel's to the oldest's: completions are worked off when the thread asks for
 * them (Linux 6.1), or at least without an interrupt of its CPU (5.19). */
static const uint32_t setup_flags[] = {
    IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
    IORING_SETUP_COOP_TASKRUN,
    0,
};

static int setup(uint32_t sq_entries, uint32_t cq_entries, struct io_uring_params *params)
{
	int fd = -1;

	for (size_t i = 0; fd < 0 && i < sizeof(setup_flags) / sizeof(setup_flags[0]); i++) {
		memset(params, 0, sizeof(*params));
		params->flags = IORING_SETUP_CQSIZE | setup_flags[i];
		params->cq_entries = cq_entries;
		fd = (int)syscall(__NR_io_uring_setup, sq_entries, params);
		if (fd < 0 && errno != EINVAL)
			break;
	}
	if (fd < 0)
		return -errno;
	if ((params->features & NEEDED_FEATURES) != NEEDED_FEATURES) {
		close(fd);
		return -EOPNOTSUPP;
	}
	return fd;
}

static int map_rings(struct io_ring *ring, const struct io_uring_params *params)
{
	size_t sq_bytes = params->sq_off.array + params->sq_entries * sizeof(uint32_t);
	size_t cq_bytes = params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe);
	uint32_t *array;
	void *at;

	ring->rings_bytes = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
	at = mmap(NULL, ring->rings_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
		  ring->fd, IORING_OFF_SQ_RING);
	if (at == MAP_FAILED)
		return -errno;
	ring->rings = at;
	at = mmap(NULL, params->sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE,
		  MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQES);
	if (at == MAP_FAILED) {
		int err = errno;

		munmap(ring->rings, ring->rings_bytes);
		return -err;
	}
	ring->sqes = at;
	ring->sq_entries = params->sq_entries;
	ring->sq_khead = (void *)(ring->rings + params->sq_off.head);
	ring->sq_ktail = (void *)(ring->rings + params->sq_off.tail);
	ring->cq_mask = params->cq_entries - 1;
	ring->cq_khead = (void *)(ring->rings + params->cq_off.head);
	ring->cq_ktail = (void *)(ring->rings + params->cq_off.tail);
	ring->cqes = (void *)(ring->rings + params->cq_off.cqes);
	array = (void *)(ring->rings + params->sq_off.array);
	for (uint32_t i = 0; i < params->sq_entries; i++)
		array[i] = i;
	return 0;
}

int io_ring_init(struct io_ring *ring, uint32_t sq_entries, uint32_t cq_entries)
{
	struct io_uring_params params;
	uint32_t threads[2] = {MAX_KERNEL_THREADS, MAX_KERNEL_THREADS};
	int err;

	memset(ring, 0, sizeof(*ring));
	ring->fd = setup(sq_entries, cq_entries, &params);
	if (ring->fd < 0)
		return ring->fd;
	err = map_rings(ring, &params);
	if (err < 0) {
		close(ring->fd);
		return err;
	}
	/* A bound, not a need: kernels before 5.15 do without. */
	syscall(__NR_io_uring_register, ring->fd, IORING_REGISTER_IOWQ_MAX_WORKERS, threads, 2);
	return 0;
}

void io_ring_deinit(struct io_ring *ring)
{
	munmap(ring->sqes, ring->sq_entries * sizeof(struct io_uring_sqe));
	munmap(ring->rings, ring->rings_bytes);
	close(ring->fd);
}

int io_ring_register_file(struct io_ring *ring, int file_fd)
{
	if (syscall(__NR_io_uring_register, ring->fd, IORING_REGISTER_FILES, &file_fd, 1) < 0)
		return -errno;
	return 0;
}

int io_ring_update_file(struct io_ring *ring, int file_fd)
{
	struct io_uring_files_update update = {.fds = (uint64_t)(uintptr_t)&file_fd};

	if (syscall(__NR_io_uring_register, ring->fd, IORING_REGISTER_FILES_UPDATE, &update, 1) < 0)
		return -errno;
	return 0;
}

static int enter(struct io_ring *ring, uint32_t wait_for, uint32_t flags, const void *arg,
		 size_t arg_bytes)
{
	/* Acquire pairs with the kernel's release after it has read the entries. */
	uint32_t to_submit = ring->sq_tail - __atomic_load_n(ring->sq_khead, __ATOMIC_ACQUIRE);

	/* Release pairs with the kernel's acquire: who sees the tail sees the entries. */
	__atomic_store_n(ring->sq_ktail, ring->sq_tail, __ATOMIC_RELEASE);
	if (syscall(__NR_io_uring_enter, ring->fd, to_submit, wait_for, flags, arg, arg_bytes) >= 0)
		return 0;
	switch (errno) {
	case ETIME: /* the timeout */
	case EINTR:
	case EAGAIN: /* short of memory, or too much in flight: what was filled stays filled */
	case EBUSY:
		return 0;
	default:
		return -errno;
	}
}

struct io_uring_sqe *io_ring_get_sqe(struct io_ring *ring)
{
	struct io_uring_sqe *sqe;

	if (ring->sq_tail - __atomic_load_n(ring->sq_khead, __ATOMIC_ACQUIRE) == ring->sq_entries &&
	    (enter(ring, 0, 0, NULL, 0) < 0 ||
	     ring->sq_tail - __atomic_load_n(ring->sq_khead, __ATOMIC_ACQUIRE) == ring->sq_entries))
		return NULL;
	sqe = &ring->sqes[ring->sq_tail++ & (ring->sq_entries - 1)];
	memset(sqe, 0, sizeof(*sqe));
	return sqe;
}

int io_ring_enter(struct io_ring *ring, uint64_t timeout_ns)
{
	struct __kernel_timespec timeout;
	struct io_uring_getevents_arg arg;

	if (timeout_ns == 0)
		return enter(ring, 0, IORING_ENTER_GETEVENTS, NULL, 0);
	if (timeout_ns == IO_RING_FOREVER)
		return enter(ring, 1, IORING_ENTER_GETEVENTS, NULL, 0);
	timeout.tv_sec = (int64_t)(timeout_ns / NS_PER_SEC);
	timeout.tv_nsec = (long long)(timeout_ns % NS_PER_SEC);
	memset(&arg, 0, sizeof(arg));
	arg.ts = (uint64_t)(uintptr_t)&timeout;
	return enter(ring, 1, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &arg, sizeof(arg));
}

bool io_ring_take_cqe(struct io_ring *ring, struct io_uring_cqe *ret)
{
	uint32_t head = *ring->cq_khead; /* ours alone to move */

	/* Acquire pairs with the kernel's release: who sees the tail sees the completion. */
	if (head == __atomic_load_n(ring->cq_ktail, __ATOMIC_ACQUIRE))
		return false;
	*ret = ring->cqes[head & ring->cq_mask];
	/* Release: the copy above comes before the kernel may use the place again. */
	__atomic_store_n(ring->cq_khead, head + 1, __ATOMIC_RELEASE);
	return true;
}
