/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * io_uring by its system calls: a ring of one thread, for one file.
 *
 * Source: io_uring_setup(2), io_uring_enter(2), io_uring_register(2).
 */
#ifndef HOSTEL_IO_RING_H
#define HOSTEL_IO_RING_H

#include <linux/io_uring.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define IO_RING_FOREVER UINT64_MAX

struct io_ring {
	int fd;
	uint32_t sq_entries;
	uint32_t sq_tail; /* what was filled; the kernel sees it at io_ring_enter() */
	uint32_t *sq_khead;
	uint32_t *sq_ktail;
	uint32_t cq_mask;
	uint32_t *cq_khead;
	uint32_t *cq_ktail;
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
	uint8_t *rings; /* one mapping of both */
	size_t rings_bytes;
};

/* 0, or -errno: -ENOSYS and -EPERM where the host forbids io_uring or seccomp does,
 * -EOPNOTSUPP where the kernel is older than Linux 5.13. Both sizes are powers of two. Only the
 * thread that made a ring may use it. */
int io_ring_init(struct io_ring *ring, uint32_t sq_entries, uint32_t cq_entries);
void io_ring_deinit(struct io_ring *ring);
/* 0: file_fd is file 0 of IOSQE_FIXED_FILE; or -errno. */
int io_ring_register_file(struct io_ring *ring, int file_fd);
/* 0: file_fd has taken its place; the kernel may hold the old one for a moment. Or -errno. */
int io_ring_update_file(struct io_ring *ring, int file_fd);

/* A cleared entry; NULL when the ring is full and the kernel takes nothing now. */
struct io_uring_sqe *io_ring_get_sqe(struct io_ring *ring);
/* Submit what was filled and wait for one completion, for timeout_ns at most; IO_RING_FOREVER,
 * or 0 not to wait. 0 also when interrupted, or -errno. */
int io_ring_enter(struct io_ring *ring, uint64_t timeout_ns);
/* Take the next completion. */
bool io_ring_take_cqe(struct io_ring *ring, struct io_uring_cqe *ret);

#endif
