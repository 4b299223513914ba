/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "blk_request.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <string.h>

#define ZERO_CHUNK_BYTES 65536u

static const uint8_t zero_chunk[ZERO_CHUNK_BYTES] __attribute__((aligned(4096)));

_Static_assert(sizeof(struct virtio_blk_discard_write_zeroes) == sizeof(struct iovec),
	       "segments and small iovecs share their place");

int blk_request_parse(struct blk_request *req, const struct desc_chain *chain,
		      struct blk_buffers *ret)
{
	/* Guest-controlled: the header bytes; the chain was checked when it was popped. */
	struct virtio_blk_outhdr header;
	struct iovec *last;

	if (chain->writable_len == 0)
		return -EPROTO;
	memset(req, 0, offsetof(struct blk_request, iov));
	memset(ret, 0, sizeof(*ret));
	req->head = chain->head;
	req->in_len = chain->writable_len - 1;
	ret->in = chain->iov + chain->n_readable;
	ret->n_in = chain->n_writable;
	last = &ret->in[ret->n_in - 1];
	last->iov_len--; /* popped buffers are never empty */
	req->status_byte = (uint8_t *)last->iov_base + last->iov_len;
	if (last->iov_len == 0)
		ret->n_in--;
	if (iov_copy_out(chain->iov, chain->n_readable, 0, &header, sizeof(header)) !=
	    sizeof(header))
		return 0;
	ret->has_header = true;
	req->type = header.type;
	ret->sector = header.sector;
	ret->out = chain->iov;
	ret->n_out = chain->n_readable;
	ret->out_len = chain->readable_len - (uint32_t)sizeof(header);
	iov_drop_front(&ret->out, &ret->n_out, sizeof(header));
	return 0;
}

static enum blk_next done(struct blk_request *req, uint8_t status)
{
	req->status = status;
	return BLK_NEXT_DONE;
}

static enum blk_next host_error(struct blk_request *req, int64_t res)
{
	req->host_errno = (int32_t)-res;
	return done(req, VIRTIO_BLK_S_IOERR);
}

/* Every change of the disk ends here: without FLUSH it must be durable when answered
 * (VIRTIO 1.2, 5.2.6.2). */
static enum blk_next written(const struct blk_disk *disk, struct blk_request *req)
{
	return disk->is_writethrough ? BLK_NEXT_SYNC : done(req, VIRTIO_BLK_S_OK);
}

/* Whether [sector, sector + n_sectors) is on the disk; no sum is formed: it could wrap. */
static bool is_on_disk(const struct blk_disk *disk, uint64_t sector, uint64_t n_sectors)
{
	/* Guest-controlled: sector, n_sectors. */
	uint64_t size = __atomic_load_n(&disk->size_sectors, __ATOMIC_RELAXED);

	return n_sectors <= size && sector <= size - n_sectors;
}

static struct blk_large_iov *take_large(struct blk_disk *disk)
{
	struct blk_large_iov *large = disk->free_large;

	if (large)
		disk->free_large = large->next;
	else if (disk->n_large_used < BLK_LARGE_IOVS)
		large = &disk->large[disk->n_large_used++];
	return large;
}

static enum blk_next begin_transfer(struct blk_disk *disk, struct blk_request *req,
				    const struct blk_buffers *buffers)
{
	/* Guest-controlled: the sector, the lengths, the number of buffers; all private copies. */
	bool is_write = req->type == VIRTIO_BLK_T_OUT;
	uint32_t len = is_write ? buffers->out_len : req->in_len;
	uint32_t n_iov = is_write ? buffers->n_out : buffers->n_in;

	if ((is_write && disk->is_read_only) || len % BLK_SECTOR_BYTES != 0 ||
	    len > BLK_MAX_REQUEST_BYTES ||
	    !is_on_disk(disk, buffers->sector, len / BLK_SECTOR_BYTES))
		return done(req, VIRTIO_BLK_S_IOERR);
	req->is_accepted = true;
	if (len == 0)
		return is_write ? written(disk, req) : done(req, VIRTIO_BLK_S_OK);
	req->op.iov = req->iov;
	if (n_iov > BLK_SMALL_IOV) {
		req->large = take_large(disk);
		if (!req->large)
			return BLK_NEXT_LATER;
		req->op.iov = req->large->iov;
	}
	memcpy(req->op.iov, is_write ? buffers->out : buffers->in, n_iov * sizeof(struct iovec));
	req->op.kind = is_write ? BLK_OP_WRITE : BLK_OP_READ;
	req->op.n_iov = n_iov;
	req->op.offset = buffers->sector * BLK_SECTOR_BYTES;
	req->op.len = req->cost_bytes = len;
	req->must_be_alone =
	    is_write && blk_file_is_partial(&disk->file, req->op.offset, req->op.len);
	return BLK_NEXT_OP;
}

static enum blk_next begin_get_id(const struct blk_disk *disk, struct blk_request *req,
				  const struct blk_buffers *buffers)
{
	req->is_accepted = true;
	req->done_bytes =
	    iov_copy_in(buffers->in, buffers->n_in, 0, disk->serial, BLK_SERIAL_BYTES);
	return done(req,
		    req->done_bytes == BLK_SERIAL_BYTES ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR);
}

/* The next segment that is not empty (fallocate(2) calls an empty one an error). */
static enum blk_next next_segment(const struct blk_disk *disk, struct blk_request *req)
{
	bool is_discard = req->type == VIRTIO_BLK_T_DISCARD;

	while (req->segment < req->n_segments) {
		const struct virtio_blk_discard_write_zeroes *segment =
		    &req->segments[req->segment++];
		bool may_unmap =
		    is_discard || (segment->flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP);

		if (segment->num_sectors == 0)
			continue;
		req->op.kind = BLK_OP_ALLOCATE;
		req->op.mode =
		    FALLOC_FL_KEEP_SIZE | (may_unmap ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
		req->op.offset = segment->sector * BLK_SECTOR_BYTES;
		req->op.len = (uint64_t)segment->num_sectors * BLK_SECTOR_BYTES;
		return BLK_NEXT_OP;
	}
	return written(disk, req);
}

/* VIRTIO 1.2, 5.2.6.2: a reserved flag is UNSUPP, and so is unmap on a discard. */
static uint8_t check_segment(const struct blk_disk *disk, bool is_discard,
			     const struct virtio_blk_discard_write_zeroes *segment)
{
	/* Guest-controlled: *segment (a private copy). */
	uint32_t allowed = is_discard ? 0 : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
	uint32_t limit = is_discard ? BLK_MAX_DISCARD_SECTORS : BLK_MAX_WRITE_ZEROES_SECTORS;

	if (segment->flags & ~allowed)
		return VIRTIO_BLK_S_UNSUPP;
	if (segment->num_sectors > limit ||
	    !is_on_disk(disk, segment->sector, segment->num_sectors))
		return VIRTIO_BLK_S_IOERR;
	return VIRTIO_BLK_S_OK;
}

static enum blk_next begin_ranges(struct blk_disk *disk, struct blk_request *req,
				  const struct blk_buffers *buffers)
{
	/* Guest-controlled: the segments, copied once, then checked, then used. */
	bool is_discard = req->type == VIRTIO_BLK_T_DISCARD;
	uint32_t limit = is_discard ? BLK_MAX_DISCARD_SEGMENTS : BLK_MAX_WRITE_ZEROES_SEGMENTS;
	uint32_t n = buffers->out_len / (uint32_t)sizeof(req->segments[0]);

	if (disk->is_read_only || n == 0 || n > limit ||
	    buffers->out_len % sizeof(req->segments[0]) != 0)
		return done(req, VIRTIO_BLK_S_IOERR);
	iov_copy_out(buffers->out, buffers->n_out, 0, req->segments, buffers->out_len);
	/* All are checked before any is carried out: a refused request changes nothing. */
	for (uint32_t i = 0; i < n; i++) {
		const struct virtio_blk_discard_write_zeroes *segment = &req->segments[i];
		uint8_t status = check_segment(disk, is_discard, segment);

		if (status != VIRTIO_BLK_S_OK)
			return done(req, status);
		if (is_discard)
			continue;
		req->cost_bytes += segment->num_sectors * BLK_SECTOR_BYTES;
		req->must_be_alone |= blk_file_is_partial(
		    &disk->file, segment->sector * BLK_SECTOR_BYTES, req->cost_bytes);
	}
	req->is_accepted = true;
	req->n_segments = n;
	return next_segment(disk, req);
}

enum blk_next blk_request_begin(struct blk_disk *disk, struct blk_request *req,
				const struct blk_buffers *buffers)
{
	/* Guest-controlled: the type, a private copy. */
	if (!buffers->has_header)
		return done(req, VIRTIO_BLK_S_IOERR);
	switch (req->type) {
	case VIRTIO_BLK_T_IN:
	case VIRTIO_BLK_T_OUT:
		return begin_transfer(disk, req, buffers);
	case VIRTIO_BLK_T_FLUSH:
		req->is_accepted = true;
		return BLK_NEXT_SYNC;
	case VIRTIO_BLK_T_GET_ID:
		return begin_get_id(disk, req, buffers);
	case VIRTIO_BLK_T_DISCARD:
	case VIRTIO_BLK_T_WRITE_ZEROES:
		return begin_ranges(disk, req, buffers);
	default:
		return done(req, VIRTIO_BLK_S_UNSUPP);
	}
}

static enum blk_next write_zeroes(struct blk_request *req)
{
	req->op.kind = BLK_OP_WRITE;
	req->op.len = req->zeroes_left < ZERO_CHUNK_BYTES ? req->zeroes_left : ZERO_CHUNK_BYTES;
	req->zeroes.iov_base = (void *)(uintptr_t)zero_chunk;
	req->zeroes.iov_len = req->op.len;
	req->op.iov = &req->zeroes;
	req->op.n_iov = 1;
	return BLK_NEXT_OP;
}

static enum blk_next advance_range(const struct blk_disk *disk, struct blk_request *req,
				   int64_t res)
{
	if (res >= 0)
		return next_segment(disk, req);
	/* Not supported at all, or (a block device) not for a range of this alignment. */
	if (res != -EOPNOTSUPP && res != -EINVAL)
		return host_error(req, res);
	/* A discard is a hint: a host that cannot has nothing to report. */
	if (req->type == VIRTIO_BLK_T_DISCARD)
		return next_segment(disk, req);
	req->zeroes_left = req->op.len;
	return write_zeroes(req);
}

enum blk_next blk_request_advance(struct blk_disk *disk, struct blk_request *req, int64_t res)
{
	if (req->op.kind == BLK_OP_ALLOCATE)
		return advance_range(disk, req, res);
	/* An early end of the file counts as an error: the disk is smaller than it says. */
	if (res <= 0 || (uint64_t)res > req->op.len)
		return host_error(req, res < 0 ? res : -EIO);
	req->op.offset += (uint64_t)res;
	req->op.len -= (uint64_t)res;
	if (req->type == VIRTIO_BLK_T_WRITE_ZEROES) {
		req->zeroes_left -= (uint64_t)res;
		return req->zeroes_left > 0 ? write_zeroes(req) : next_segment(disk, req);
	}
	req->done_bytes += (uint64_t)res;
	iov_drop_front(&req->op.iov, &req->op.n_iov, (size_t)res);
	if (req->op.len > 0)
		return BLK_NEXT_OP;
	return req->type == VIRTIO_BLK_T_OUT ? written(disk, req) : done(req, VIRTIO_BLK_S_OK);
}

void blk_request_synced(struct blk_request *req, int64_t res)
{
	if (res < 0)
		host_error(req, res);
	else
		done(req, VIRTIO_BLK_S_OK);
}

uint32_t blk_request_answer(const struct blk_request *req)
{
	/* The used length is what was written from the start of the writable part without a gap,
	 * so the status byte counts only behind complete data. */
	uint64_t filled = req->type == VIRTIO_BLK_T_OUT ? 0 : req->done_bytes;

	*(volatile uint8_t *)req->status_byte = req->status;
	return (uint32_t)(filled == req->in_len ? filled + 1 : filled);
}

void blk_request_release(struct blk_disk *disk, struct blk_request *req)
{
	if (!req->large)
		return;
	req->large->next = disk->free_large;
	disk->free_large = req->large;
	req->large = NULL;
}
