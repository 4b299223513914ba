/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* Input: setup byte, three ring addresses, image length, image, then operations. */
#include <errno.h>

#include "guest.h"

static uint64_t features_of(uint8_t setup)
{
	return (uint64_t)(setup & 1) << VIRTIO_RING_F_EVENT_IDX |
	       (uint64_t)(setup >> 1 & 1) << VIRTIO_RING_F_INDIRECT_DESC;
}

/* Touch every byte of a chain, as a device may. */
static void use_chain(const struct desc_chain *chain)
{
	static uint8_t buf[LOW_SIZE + HIGH_SIZE];
	size_t got = iov_copy_out(chain->iov, chain->n_readable, 1, buf, sizeof(buf));

	REQUIRE(chain->readable_len == 0 || got <= chain->readable_len - 1);
	got = iov_copy_in(chain->iov + chain->n_readable, chain->n_writable, 0, buf, 1);
	REQUIRE(got <= 1);
}

static void run(struct virtqueue *vq, const struct guest_mem *mem, struct input *input)
{
	struct iovec *iov = malloc(vq->size * sizeof(*iov));
	struct desc_chain chain = {.iov = iov, .max_iov = vq->size};
	uint16_t heads[VIRTQUEUE_MAX_SIZE];
	uint32_t in_flight = 0;

	for (int ops = 0; ops < 64 && input->left > 0; ops++) {
		switch (next_byte(input) % 7) {
		case 0:
		case 1:
			if (virtqueue_pop(vq, &chain) == 1) {
				REQUIRE(in_flight < vq->size && chain.head < vq->size);
				guest_check_chain(mem, &chain, vq->size);
				use_chain(&chain);
				heads[in_flight++] = chain.head;
			}
			break;
		case 2:
			if (in_flight > 0)
				virtqueue_add_used(vq, heads[--in_flight], next_u16(input));
			break;
		case 6:
			if (in_flight > 0) {
				in_flight--;
				virtqueue_unpop(vq, 1);
			}
			break;
		case 3:
			virtqueue_publish(vq);
			virtqueue_disable_kick(vq);
			break;
		case 4:
			virtqueue_enable_kick(vq);
			break;
		case 5:
			guest_mutate((struct guest_mem *)(uintptr_t)mem, input);
			break;
		}
		REQUIRE((uint16_t)(vq->next_avail - vq->next_used) == in_flight);
	}
	free(iov);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {data, size};
	uint8_t setup = next_byte(&input);
	/* Mostly where the seeds put the rings, sometimes anywhere. */
	uint16_t moved = next_u16(&input);
	uint64_t used = setup & 0x40 ? moved : USED_GPA;
	uint16_t image = next_u16(&input) % 0x800;
	struct guest_mem mem;
	struct virtqueue vq;

	guest_init(&mem);
	next_bytes(&input, mem.regions[0].hva, image);
	if (virtqueue_init(&vq, &mem, (uint16_t)(1u << (setup >> 2 & 7)), DESC_GPA,
			   setup & 0x20 ? moved : AVAIL_GPA, used, features_of(setup)) == 0)
		run(&vq, &mem, &input);
	guest_deinit(&mem);
	return 0;
}
