/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* Input: setup byte, image length, image, then packets that arrive and mutations, with a
 * look at tap and rings between. A socket pair stands for the tap. A large receive ring,
 * on request, is filled by the harness: it would not fit an input. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdbool.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest.h"
#include "net_engine.h"

static int tap[2]; /* the engine's end, the wire */
static int event_fd = -1;

/* 64 KiB for a receive ring of 1024 entries and what its buffers point to. */
#define LARGE_GPA 0x100000u
#define LARGE_SIZE 0x10000u
#define LARGE_AVAIL (LARGE_GPA + 0x4000u)
#define LARGE_USED (LARGE_GPA + 0x5000u)
#define LARGE_DATA (LARGE_GPA + 0x8000u)

/* Offer one chain of n_desc buffers of len bytes again and again. */
static void fill_large_ring(struct guest_mem *mem, struct input *input)
{
	struct guest_region *region = &mem->regions[mem->n_regions++];
	uint16_t n_desc = (uint16_t)(next_u16(input) % 1024 + 1);
	uint16_t len = (uint16_t)(next_u16(input) % 0x4000);
	uint16_t offered = next_u16(input) % 1025;
	struct vring_desc *desc;

	*region = (struct guest_region){LARGE_GPA, LARGE_SIZE, aligned_alloc(4096, LARGE_SIZE)};
	memset(region->hva, 0, LARGE_SIZE);
	desc = (struct vring_desc *)(void *)region->hva;
	for (uint16_t i = 0; i < n_desc; i++) {
		desc[i].addr = LARGE_DATA + i;
		desc[i].len = len;
		desc[i].flags = VRING_DESC_F_WRITE;
		if (i + 1 < n_desc)
			desc[i].flags |= VRING_DESC_F_NEXT;
		desc[i].next = (uint16_t)(i + 1);
	}
	memcpy(region->hva + (LARGE_AVAIL - LARGE_GPA) + 2, &offered, sizeof(offered));
}

static void empty(int fd)
{
	static uint8_t buf[1 << 17];

	while (recv(fd, buf, sizeof(buf), MSG_DONTWAIT) > 0)
		;
}

static void arrive(struct input *input)
{
	static uint8_t packet[0x10100];

	size_t length = next_u16(input) + 1u; /* never empty: that is a peer that hung up */

	for (int n = next_byte(input) & 31; n >= 0; n--)
		if (send(tap[1], packet, length, MSG_DONTWAIT) < 0)
			REQUIRE(errno == EAGAIN);
}

static void run(struct virtqueue *vqs, struct guest_mem *mem, uint8_t setup, struct input *input)
{
	/* Small enough that a few packets of an input meet it. */
	struct rate_limit limit = {
	    .bytes_per_s = setup & 16 ? 100 : 0,
	    .bytes_burst = 3000,
	    .ops_per_s = setup & 32 ? 10 : 0,
	    .ops_burst = 3,
	};
	struct rate_limiter limiter;
	struct net_config config = {
	    .rx = &vqs[0],
	    .tx = &vqs[1],
	    .tap_fd = tap[0],
	    .rx_kick_fd = event_fd,
	    .tx_kick_fd = event_fd,
	    .rx_irq_fd = event_fd,
	    .tx_irq_fd = event_fd,
	    .fault_fd = event_fd,
	    .tx_limiter = &limiter,
	    .rx_limiter = &limiter,
	    .is_mergeable = setup & 4,
	};
	struct net_engine *engine;
	int served = 0;

	rate_limiter_init(&limiter);
	REQUIRE(rate_limiter_set(&limiter, &limit, 0) == 0);
	REQUIRE(net_engine_create(&config, &engine) == 0);
	for (int round = 0; round < 12 && served >= 0; round++) {
		uint8_t op = next_byte(input);

		if (op & 1)
			arrive(input);
		if (op & 2)
			guest_mutate(mem, input);
		engine_signal_fd(event_fd); /* a kick, so that an empty ring is looked at again */
		REQUIRE(net_engine_wait(engine, 0) == 0);
		served = net_engine_serve(engine);
		REQUIRE(served >= 0 || served == -EPROTO);
		for (int i = 0; i < 2 && served >= 0; i++)
			REQUIRE(vqs[i].next_avail == vqs[i].next_used);
		if (input->left == 0)
			break;
	}
	REQUIRE(net_engine_destroy(engine) == 0);
	rate_limiter_deinit(&limiter);
	empty(tap[0]);
	empty(tap[1]);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	int sndbuf = 4 << 20;

	(void)argc;
	(void)argv;
	event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	REQUIRE(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, tap) == 0);
	return setsockopt(tap[1], SOL_SOCKET, SO_SNDBUF, &sndbuf, sizeof(sndbuf));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {data, size};
	uint8_t setup = next_byte(&input);
	uint16_t image = next_u16(&input) % 0x800;
	bool is_large = setup & 8;
	uint64_t features = (uint64_t)1 << VIRTIO_RING_F_INDIRECT_DESC |
			    (uint64_t)(setup & 1) << VIRTIO_RING_F_EVENT_IDX;
	struct virtqueue vqs[2];
	struct guest_mem mem;

	guest_init(&mem);
	next_bytes(&input, mem.regions[0].hva, image);
	for (uint64_t i = 0; i < 2; i++)
		REQUIRE(virtqueue_init(&vqs[i], &mem, 8, DESC_GPA + i * SECOND_RING,
				       AVAIL_GPA + i * SECOND_RING, USED_GPA + i * SECOND_RING,
				       features) == 0);
	if (is_large) {
		fill_large_ring(&mem, &input);
		REQUIRE(virtqueue_init(&vqs[0], &mem, 1024, LARGE_GPA, LARGE_AVAIL, LARGE_USED,
				       features) == 0);
	}
	run(vqs, &mem, setup, &input);
	if (is_large)
		free(mem.regions[2].hva);
	guest_deinit(&mem);
	return 0;
}
