/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#include "virtqueue.h"

#include <errno.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "rings are read without swapping");

#define DESC_BYTES ((uint64_t)sizeof(struct vring_desc))
/* VIRTIO 1.2, 2.7: flags, idx, the ring, and the event field behind it. */
#define AVAIL_BYTES(size) (6 + 2 * (uint64_t)(size))
#define USED_BYTES(size) (6 + 8 * (uint64_t)(size))

int virtqueue_init(struct virtqueue *vq, const struct guest_mem *mem, uint16_t size,
		   uint64_t desc_gpa, uint64_t avail_gpa, uint64_t used_gpa, uint64_t features)
{
	/* Guest-controlled: size, desc_gpa, avail_gpa, used_gpa. */
	memset(vq, 0, sizeof(*vq));
	vq->is_broken = true; /* until every check below has passed */
	if (size == 0 || size > VIRTQUEUE_MAX_SIZE || (size & (size - 1)) != 0)
		return -EINVAL;
	if (desc_gpa % 16 != 0 || avail_gpa % 2 != 0 || used_gpa % 4 != 0)
		return -EINVAL;
	vq->mem = mem;
	vq->size = size;
	vq->desc = guest_mem_ptr(mem, desc_gpa, DESC_BYTES * size);
	vq->avail = guest_mem_ptr(mem, avail_gpa, AVAIL_BYTES(size));
	vq->used = guest_mem_ptr(mem, used_gpa, USED_BYTES(size));
	if (!vq->desc || !vq->avail || !vq->used)
		return -EFAULT;
	vq->used_event = &vq->avail->ring[size];
	vq->avail_event = (uint16_t *)(void *)&vq->used->ring[size];
	vq->has_event_idx = (features >> VIRTIO_RING_F_EVENT_IDX) & 1;
	vq->has_indirect = (features >> VIRTIO_RING_F_INDIRECT_DESC) & 1;
	vq->is_broken = false;
	return 0;
}

/* Copy a descriptor out of guest memory exactly once. An indirect table need not be
 * aligned, hence memcpy. The empty asm claims to change *desc, so the compiler cannot
 * drop the copy and read guest memory again after the checks. */
static void copy_desc(struct vring_desc *desc, const uint8_t *from)
{
	memcpy(desc, from, sizeof(*desc));
	__asm__ volatile("" : "+m"(*desc));
}

static int append_buffer(struct virtqueue *vq, struct desc_chain *chain,
			 const struct vring_desc *desc)
{
	/* Guest-controlled: desc (a private copy). */
	bool is_writable = desc->flags & VRING_DESC_F_WRITE;
	uint32_t n = chain->n_readable + chain->n_writable;
	void *hva;

	if (desc->len > UINT32_MAX - chain->readable_len - chain->writable_len)
		return -EPROTO;
	if (desc->len == 0)
		return 0; /* nothing to move, so no address to check */
	hva = guest_mem_ptr(vq->mem, desc->addr, desc->len);
	if (!hva || n >= chain->max_iov)
		return -EPROTO;
	chain->iov[n].iov_base = hva;
	chain->iov[n].iov_len = desc->len;
	if (is_writable) {
		chain->n_writable++;
		chain->writable_len += desc->len;
	} else {
		chain->n_readable++;
		chain->readable_len += desc->len;
	}
	return 0;
}

/* Follow a chain. The number of buffers is bounded by the queue size, as VIRTIO 1.2,
 * 2.7.5.3.1 bounds the driver, so a loop ends; only one table switch can happen. */
static int walk_chain(struct virtqueue *vq, uint16_t head, struct desc_chain *chain)
{
	/* Guest-controlled: head, every descriptor. */
	const uint8_t *table = vq->desc;
	uint32_t table_len = vq->size;
	uint32_t index = head;
	uint32_t left = vq->size;
	bool in_indirect = false;
	bool in_writable = false;

	for (;;) {
		struct vring_desc desc;
		bool is_writable;

		if (index >= table_len)
			return -EPROTO;
		copy_desc(&desc, table + DESC_BYTES * index);
		if (desc.flags & VRING_DESC_F_INDIRECT) {
			if (in_indirect || !vq->has_indirect || (desc.flags & VRING_DESC_F_NEXT))
				return -EPROTO;
			if (desc.len == 0 || desc.len % DESC_BYTES != 0)
				return -EPROTO;
			table_len = (uint32_t)(desc.len / DESC_BYTES);
			table = guest_mem_ptr(vq->mem, desc.addr, desc.len);
			if (!table || table_len > vq->size)
				return -EPROTO;
			in_indirect = true;
			index = 0;
			continue;
		}
		is_writable = desc.flags & VRING_DESC_F_WRITE;
		if (in_writable && !is_writable)
			return -EPROTO; /* VIRTIO 1.2, 2.7.4.2: readable ones come first */
		in_writable = is_writable;
		if (left-- == 0 || append_buffer(vq, chain, &desc) < 0)
			return -EPROTO;
		if (!(desc.flags & VRING_DESC_F_NEXT))
			return 0;
		index = desc.next;
	}
}

/* Read avail->idx; false when it claims more than the ring can hold. */
static bool refresh_avail(struct virtqueue *vq)
{
	/* Guest-controlled: avail->idx. Acquire pairs with the driver's write barrier
	 * between filling avail->ring and the descriptors and moving avail->idx. */
	uint16_t idx = __atomic_load_n(&vq->avail->idx, __ATOMIC_ACQUIRE);

	if ((uint16_t)(idx - vq->next_avail) > vq->size)
		return false;
	vq->avail_seen = idx;
	return true;
}

int virtqueue_pop(struct virtqueue *vq, struct desc_chain *chain)
{
	/* Guest-controlled: avail->idx, avail->ring, every descriptor. */
	uint16_t head;

	if (vq->is_broken)
		return -EPROTO;
	if (vq->next_avail == vq->avail_seen && !refresh_avail(vq))
		goto broken;
	if (vq->next_avail == vq->avail_seen)
		return 0;
	/* More chains in flight than descriptors exist: the driver reused one that it
	 * does not own. The bound also keeps used->ring from overtaking itself. */
	if ((uint16_t)(vq->next_avail - vq->next_used) >= vq->size)
		goto broken;
	head = __atomic_load_n(&vq->avail->ring[vq->next_avail & (vq->size - 1)], __ATOMIC_RELAXED);
	chain->head = head;
	chain->n_readable = chain->n_writable = 0;
	chain->readable_len = chain->writable_len = 0;
	if (walk_chain(vq, head, chain) < 0)
		goto broken;
	vq->next_avail++;
	return 1;
broken:
	vq->is_broken = true;
	return -EPROTO;
}

void virtqueue_unpop(struct virtqueue *vq, uint16_t n)
{
	vq->next_avail = (uint16_t)(vq->next_avail - n);
}

void virtqueue_add_used(struct virtqueue *vq, uint16_t head, uint32_t written)
{
	struct vring_used_elem *elem = &vq->used->ring[vq->next_used & (vq->size - 1)];

	__atomic_store_n(&elem->id, (uint32_t)head, __ATOMIC_RELAXED);
	__atomic_store_n(&elem->len, written, __ATOMIC_RELAXED);
	vq->next_used++;
}

int virtqueue_publish(struct virtqueue *vq)
{
	/* Guest-controlled: used_event, avail->flags. Any value is safe: it only decides
	 * whether the guest gets an interrupt. */
	uint16_t old = vq->published_used;
	uint16_t new = vq->next_used;
	bool wants;

	if (old == new)
		return 0;
	/* Release pairs with the driver's read barrier between used->idx and used->ring:
	 * who sees the index sees the elements and the data. */
	__atomic_store_n(&vq->used->idx, new, __ATOMIC_RELEASE);
	vq->published_used = new;
	/* Pairs with the driver's full barrier between writing used_event (or clearing
	 * NO_INTERRUPT) and its last look at used->idx: one of the two sees the other. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (vq->has_event_idx)
		wants =
		    vring_need_event(__atomic_load_n(vq->used_event, __ATOMIC_RELAXED), new, old);
	else
		wants = !(__atomic_load_n(&vq->avail->flags, __ATOMIC_RELAXED) &
			  VRING_AVAIL_F_NO_INTERRUPT);
	wants = wants || vq->must_interrupt;
	vq->must_interrupt = false;
	return wants;
}

int virtqueue_enable_kick(struct virtqueue *vq)
{
	/* Guest-controlled: avail->idx, compared only. */
	if (vq->is_broken)
		return 0;
	if (vq->has_event_idx)
		__atomic_store_n(vq->avail_event, vq->next_avail, __ATOMIC_RELAXED);
	else
		__atomic_store_n(&vq->used->flags, (uint16_t)0, __ATOMIC_RELAXED);
	/* Pairs with the driver's full barrier between moving avail->idx and reading
	 * avail_event or used->flags: it sees the wish, or we see its chain. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return __atomic_load_n(&vq->avail->idx, __ATOMIC_RELAXED) != vq->next_avail;
}

void virtqueue_disable_kick(struct virtqueue *vq)
{
	/* With EVENT_IDX the stale avail_event, behind avail->idx, already says so. */
	if (!vq->has_event_idx)
		__atomic_store_n(&vq->used->flags, (uint16_t)VRING_USED_F_NO_NOTIFY,
				 __ATOMIC_RELAXED);
}

int virtqueue_set_state(struct virtqueue *vq, uint16_t next_avail, uint16_t next_used)
{
	if ((uint16_t)(next_avail - next_used) > vq->size)
		return -EINVAL;
	vq->next_avail = vq->avail_seen = next_avail;
	vq->next_used = vq->published_used = next_used;
	vq->must_interrupt = true;
	return 0;
}

size_t iov_copy_out(const struct iovec *iov, uint32_t n_iov, size_t offset, void *buf, size_t len)
{
	/* Guest-controlled: the bytes. The iovecs are checked copies. */
	size_t done = 0;

	for (uint32_t i = 0; i < n_iov && done < len; i++) {
		size_t here = iov[i].iov_len;

		if (offset >= here) {
			offset -= here;
			continue;
		}
		here -= offset;
		if (here > len - done)
			here = len - done;
		memcpy((uint8_t *)buf + done, (const uint8_t *)iov[i].iov_base + offset, here);
		done += here;
		offset = 0;
	}
	return done;
}

size_t iov_copy_in(const struct iovec *iov, uint32_t n_iov, size_t offset, const void *buf,
		   size_t len)
{
	size_t done = 0;

	for (uint32_t i = 0; i < n_iov && done < len; i++) {
		size_t here = iov[i].iov_len;

		if (offset >= here) {
			offset -= here;
			continue;
		}
		here -= offset;
		if (here > len - done)
			here = len - done;
		memcpy((uint8_t *)iov[i].iov_base + offset, (const uint8_t *)buf + done, here);
		done += here;
		offset = 0;
	}
	return done;
}

void iov_drop_front(struct iovec **iov, uint32_t *n_iov, size_t len)
{
	while (*n_iov > 0 && len >= (*iov)->iov_len) {
		len -= (*iov)->iov_len;
		(*iov)++;
		(*n_iov)--;
	}
	if (*n_iov > 0 && len > 0) {
		(*iov)->iov_base = (uint8_t *)(*iov)->iov_base + len;
		(*iov)->iov_len -= len;
	}
}
