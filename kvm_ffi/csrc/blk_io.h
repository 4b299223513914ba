/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * What a block engine asks of its host, and who carries it out.
 *
 * A virtio-blk request becomes one operation after the other (blk_request.c). A back end
 * does them: blk_ring.c many at a time by io_uring, blk_sync.c each at once.
 */
#ifndef HOSTEL_BLK_IO_H
#define HOSTEL_BLK_IO_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#define BLK_MAX_QUEUES 16
#define BLK_IO_FOREVER UINT64_MAX

enum blk_op_kind { BLK_OP_READ, BLK_OP_WRITE, BLK_OP_SYNC, BLK_OP_ALLOCATE };

/* One system call's worth; offset and len are checked, the iovecs lie in guest memory. */
struct blk_op {
	enum blk_op_kind kind;
	int mode; /* ALLOCATE: as in fallocate(2) */
	uint32_t n_iov;
	struct iovec *iov;
	uint64_t offset;
	uint64_t len;
};

/* The file behind a disk. Alignments are powers of two, 1 through the page cache. */
struct blk_file {
	int fd;
	bool is_direct; /* O_DIRECT */
	uint32_t memory_align;
	uint32_t offset_align;
};

/* Look at an open file: 0, or -errno. */
int blk_file_init(struct blk_file *file, int fd);
/* Whether the kernel would refuse an operation for its alignment. */
bool blk_file_must_bounce(const struct blk_file *file, const struct blk_op *op);
/* Whether a write covers part of a block of an O_DIRECT file: the rest of the block is read and
 * written back, so nothing else may write there meanwhile. */
bool blk_file_is_partial(const struct blk_file *file, uint64_t offset, uint64_t len);
/* Carry an operation out: bytes moved (fewer than asked for is fine), or -errno. */
int64_t blk_file_execute(const struct blk_file *file, const struct blk_op *op);

struct blk_request;
struct blk_engine;

/* A back end; the engine's thread makes it, uses it and closes it. */
struct blk_io {
	bool is_blocking; /* submit takes as long as the disk does */
	/* True: done, *ret is as blk_file_execute() has it. False: under way, *op stays as it is
	 * until blk_engine_done() is called from a later turn. */
	bool (*submit)(struct blk_io *io, struct blk_request *req, int64_t *ret);
	/* Begin what was submitted; give the engine what is done and who kicked; when that is
	 * nothing, wait for it, up to timeout_ns. 0, or -errno: the back end is of no use. */
	int (*turn)(struct blk_io *io, uint64_t timeout_ns);
	/* Another file is in the place of the one that it was opened for. Nothing is under way. */
	void (*set_file)(struct blk_io *io);
	/* Nothing is under way. */
	void (*close)(struct blk_io *io);
};

/* What a back end listens to; -1 is no descriptor. */
struct blk_listen {
	uint32_t n_queues;
	int kick_fds[BLK_MAX_QUEUES];
	int wake_fd;
};

/* 0, or -errno; listen is NULL where nobody kicks. The file and *listen must outlive it. */
int blk_ring_open(struct blk_engine *engine, const struct blk_file *file,
		  const struct blk_listen *listen, struct blk_io **ret);
int blk_sync_open(struct blk_engine *engine, const struct blk_file *file,
		  const struct blk_listen *listen, struct blk_io **ret);

#endif
