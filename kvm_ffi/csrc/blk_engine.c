/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "blk_engine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Completions may wait this long for company before the driver sees them: it saves
 * interrupts when requests are served from the page cache, and is lost in the noise when
 * they are not. */
#define BATCH_MAX_NS 50000u
#define BATCH_MAX_REQUESTS 32u
/* Requests of at least this size are slow enough not to keep finished ones waiting. */
#define SLOW_REQUEST_BYTES 65536u
#define ZERO_CHUNK_BYTES 65536u

static const uint8_t zero_chunk[ZERO_CHUNK_BYTES];

struct blk_engine {
	struct blk_config config;
	struct engine_gate gate;
	struct blk_stats stats;
	uint64_t size_sectors; /* atomic: another thread may resize the disk */
	uint32_t fault; /* atomic: enum engine_fault */
	uint32_t n_staged;
	bool has_lost_writes; /* a sync failed: nothing is durable any more */
	uint64_t staged_since_ns;
	struct iovec iov[VIRTQUEUE_MAX_SIZE];
};

/* A request whose guest-controlled parts have been copied and bounded. */
struct blk_request {
	bool has_header;
	uint32_t type;
	uint64_t sector;
	struct iovec *out; /* what the driver sent, behind the header */
	struct iovec *in; /* what the driver receives, before the status byte */
	uint32_t n_out;
	uint32_t n_in;
	uint32_t out_len;
	uint32_t in_len;
	uint32_t in_written; /* bytes of `in` that the device filled, from its start */
	uint8_t *status;
};

int blk_engine_create(const struct blk_config *config, struct blk_engine **ret)
{
	struct blk_engine *engine;
	int err;

	if (config->size_sectors > BLK_MAX_SECTORS)
		return -EINVAL;
	engine = calloc(1, sizeof(*engine));
	if (!engine)
		return -ENOMEM;
	err = engine_gate_init(&engine->gate);
	if (err < 0) {
		free(engine);
		return err;
	}
	engine->config = *config;
	engine->size_sectors = config->size_sectors;
	*ret = engine;
	return 0;
}

int blk_engine_destroy(struct blk_engine *engine)
{
	int err = engine_gate_deinit(&engine->gate);

	if (err == 0)
		free(engine);
	return err;
}

/* 0, or -EPROTO when there is no byte to put a status in: such a request cannot be
 * answered. One whose header is too short can: with IOERR. */
static int blk_request_parse(const struct desc_chain *chain, struct blk_request *req)
{
	/* Guest-controlled: the header bytes; the chain was checked when it was popped. */
	struct virtio_blk_outhdr header;
	struct iovec *last;

	if (chain->writable_len == 0)
		return -EPROTO;
	memset(req, 0, sizeof(*req));
	req->in = chain->iov + chain->n_readable;
	req->n_in = chain->n_writable;
	req->in_len = chain->writable_len - 1;
	last = &req->in[req->n_in - 1];
	last->iov_len--; /* popped buffers are never empty */
	req->status = (uint8_t *)last->iov_base + last->iov_len;
	if (last->iov_len == 0)
		req->n_in--;
	if (iov_copy_out(chain->iov, chain->n_readable, 0, &header, sizeof(header)) !=
	    sizeof(header))
		return 0;
	req->has_header = true;
	req->type = header.type;
	req->sector = header.sector;
	req->out = chain->iov;
	req->n_out = chain->n_readable;
	req->out_len = chain->readable_len - (uint32_t)sizeof(header);
	iov_drop_front(&req->out, &req->n_out, sizeof(header));
	return 0;
}

/* Whether [sector, sector + n_sectors) is on the disk; no sum is formed: it could wrap. */
static bool is_on_disk(struct blk_engine *engine, uint64_t sector, uint64_t n_sectors)
{
	/* Guest-controlled: sector, n_sectors. */
	uint64_t size = __atomic_load_n(&engine->size_sectors, __ATOMIC_RELAXED);

	return n_sectors <= size && sector <= size - n_sectors;
}

static uint8_t host_error(struct blk_engine *engine)
{
	engine_count(&engine->stats.host_errors, 1);
	return VIRTIO_BLK_S_IOERR;
}

static uint8_t sync_disk(struct blk_engine *engine)
{
	engine_count(&engine->stats.syncs, 1);
	/* Sticky: Linux reports a failed write-back once and forgets the pages, so a later sync
	 * that succeeds says nothing about the data that this one lost. */
	if (!engine->has_lost_writes && fdatasync(engine->config.disk_fd) == 0)
		return VIRTIO_BLK_S_OK;
	engine->has_lost_writes = true;
	return host_error(engine);
}

/* Every change of the disk ends here: without FLUSH it must be durable when answered
 * (VIRTIO 1.2, 5.2.6.2). */
static uint8_t finish_write(struct blk_engine *engine, uint8_t status)
{
	if (status == VIRTIO_BLK_S_OK && engine->config.is_writethrough)
		return sync_disk(engine);
	return status;
}

/* Move len bytes between the file and iovecs (which are used up); bytes moved. An early end
 * of the file counts as an error: the disk is smaller than its advertised size. */
static uint64_t transfer(int fd, bool is_write, struct iovec *iov, uint32_t n_iov, uint64_t offset,
			 uint64_t len)
{
	uint64_t done = 0;

	while (done < len) {
		off_t at = (off_t)(offset + done);
		ssize_t moved =
		    is_write ? pwritev(fd, iov, (int)n_iov, at) : preadv(fd, iov, (int)n_iov, at);

		if (moved < 0 && errno == EINTR)
			continue;
		if (moved <= 0)
			break;
		done += (uint64_t)moved;
		iov_drop_front(&iov, &n_iov, (size_t)moved);
	}
	return done;
}

static uint8_t submit_read(struct blk_engine *engine, struct blk_request *req)
{
	uint64_t done;

	if (req->in_len % BLK_SECTOR_BYTES != 0 || req->in_len > BLK_MAX_REQUEST_BYTES ||
	    !is_on_disk(engine, req->sector, req->in_len / BLK_SECTOR_BYTES))
		return VIRTIO_BLK_S_IOERR;
	done = transfer(engine->config.disk_fd, false, req->in, req->n_in,
			req->sector * BLK_SECTOR_BYTES, req->in_len);
	req->in_written = (uint32_t)done;
	engine_count(&engine->stats.reads, 1);
	engine_count(&engine->stats.read_bytes, done);
	return done == req->in_len ? VIRTIO_BLK_S_OK : host_error(engine);
}

static uint8_t submit_write(struct blk_engine *engine, struct blk_request *req)
{
	uint64_t done;

	if (engine->config.is_read_only || req->out_len % BLK_SECTOR_BYTES != 0 ||
	    req->out_len > BLK_MAX_REQUEST_BYTES ||
	    !is_on_disk(engine, req->sector, req->out_len / BLK_SECTOR_BYTES))
		return VIRTIO_BLK_S_IOERR;
	done = transfer(engine->config.disk_fd, true, req->out, req->n_out,
			req->sector * BLK_SECTOR_BYTES, req->out_len);
	engine_count(&engine->stats.writes, 1);
	engine_count(&engine->stats.write_bytes, done);
	if (done != req->out_len)
		return host_error(engine);
	return finish_write(engine, VIRTIO_BLK_S_OK);
}

static uint8_t submit_get_id(struct blk_engine *engine, struct blk_request *req)
{
	size_t done = iov_copy_in(req->in, req->n_in, 0, engine->config.serial, BLK_SERIAL_BYTES);

	req->in_written = (uint32_t)done;
	engine_count(&engine->stats.get_ids, 1);
	return done == BLK_SERIAL_BYTES ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR;
}

/* Not supported at all, or (a block device) not for a range of this alignment. */
static bool is_refused(int err)
{
	return err == EOPNOTSUPP || err == EINVAL;
}

static uint8_t discard_range(struct blk_engine *engine, uint64_t offset, uint64_t len)
{
	if (fallocate(engine->config.disk_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		      (off_t)offset, (off_t)len) == 0)
		return VIRTIO_BLK_S_OK;
	/* A discard is a hint: a host that cannot has nothing to report. */
	return is_refused(errno) ? VIRTIO_BLK_S_OK : host_error(engine);
}

static uint8_t zero_range(struct blk_engine *engine, uint64_t offset, uint64_t len, bool may_unmap)
{
	int mode = may_unmap ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;
	int fd = engine->config.disk_fd;

	if (fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)len) == 0)
		return VIRTIO_BLK_S_OK;
	if (!is_refused(errno))
		return host_error(engine);
	while (len > 0) {
		uint64_t here = len < ZERO_CHUNK_BYTES ? len : ZERO_CHUNK_BYTES;
		struct iovec iov = {.iov_base = (void *)(uintptr_t)zero_chunk, .iov_len = here};

		if (transfer(fd, true, &iov, 1, offset, here) != here)
			return host_error(engine);
		offset += here;
		len -= here;
	}
	return VIRTIO_BLK_S_OK;
}

/* VIRTIO 1.2, 5.2.6.2: a reserved flag is UNSUPP, and so is unmap on a discard. */
static uint8_t check_segment(struct blk_engine *engine, bool is_discard,
			     const struct virtio_blk_discard_write_zeroes *segment)
{
	/* Guest-controlled: *segment (a private copy). */
	uint32_t allowed = is_discard ? 0 : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
	uint32_t limit = is_discard ? BLK_MAX_DISCARD_SECTORS : BLK_MAX_WRITE_ZEROES_SECTORS;

	if (segment->flags & ~allowed)
		return VIRTIO_BLK_S_UNSUPP;
	if (segment->num_sectors > limit ||
	    !is_on_disk(engine, segment->sector, segment->num_sectors))
		return VIRTIO_BLK_S_IOERR;
	return VIRTIO_BLK_S_OK;
}

static uint8_t submit_ranges(struct blk_engine *engine, struct blk_request *req, bool is_discard)
{
	/* Guest-controlled: the segments, copied once, then checked, then used. */
	struct virtio_blk_discard_write_zeroes segments[BLK_MAX_DISCARD_SEGMENTS];
	uint32_t limit = is_discard ? BLK_MAX_DISCARD_SEGMENTS : BLK_MAX_WRITE_ZEROES_SEGMENTS;
	uint32_t n = req->out_len / (uint32_t)sizeof(segments[0]);
	uint8_t status = VIRTIO_BLK_S_OK;

	if (engine->config.is_read_only || n == 0 || n > limit ||
	    req->out_len % sizeof(segments[0]) != 0)
		return VIRTIO_BLK_S_IOERR;
	iov_copy_out(req->out, req->n_out, 0, segments, req->out_len);
	/* All are checked before any is carried out: a refused request changes nothing. */
	for (uint32_t i = 0; i < n && status == VIRTIO_BLK_S_OK; i++)
		status = check_segment(engine, is_discard, &segments[i]);
	for (uint32_t i = 0; i < n && status == VIRTIO_BLK_S_OK; i++) {
		uint64_t offset = segments[i].sector * BLK_SECTOR_BYTES;
		uint64_t len = (uint64_t)segments[i].num_sectors * BLK_SECTOR_BYTES;
		bool may_unmap = segments[i].flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

		if (len == 0) /* fallocate(2) calls that an error */
			continue;
		status = is_discard ? discard_range(engine, offset, len)
				    : zero_range(engine, offset, len, may_unmap);
	}
	engine_count(is_discard ? &engine->stats.discards : &engine->stats.write_zeroes, 1);
	return finish_write(engine, status);
}

static uint8_t blk_request_submit(struct blk_engine *engine, struct blk_request *req)
{
	/* Guest-controlled: req->type, req->sector and the lengths, all private copies. */
	if (!req->has_header)
		return VIRTIO_BLK_S_IOERR;
	switch (req->type) {
	case VIRTIO_BLK_T_IN:
		return submit_read(engine, req);
	case VIRTIO_BLK_T_OUT:
		return submit_write(engine, req);
	case VIRTIO_BLK_T_FLUSH:
		engine_count(&engine->stats.flushes, 1);
		return sync_disk(engine);
	case VIRTIO_BLK_T_GET_ID:
		return submit_get_id(engine, req);
	case VIRTIO_BLK_T_DISCARD:
		return submit_ranges(engine, req, true);
	case VIRTIO_BLK_T_WRITE_ZEROES:
		return submit_ranges(engine, req, false);
	default:
		return VIRTIO_BLK_S_UNSUPP;
	}
}

/* The used length is what was written from the start of the writable part without a gap
 * (VIRTIO 1.2, 2.7.8.2), so the status byte counts only behind complete data. */
static void blk_request_complete(struct blk_engine *engine, const struct desc_chain *chain,
				 const struct blk_request *req, uint8_t status)
{
	uint32_t written = req->in_written;

	if (written == req->in_len)
		written++;
	if (status == VIRTIO_BLK_S_IOERR)
		engine_count(&engine->stats.errors, 1);
	else if (status == VIRTIO_BLK_S_UNSUPP)
		engine_count(&engine->stats.unsupported, 1);
	*(volatile uint8_t *)req->status = status;
	virtqueue_add_used(engine->config.vq, chain->head, written);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void publish(struct blk_engine *engine)
{
	engine->n_staged = 0;
	if (!virtqueue_publish(engine->config.vq) || engine->config.irq_fd < 0)
		return;
	engine_count(&engine->stats.interrupts, 1);
	engine_signal_fd(engine->config.irq_fd);
}

/* Whether a request may take long: what is staged must not wait for it. */
static bool is_slow(const struct blk_engine *engine, const struct blk_request *req)
{
	return (req->type != VIRTIO_BLK_T_IN && req->type != VIRTIO_BLK_T_OUT) ||
	       (req->type == VIRTIO_BLK_T_OUT && engine->config.is_writethrough) ||
	       req->out_len >= SLOW_REQUEST_BYTES || req->in_len >= SLOW_REQUEST_BYTES;
}

static void publish_if_due(struct blk_engine *engine)
{
	uint64_t now = now_ns();

	if (engine->n_staged++ == 0)
		engine->staged_since_ns = now;
	if (engine->n_staged >= BATCH_MAX_REQUESTS || now - engine->staged_since_ns > BATCH_MAX_NS)
		publish(engine);
}

int blk_engine_serve(struct blk_engine *engine)
{
	/* Guest-controlled: the ring and every request in it. */
	struct virtqueue *vq = engine->config.vq;
	struct desc_chain chain = {.iov = engine->iov, .max_iov = VIRTQUEUE_MAX_SIZE};
	struct blk_request req;
	int got = 0;

	do {
		virtqueue_disable_kick(vq);
		while (!engine_gate_is_wanted(&engine->gate) &&
		       (got = virtqueue_pop(vq, &chain)) > 0) {
			if (blk_request_parse(&chain, &req) < 0) {
				got = -EPROTO;
				break;
			}
			if (is_slow(engine, &req))
				publish(engine);
			blk_request_complete(engine, &chain, &req,
					     blk_request_submit(engine, &req));
			publish_if_due(engine);
		}
		publish(engine);
		if (got < 0) {
			vq->is_broken = true;
			return got;
		}
		if (engine_gate_is_wanted(&engine->gate))
			return 1;
	} while (virtqueue_enable_kick(vq));
	return 0;
}

static int wait_for_kick(struct blk_engine *engine)
{
	struct pollfd fds[2] = {
	    {.fd = engine->config.kick_fd, .events = POLLIN},
	    {.fd = engine->gate.wake_fd, .events = POLLIN},
	};

	if (poll(fds, 2, -1) < 0)
		return errno == EINTR ? 0 : -errno;
	if ((fds[0].revents | fds[1].revents) & POLLNVAL)
		return -EBADF; /* an fd was closed under us: waiting on would spin */
	if (fds[0].revents) {
		engine_drain_fd(fds[0].fd);
		engine_count(&engine->stats.kicks, 1);
	}
	if (fds[1].revents)
		engine_drain_fd(fds[1].fd);
	return 0;
}

int blk_engine_run(struct blk_engine *engine)
{
	int ret = engine_gate_enter(&engine->gate);

	if (ret < 0)
		return ret;
	/* The ring is looked at first: it may hold chains whose kick was drained before a
	 * quiesce, or came before the engine existed. */
	while (ret >= 0 && !engine_gate_checkpoint(&engine->gate)) {
		ret = blk_engine_serve(engine);
		if (ret == 0)
			ret = wait_for_kick(engine);
	}
	if (ret == -EPROTO) {
		__atomic_store_n(&engine->fault, (uint32_t)ENGINE_FAULT_RING, __ATOMIC_RELEASE);
		engine_signal_fd(engine->config.fault_fd);
	}
	engine_gate_leave(&engine->gate);
	return ret < 0 ? ret : 0;
}

struct engine_gate *blk_engine_gate(struct blk_engine *engine)
{
	return &engine->gate;
}

int blk_engine_set_size(struct blk_engine *engine, uint64_t size_sectors)
{
	if (size_sectors > BLK_MAX_SECTORS)
		return -EINVAL;
	__atomic_store_n(&engine->size_sectors, size_sectors, __ATOMIC_RELAXED);
	return 0;
}

int blk_engine_fault(const struct blk_engine *engine)
{
	return (int)__atomic_load_n(&engine->fault, __ATOMIC_ACQUIRE);
}

void blk_engine_stats(const struct blk_engine *engine, struct blk_stats *ret)
{
	engine_copy_counters(ret, &engine->stats, sizeof(*ret));
}
