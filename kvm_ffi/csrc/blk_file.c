/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "blk_io.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/stat.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "virtqueue.h"

#define BOUNCE_BYTES 65536u
/* Where the kernel does not tell: no disk needs more. */
#define SAFE_ALIGN 4096u

int blk_file_init(struct blk_file *file, int fd)
{
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0)
		return -errno;
	*file = (struct blk_file){.fd = fd, .memory_align = 1, .offset_align = 1};
	if (!(flags & O_DIRECT))
		return 0;
	file->is_direct = true;
	file->memory_align = file->offset_align = SAFE_ALIGN;
#ifdef STATX_DIOALIGN
	{
		struct statx st;

		if (syscall(__NR_statx, fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &st) == 0 &&
		    (st.stx_mask & STATX_DIOALIGN) && st.stx_dio_offset_align != 0) {
			file->memory_align = st.stx_dio_mem_align;
			file->offset_align = st.stx_dio_offset_align;
		}
	}
#endif
	return 0;
}

bool blk_file_is_partial(const struct blk_file *file, uint64_t offset, uint64_t len)
{
	return ((offset | len) & (file->offset_align - 1)) != 0;
}

bool blk_file_must_bounce(const struct blk_file *file, const struct blk_op *op)
{
	/* Guest-controlled: where its buffers lie and how long they are. */
	uint64_t bits = 0;

	if (!file->is_direct || (op->kind != BLK_OP_READ && op->kind != BLK_OP_WRITE))
		return false;
	if (blk_file_is_partial(file, op->offset, op->len))
		return true;
	for (uint32_t i = 0; i < op->n_iov; i++) {
		bits |= (uintptr_t)op->iov[i].iov_base & (file->memory_align - 1);
		bits |= op->iov[i].iov_len & (file->offset_align - 1);
	}
	return bits != 0;
}

/* Move the first part of an operation through an aligned buffer. */
static int64_t bounce(const struct blk_file *file, const struct blk_op *op)
{
	uint64_t mask = file->offset_align - 1;
	uint64_t start = op->offset & ~mask;
	uint64_t skip = op->offset - start;
	uint64_t window = (skip + op->len + mask) & ~mask;
	uint64_t here;
	int64_t moved = 0;
	uint8_t *buf;

	if (window > BOUNCE_BYTES)
		window = BOUNCE_BYTES;
	here = window - skip < op->len ? window - skip : op->len;
	buf = aligned_alloc(SAFE_ALIGN, BOUNCE_BYTES);
	if (!buf)
		return -ENOMEM;
	if (op->kind == BLK_OP_READ || skip != 0 || here != window)
		moved = pread(file->fd, buf, window, (off_t)start);
	if (moved < 0) {
		moved = -errno;
	} else if (op->kind == BLK_OP_READ) {
		moved = (uint64_t)moved > skip ? moved - (int64_t)skip : 0;
		if ((uint64_t)moved > here)
			moved = (int64_t)here;
		iov_copy_in(op->iov, op->n_iov, 0, buf + skip, (size_t)moved);
	} else {
		iov_copy_out(op->iov, op->n_iov, 0, buf + skip, here);
		moved = pwrite(file->fd, buf, window, (off_t)start);
		if (moved < 0)
			moved = -errno;
		else
			moved = (uint64_t)moved == window ? (int64_t)here : -EIO;
	}
	free(buf);
	return moved;
}

int64_t blk_file_execute(const struct blk_file *file, const struct blk_op *op)
{
	int64_t ret;

	if (blk_file_must_bounce(file, op))
		return bounce(file, op);
	do {
		switch (op->kind) {
		case BLK_OP_READ:
			ret = preadv(file->fd, op->iov, (int)op->n_iov, (off_t)op->offset);
			break;
		case BLK_OP_WRITE:
			ret = pwritev(file->fd, op->iov, (int)op->n_iov, (off_t)op->offset);
			break;
		case BLK_OP_SYNC:
			ret = fdatasync(file->fd);
			break;
		default:
			ret = fallocate(file->fd, op->mode, (off_t)op->offset, (off_t)op->len);
			break;
		}
	} while (ret < 0 && errno == EINTR);
	return ret < 0 ? -errno : ret;
}
