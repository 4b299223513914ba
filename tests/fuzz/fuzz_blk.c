/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* Input: setup byte, image length, image, then mutations with a look at the rings between, and in
 * the same stream what the host does with each operation. */
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
#define MAX_PENDING (BLK_MAX_IN_FLIGHT + 1)

static int disk_fd = -1;
static int event_fd = -1;

/* The file never grows or shrinks, whatever the guest asked for. */
static void check_disk(void)
{
	struct stat st;

	REQUIRE(fstat(disk_fd, &st) == 0 && st.st_size == DISK_SECTORS * BLK_SECTOR_BYTES);
}

/* A host that the input leads: it does an operation now or some turns later, in any order, in
 * part, or not at all. The guest rewrites its memory meanwhile. */
struct host {
	struct blk_io io;
	struct blk_engine *engine;
	struct input *input;
	struct guest_mem *mem;
	struct blk_file file;
	uint32_t n_pending;
	struct blk_request *pending[MAX_PENDING];
};

static int64_t host_execute(struct host *host, const struct blk_op *op)
{
	static const int errors[] = {EIO, ENOSPC, EOPNOTSUPP, EINVAL};
	uint8_t choice = next_byte(host->input);
	int64_t ret;

	REQUIRE(op->kind == BLK_OP_SYNC ||
		(op->len > 0 && op->offset + op->len <= DISK_SECTORS * BLK_SECTOR_BYTES));
	if (choice >= 0xf0)
		return -errors[choice & 3];
	ret = blk_file_execute(&host->file, op);
	/* A part of it, down to nothing at all. */
	if (choice >= 0xe0 && ret > 0 && op->kind != BLK_OP_ALLOCATE)
		ret = ret * (choice & 15) / 16;
	return ret;
}

static bool host_submit(struct blk_io *io, struct blk_request *req, int64_t *ret)
{
	struct host *host = (struct host *)(void *)io;

	if (next_byte(host->input) & 1) {
		REQUIRE(host->n_pending < MAX_PENDING);
		host->pending[host->n_pending++] = req;
		return false;
	}
	*ret = host_execute(host, &req->op);
	return true;
}

static int host_turn(struct blk_io *io, uint64_t timeout_ns)
{
	struct host *host = (struct host *)(void *)io;

	/* Who waits for nothing waits for ever. */
	REQUIRE(host->n_pending > 0 || timeout_ns != BLK_IO_FOREVER);
	guest_mutate(host->mem, host->input);
	while (host->n_pending > 0) {
		uint32_t i = next_byte(host->input) % host->n_pending;
		struct blk_request *req = host->pending[i];

		host->pending[i] = host->pending[--host->n_pending];
		blk_engine_done(host->engine, req, host_execute(host, &req->op));
		if (next_byte(host->input) & 1)
			break;
	}
	return 0;
}

static void run(struct virtqueue *vqs, struct guest_mem *mem, uint8_t setup, struct input *input)
{
	struct host host = {
	    .io = {.submit = host_submit, .turn = host_turn},
	    .input = input,
	    .mem = mem,
	    .file = {.fd = disk_fd, .memory_align = 1, .offset_align = 1},
	};
	struct blk_config config = {
	    .size_sectors = DISK_SECTORS,
	    .disk_fd = disk_fd,
	    .fault_fd = event_fd,
	    .is_read_only = setup & 4,
	    .is_writethrough = setup & 8,
	    .n_queues = 2,
	    .queues = {{&vqs[0], event_fd, event_fd}, {&vqs[1], event_fd, -1}},
	    .io = &host.io,
	};
	struct blk_queue_stats stats;
	int served = 0;

	REQUIRE(blk_engine_create(&config, &host.engine) == 0);
	for (int round = 0; round < 8 && served == 0; round++) {
		served = blk_engine_serve(host.engine);
		REQUIRE(served == 0 || served == -EPROTO);
		REQUIRE(host.n_pending == 0);
		for (uint32_t i = 0; i < 2; i++) {
			blk_engine_queue_stats(host.engine, i, &stats);
			REQUIRE(stats.in_flight == 0);
			REQUIRE(vqs[i].next_avail == vqs[i].next_used || served < 0);
			REQUIRE(vqs[i].next_used == vqs[i].published_used);
		}
		if (input->left == 0)
			break;
		guest_mutate(mem, input);
	}
	REQUIRE(blk_engine_destroy(host.engine) == 0);
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
	struct virtqueue vqs[2];

	guest_init(&mem);
	next_bytes(&input, mem.regions[0].hva, image);
	for (uint32_t i = 0; i < 2; i++)
		REQUIRE(virtqueue_init(&vqs[i], &mem, 8, i * SECOND_RING + DESC_GPA,
				       i * SECOND_RING + AVAIL_GPA, i * SECOND_RING + USED_GPA,
				       (uint64_t)1 << VIRTIO_RING_F_INDIRECT_DESC |
					   (uint64_t)(setup & 1) << VIRTIO_RING_F_EVENT_IDX) == 0);
	run(vqs, &mem, setup, &input);
	guest_deinit(&mem);
	return 0;
}
