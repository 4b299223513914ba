/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* The back end on io_uring: operations of all queues in one ring, kicks and completions in one
 * wait, one system call for both ways. */
#include "blk_engine.h"

#include <errno.h>
#include <linux/falloc.h>
#include <poll.h>
#include <stdlib.h>

#include "io_ring.h"

/* An engine has BLK_MAX_IN_FLIGHT operations under way, one sync and 17 polls: completions
 * always find room. */
#define SQ_ENTRIES 128u
#define CQ_ENTRIES 512u
_Static_assert(CQ_ENTRIES >= BLK_MAX_IN_FLIGHT + 1 + BLK_MAX_QUEUES + 1, "room for all");

/* A write to the page cache is a copy: of this size it costs less than to hand it to a thread
 * of the kernel, which is what io_uring does with it on ext4 ... */
#define INLINE_WRITE_MAX_BYTES 65536u
/* ... unless the host has too much to write back and makes writers wait, up to 200 ms at a time.
 * Then the others do not have to wait along. Less is no sign: a busy CPU is as slow. */
#define STALL_NS 50000000u
#define STALL_PAUSE_NS 100000000u

struct blk_ring {
	struct blk_io io;
	struct io_ring ring;
	struct blk_engine *engine;
	const struct blk_file *file;
	const struct blk_listen *listen;
	uint64_t inline_from_ns; /* no write to the page cache by our own hand before */
	uint32_t armed; /* bit i: the poll of listener i is in the ring */
	uint8_t sqe_flags;
	int32_t file_ref;
};

static struct blk_ring *ring_of(struct blk_io *io)
{
	return (struct blk_ring *)(void *)io;
}

static bool is_inline(const struct blk_ring *ring, const struct blk_op *op)
{
	if (op->kind == BLK_OP_WRITE && !ring->file->is_direct &&
	    op->len <= INLINE_WRITE_MAX_BYTES &&
	    blk_engine_now(ring->engine) >= ring->inline_from_ns)
		return true;
	return blk_file_must_bounce(ring->file, op);
}

static void prepare(const struct blk_ring *ring, struct blk_request *req, struct io_uring_sqe *sqe)
{
	const struct blk_op *op = &req->op;

	sqe->fd = ring->file_ref;
	sqe->flags = ring->sqe_flags;
	sqe->user_data = (uint64_t)(uintptr_t)req;
	sqe->off = op->offset;
	switch (op->kind) {
	case BLK_OP_READ:
	case BLK_OP_WRITE:
		if (op->n_iov == 1) {
			sqe->opcode = op->kind == BLK_OP_READ ? IORING_OP_READ : IORING_OP_WRITE;
			sqe->addr = (uint64_t)(uintptr_t)op->iov->iov_base;
			sqe->len = (uint32_t)op->iov->iov_len;
		} else {
			sqe->opcode = op->kind == BLK_OP_READ ? IORING_OP_READV : IORING_OP_WRITEV;
			sqe->addr = (uint64_t)(uintptr_t)op->iov;
			sqe->len = op->n_iov;
		}
		break;
	case BLK_OP_SYNC:
		sqe->opcode = IORING_OP_FSYNC;
		sqe->fsync_flags = IORING_FSYNC_DATASYNC;
		break;
	default:
		sqe->opcode = IORING_OP_FALLOCATE;
		sqe->addr = op->len;
		sqe->len = (uint32_t)op->mode;
		break;
	}
}

static int64_t execute(struct blk_ring *ring, const struct blk_op *op)
{
	uint64_t began_ns = blk_engine_update_now(ring->engine);
	int64_t ret = blk_file_execute(ring->file, op);
	uint64_t ended_ns = blk_engine_update_now(ring->engine);

	if (ended_ns - began_ns > STALL_NS)
		ring->inline_from_ns = ended_ns + STALL_PAUSE_NS;
	return ret;
}

static bool ring_submit(struct blk_io *io, struct blk_request *req, int64_t *ret)
{
	struct blk_ring *ring = ring_of(io);
	struct io_uring_sqe *sqe = is_inline(ring, &req->op) ? NULL : io_ring_get_sqe(&ring->ring);

	if (!sqe) {
		*ret = execute(ring, &req->op);
		return true;
	}
	prepare(ring, req, sqe);
	return false;
}

/* Listeners are the kick of each queue, and behind them the wake-up. Their polls fire with every
 * write to the eventfd, read or not, so nobody reads it. */
static void arm(struct blk_ring *ring)
{
	for (uint32_t i = 0; i <= ring->listen->n_queues; i++) {
		bool is_wake = i == ring->listen->n_queues;
		struct io_uring_sqe *sqe;

		if (ring->armed & (1u << i))
			continue;
		sqe = io_ring_get_sqe(&ring->ring);
		if (!sqe)
			return;
		sqe->opcode = IORING_OP_POLL_ADD;
		sqe->fd = is_wake ? ring->listen->wake_fd : ring->listen->kick_fds[i];
		sqe->len = IORING_POLL_ADD_MULTI;
		sqe->poll32_events = POLLIN;
		sqe->user_data = i << 1 | 1; /* requests are aligned: their bit 0 is 0 */
		ring->armed |= 1u << i;
	}
}

static int heard(struct blk_ring *ring, uint32_t listener, const struct io_uring_cqe *cqe)
{
	if (!(cqe->flags & IORING_CQE_F_MORE))
		ring->armed &= ~(1u << listener);
	if (cqe->res < 0)
		return cqe->res; /* closed under us: arming it again would spin */
	if (listener < ring->listen->n_queues)
		blk_engine_kicked(ring->engine, listener);
	return 0;
}

static int ring_turn(struct blk_io *io, uint64_t timeout_ns)
{
	struct blk_ring *ring = ring_of(io);
	struct io_uring_cqe cqe;
	int ret = 0;

	if (ring->listen)
		arm(ring);
	ret = io_ring_enter(&ring->ring, timeout_ns);
	blk_engine_update_now(ring->engine);
	while (io_ring_take_cqe(&ring->ring, &cqe)) {
		struct blk_request *req = (void *)(uintptr_t)cqe.user_data;
		int64_t res = cqe.res;

		if (cqe.user_data & 1) {
			int err = heard(ring, (uint32_t)(cqe.user_data >> 1), &cqe);

			ret = err < 0 ? err : ret;
			continue;
		}
		/* A file that cannot wait in the background, or a signal in the kernel's thread. */
		if (res == -EAGAIN || res == -EINTR)
			res = execute(ring, &req->op);
		blk_engine_done(ring->engine, req, res);
	}
	return ret;
}

static void ring_close(struct blk_io *io)
{
	struct blk_ring *ring = ring_of(io);

	io_ring_deinit(&ring->ring);
	free(ring);
}

static void ring_set_file(struct blk_io *io)
{
	struct blk_ring *ring = ring_of(io);

	if (ring->sqe_flags && io_ring_update_file(&ring->ring, ring->file->fd) == 0)
		return;
	/* It costs a little more for each operation, and cannot fail. */
	ring->file_ref = ring->file->fd;
	ring->sqe_flags = 0;
}

int blk_io_uring_probe(void)
{
	struct io_ring ring;
	int err = io_ring_init(&ring, 1, 2);

	if (err == 0)
		io_ring_deinit(&ring);
	return err;
}

int blk_ring_open(struct blk_engine *engine, const struct blk_file *file,
		  const struct blk_listen *listen, struct blk_io **ret)
{
	struct blk_ring *ring = calloc(1, sizeof(*ring));
	int err;

	if (!ring)
		return -ENOMEM;
	err = io_ring_init(&ring->ring, SQ_ENTRIES, CQ_ENTRIES);
	if (err < 0) {
		free(ring);
		return err;
	}
	ring->io = (struct blk_io){false, ring_submit, ring_turn, ring_set_file, ring_close};
	ring->engine = engine;
	ring->file = file;
	ring->listen = listen;
	ring->file_ref = file->fd;
	if (io_ring_register_file(&ring->ring, file->fd) == 0) {
		ring->file_ref = 0;
		ring->sqe_flags = IOSQE_FIXED_FILE;
	}
	*ret = &ring->io;
	return 0;
}
