/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * A guest with two vCPUs: one rewrites the ring, the descriptors and the request headers
 * as fast as it can, while the block engine serves them. Argument: rounds. Built with
 * AddressSanitizer; not with ThreadSanitizer, since racing is the point.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "blk_engine.h"
#include "guest.h"

#define DISK_SECTORS 64u

static uint32_t must_end;

/* xorshift32: repeatable enough, and fast. */
static uint32_t next_random(uint32_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 17;
	*state ^= *state << 5;
	return *state;
}

static void put_desc(struct guest_mem *mem, uint32_t index, uint64_t addr, uint32_t len,
		     uint16_t flags, uint16_t next)
{
	volatile struct vring_desc *desc =
	    (volatile struct vring_desc *)(void *)mem->regions[0].hva + index;

	desc->addr = addr;
	desc->len = len;
	desc->flags = flags;
	desc->next = next;
}

/* Flip every field between a good and a wild value, at random moments. */
static void *scribble(void *arg)
{
	static const uint64_t addrs[] = {0x800, 0x1000, LOW_SIZE - 1, HIGH_GPA, UINT64_MAX, 0};
	static const uint32_t lens[] = {16, 512, 1, 48, 0x700, UINT32_MAX};
	struct guest_mem *mem = arg;
	volatile uint16_t *avail = (volatile uint16_t *)(void *)(mem->regions[0].hva + AVAIL_GPA);
	volatile uint16_t *used = (volatile uint16_t *)(void *)(mem->regions[0].hva + USED_GPA);
	volatile uint32_t *header = (volatile uint32_t *)(void *)(mem->regions[0].hva + 0x600);
	uint32_t state = 0x9e3779b9;

	while (!__atomic_load_n(&must_end, __ATOMIC_RELAXED)) {
		uint32_t r = next_random(&state);

		/* Most rounds leave a request that could be served if it held still. */
		put_desc(mem, 0, 0x600, 16, VRING_DESC_F_NEXT, 1);
		put_desc(mem, 1, addrs[(r >> 5) % 6], lens[(r >> 9) % 6],
			 (uint16_t)(VRING_DESC_F_NEXT | (r >> 12 & VRING_DESC_F_WRITE)), 2);
		put_desc(mem, 2, 0x700, 1, VRING_DESC_F_WRITE, 0);
		if (r % 8 == 0)
			put_desc(mem, r >> 3 & 31, addrs[(r >> 8) % 6], lens[(r >> 11) % 6],
				 (uint16_t)(r >> 14 & 7), (uint16_t)((r >> 17) % 9));
		avail[2 + (r >> 20) % 8] = r % 32 == 1 ? 9 : 0;
		header[0] = (r >> 25) % 16;
		header[2] = r >> 22;
		/* At the pace of the device, or the index alone would break the ring. */
		if ((uint16_t)(avail[1] - used[1]) < 8 || r % 1024 == 5)
			avail[1]++;
	}
	return NULL;
}

int main(int argc, char **argv)
{
	int event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	int disk_fd = memfd_create("disk", MFD_CLOEXEC);
	long rounds = argc > 1 ? strtol(argv[1], NULL, 10) : 1000000;
	uint64_t served = 0, broken = 0;
	struct guest_mem mem;
	pthread_t guest;

	guest_init(&mem);
	REQUIRE(ftruncate(disk_fd, DISK_SECTORS * BLK_SECTOR_BYTES) == 0);
	REQUIRE(pthread_create(&guest, NULL, scribble, &mem) == 0);
	for (long round = 0; round < rounds; round++) {
		struct virtqueue vq;
		struct blk_engine *engine;
		/* A ring is made seldom: it takes longer than all else here. */
		struct blk_config config = {.size_sectors = DISK_SECTORS,
					    .disk_fd = disk_fd,
					    .fault_fd = event_fd,
					    .io_engine =
						round % 16 == 0 ? BLK_IO_AUTO : BLK_IO_THREADS,
					    .n_queues = 1,
					    .queues = {{&vq, event_fd, event_fd}}};
		uint16_t now = *(volatile uint16_t *)(void *)(mem.regions[0].hva + AVAIL_GPA + 2);
		int ret = 0;

		*(volatile uint16_t *)(void *)(mem.regions[0].hva + USED_GPA + 2) = now;
		REQUIRE(virtqueue_init(&vq, &mem, 8, DESC_GPA, AVAIL_GPA, USED_GPA,
				       (uint64_t)1 << VIRTIO_RING_F_INDIRECT_DESC) == 0);
		REQUIRE(virtqueue_set_state(&vq, now, now) == 0);
		REQUIRE(blk_engine_create(&config, &engine) == 0);
		for (int i = 0; i < 100 && ret == 0; i++)
			ret = blk_engine_serve(engine);
		served += (uint16_t)(vq.next_used - now);
		broken += ret == -EPROTO;
		REQUIRE(ret == 0 || ret == -EPROTO);
		REQUIRE(blk_engine_destroy(engine) == 0);
	}
	__atomic_store_n(&must_end, 1, __ATOMIC_RELAXED);
	pthread_join(guest, NULL);
	guest_deinit(&mem);
	printf("served=%llu broken=%llu\n", (unsigned long long)served, (unsigned long long)broken);
	return served > 0 && broken > 0 ? 0 : 1;
}
