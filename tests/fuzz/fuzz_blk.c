/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* Input: setup byte, image length, image, then mutations with a look at the ring between. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "blk_engine.h"
#include "guest.h"

#define DISK_SECTORS 64u

static int disk_fd = -1;
static int event_fd = -1;

/* The file never grows or shrinks, whatever the guest asked for. */
static void check_disk(void)
{
	struct stat st;

	REQUIRE(fstat(disk_fd, &st) == 0 && st.st_size == DISK_SECTORS * BLK_SECTOR_BYTES);
}

static void run(struct virtqueue *vq, struct guest_mem *mem, uint8_t setup, struct input *input)
{
	struct blk_config config = {
	    .vq = vq,
	    .size_sectors = DISK_SECTORS,
	    .disk_fd = disk_fd,
	    .kick_fd = event_fd,
	    .irq_fd = event_fd,
	    .fault_fd = event_fd,
	    .is_read_only = setup & 4,
	    .is_writethrough = setup & 8,
	};
	struct blk_engine *engine;
	int served = 0;

	REQUIRE(blk_engine_create(&config, &engine) == 0);
	for (int round = 0; round < 8 && served == 0; round++) {
		served = blk_engine_serve(engine);
		REQUIRE(served == 0 || served == -EPROTO);
		REQUIRE(served < 0 || vq->next_avail == vq->next_used);
		if (input->left == 0)
			break;
		guest_mutate(mem, input);
	}
	REQUIRE(blk_engine_destroy(engine) == 0);
	check_disk();
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	disk_fd = memfd_create("disk", MFD_CLOEXEC);
	event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return ftruncate(disk_fd, DISK_SECTORS * BLK_SECTOR_BYTES);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {data, size};
	uint8_t setup = next_byte(&input);
	uint16_t image = next_u16(&input) % 0x800;
	struct guest_mem mem;
	struct virtqueue vq;

	guest_init(&mem);
	next_bytes(&input, mem.regions[0].hva, image);
	REQUIRE(virtqueue_init(&vq, &mem, 8, DESC_GPA, AVAIL_GPA, USED_GPA,
			       (uint64_t)1 << VIRTIO_RING_F_INDIRECT_DESC |
				   (uint64_t)(setup & 1) << VIRTIO_RING_F_EVENT_IDX) == 0);
	run(&vq, &mem, setup, &input);
	guest_deinit(&mem);
	return 0;
}
