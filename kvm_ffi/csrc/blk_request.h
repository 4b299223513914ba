/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * One virtio-blk request (VIRTIO 1.2, 5.2.6), from the guest's bytes to its status.
 *
 * blk_request_parse() and blk_request_begin() turn a popped chain into checked numbers and
 * private copies; from then on nothing of the request is read from guest memory again.
 */
#ifndef HOSTEL_BLK_REQUEST_H
#define HOSTEL_BLK_REQUEST_H

#include <linux/virtio_blk.h>

#include "blk_io.h"
#include "virtqueue.h"

/* What the config space advertises and the engine holds the driver to. Many discard
 * segments or a huge one are cheap for the host; zeroes may have to be written out, so
 * one request is kept to 32 MiB of them: a quiesce waits for what is in flight. */
#define BLK_MAX_DISCARD_SEGMENTS 16
#define BLK_MAX_DISCARD_SECTORS (1u << 22)
#define BLK_MAX_WRITE_ZEROES_SEGMENTS 1
#define BLK_MAX_WRITE_ZEROES_SECTORS (1u << 16)
/* Descriptors may overlap, so a request could be 4 GiB in 64 MiB of RAM, and a quiesce would
 * wait for it. Honest drivers stay below by the config space's size_max and seg_max. */
#define BLK_MAX_REQUEST_BYTES (32u << 20)
#define BLK_SECTOR_BYTES 512u
#define BLK_SERIAL_BYTES 20u
/* A file offset is signed. */
#define BLK_MAX_SECTORS ((uint64_t)INT64_MAX / BLK_SECTOR_BYTES)
/* Most requests have few buffers; those with more share a few large arrays. */
#define BLK_SMALL_IOV 16
#define BLK_LARGE_IOVS 16

/* Storage for the buffers of a request that has many. */
struct blk_large_iov {
	struct blk_large_iov *next;
	struct iovec iov[VIRTQUEUE_MAX_SIZE];
};

/* What the requests of a disk have in common. */
struct blk_disk {
	struct blk_file file;
	uint64_t size_sectors; /* atomic: another thread may resize the disk */
	bool is_read_only;
	bool is_writethrough; /* the driver did not negotiate FLUSH: every write is durable */
	uint8_t serial[BLK_SERIAL_BYTES];
	struct blk_large_iov *large; /* BLK_LARGE_IOVS of them */
	struct blk_large_iov *free_large;
	uint32_t n_large_used; /* those behind were never touched, and cost no memory yet */
};

/* What is to be done for a request next. */
enum blk_next {
	BLK_NEXT_OP, /* op, then blk_request_advance() */
	BLK_NEXT_SYNC, /* make what was written durable, then answer */
	BLK_NEXT_DONE, /* answer with status */
	BLK_NEXT_LATER, /* nothing now: unpop it and begin again when another is done */
};

struct blk_request {
	struct blk_op op;
	struct blk_request *next; /* in whatever list it is */
	void *queue; /* the engine's */
	struct blk_large_iov *large;
	uint8_t *status_byte; /* in guest memory */
	uint64_t started_ns;
	uint64_t done_bytes; /* of data, in all operations so far */
	uint64_t zeroes_left; /* to be written out, the operation under way included */
	struct iovec zeroes;
	uint32_t type;
	uint32_t in_len; /* what the driver receives, before the status byte */
	uint32_t n_segments;
	uint32_t segment;
	uint32_t cost_bytes; /* what a limit of bytes counts */
	int32_t host_errno; /* why the host's file failed it, or 0 */
	uint16_t head;
	uint8_t status;
	bool is_accepted; /* reached the host, or needed nothing of it */
	bool must_be_alone; /* no other request may be under way */
	union {
		struct iovec iov[BLK_SMALL_IOV];
		struct virtio_blk_discard_write_zeroes segments[BLK_MAX_DISCARD_SEGMENTS];
	};
};

/* A popped chain's parts. */
struct blk_buffers {
	bool has_header;
	uint64_t sector;
	struct iovec *out; /* what the driver sent, behind the header */
	struct iovec *in; /* what the driver receives, before the status byte */
	uint32_t n_out;
	uint32_t n_in;
	uint32_t out_len;
};

/* 0, or -EPROTO: there is no place for a status, so it cannot be answered. */
int blk_request_parse(struct blk_request *req, const struct desc_chain *chain,
		      struct blk_buffers *ret);
/* Check it and find its first operation. Has no effect yet on disk or list but taking one of
 * disk->large, which blk_request_release() gives back. */
enum blk_next blk_request_begin(struct blk_disk *disk, struct blk_request *req,
				const struct blk_buffers *buffers);
/* res: bytes moved, 0 for what moves none, or -errno. */
enum blk_next blk_request_advance(struct blk_disk *disk, struct blk_request *req, int64_t res);
/* Note that what was done is durable, or with a negative res why it could not be made so. */
void blk_request_synced(struct blk_request *req, int64_t res);
/* Write the status byte; the used length (VIRTIO 1.2, 2.7.8.2). */
uint32_t blk_request_answer(const struct blk_request *req);
void blk_request_release(struct blk_disk *disk, struct blk_request *req);

#endif
