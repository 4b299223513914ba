/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * Split virtqueues, the device's side (VIRTIO 1.2, 2.7), with indirect
 * descriptors and EVENT_IDX.
 *
 * Everything in a ring is guest-controlled and may change while it is read: each
 * index and each descriptor is copied once, checked, and only the copy is used.
 * One thread at a time may use a virtqueue.
 */
#ifndef HOSTEL_VIRTQUEUE_H
#define HOSTEL_VIRTQUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <linux/virtio_ring.h>
#include <sys/uio.h>

#include "guest_mem.h"

/* Also IOV_MAX: a whole chain always fits one preadv(2). */
#define VIRTQUEUE_MAX_SIZE 1024

/* One request: buffers that the driver filled, then buffers that the device fills. */
struct desc_chain {
	struct iovec *iov; /* caller's storage: readable entries first, then writable */
	uint32_t max_iov; /* its length; at least the queue's size */
	uint32_t n_readable;
	uint32_t n_writable;
	uint32_t readable_len; /* readable_len + writable_len <= UINT32_MAX */
	uint32_t writable_len;
	uint16_t head;
};

struct virtqueue {
	const struct guest_mem *mem;
	const uint8_t *desc; /* size * 16 bytes of guest memory */
	struct vring_avail *avail;
	struct vring_used *used;
	uint16_t *used_event; /* avail->ring[size]: the driver's wish, EVENT_IDX only */
	uint16_t *avail_event; /* after used->ring[size]: the device's wish */
	uint16_t size;
	uint16_t next_avail; /* the next entry of avail->ring to pop */
	uint16_t avail_seen; /* avail->idx as last read and checked */
	uint16_t next_used; /* the next entry of used->ring to fill */
	uint16_t published_used; /* used->idx as last stored */
	bool has_event_idx;
	bool has_indirect;
	bool must_interrupt; /* after a restore nobody knows what was signalled */
	bool is_broken; /* sticky: the driver broke the protocol */
};

/* 0, -EINVAL for a bad size or alignment, -EFAULT for a ring outside guest memory. */
int virtqueue_init(struct virtqueue *vq, const struct guest_mem *mem, uint16_t size,
		   uint64_t desc_gpa, uint64_t avail_gpa, uint64_t used_gpa, uint64_t features);

/* 1: *chain is filled; 0: the ring is empty; -EPROTO: broken, now and from now on. */
int virtqueue_pop(struct virtqueue *vq, struct desc_chain *chain);
/* Give the last n popped chains back, untouched; they will be popped again. */
void virtqueue_unpop(struct virtqueue *vq, uint16_t n);

/* Stage one used element; the driver sees it at virtqueue_publish(). */
void virtqueue_add_used(struct virtqueue *vq, uint16_t head, uint32_t written);
/* Show all staged elements; 1 if the driver wants an interrupt for them. */
int virtqueue_publish(struct virtqueue *vq);

/* Ask the driver (not) to kick. enable returns 1 when chains came meanwhile: then
 * no kick will come for them, and the caller must pop on. */
int virtqueue_enable_kick(struct virtqueue *vq);
void virtqueue_disable_kick(struct virtqueue *vq);

/* For snapshots, taken when nothing is staged: 0, or -EINVAL for an impossible pair. */
int virtqueue_set_state(struct virtqueue *vq, uint16_t next_avail, uint16_t next_used);

/* Copy between a buffer and iovecs, from an offset; bytes copied. */
size_t iov_copy_out(const struct iovec *iov, uint32_t n_iov, size_t offset, void *buf, size_t len);
size_t iov_copy_in(const struct iovec *iov, uint32_t n_iov, size_t offset, const void *buf,
		   size_t len);
/* Drop len bytes (at most all of them) from the front. */
void iov_drop_front(struct iovec **iov, uint32_t *n_iov, size_t len);

#endif
