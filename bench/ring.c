/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* ring CASE FILE REQUESTS: a driver and the block engine in one thread and one memory; prints the
 * nanoseconds of CPU that a 4 KiB read takes, of the case's stages and all before them. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "blk_engine.h"

#define QUEUE_SIZE 256u
#define BATCH 32u
#define DATA_BYTES 4096u
#define MEMORY_BYTES (4u << 20)
#define RINGS_GPA 0x1000u
#define AVAIL_GPA (RINGS_GPA + 16 * QUEUE_SIZE)
#define USED_GPA (AVAIL_GPA + 0x1000)
#define HEADERS_GPA 0x10000u
#define STATUS_GPA 0x18000u
#define DATA_GPA 0x100000u

#define CHECK(claim)                                                                               \
	do {                                                                                       \
		if (!(claim)) {                                                                    \
			perror(#claim);                                                            \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

/* A disk that is done before it begins, at once or, as a real one, in the next turn. */
struct null_io {
	struct blk_io io;
	struct blk_engine *engine;
	bool is_deferred;
	uint32_t n_pending;
	struct blk_request *pending[BLK_MAX_IN_FLIGHT];
};

static bool null_submit(struct blk_io *io, struct blk_request *req, int64_t *ret)
{
	struct null_io *null = (struct null_io *)(void *)io;

	*ret = (int64_t)req->op.len;
	if (null->is_deferred)
		null->pending[null->n_pending++] = req;
	return !null->is_deferred;
}

static int null_turn(struct blk_io *io, uint64_t timeout_ns)
{
	struct null_io *null = (struct null_io *)(void *)io;

	(void)timeout_ns;
	while (null->n_pending > 0) {
		struct blk_request *req = null->pending[--null->n_pending];

		blk_engine_done(null->engine, req, (int64_t)req->op.len);
	}
	return 0;
}

struct bench {
	struct guest_mem mem;
	struct virtqueue vq;
	struct blk_engine *engine;
	struct blk_disk disk;
	struct vring_avail *avail;
	struct vring_used *used;
	uint16_t avail_idx;
	uint16_t used_seen;
	struct iovec iov[QUEUE_SIZE];
	struct blk_request req;
};

static void make_guest(struct bench *bench, uint64_t file_bytes)
{
	uint8_t *hva = aligned_alloc(4096, MEMORY_BYTES);
	struct vring_desc *desc = (void *)(hva + RINGS_GPA);

	CHECK(hva);
	memset(hva, 0, MEMORY_BYTES);
	bench->mem.n_regions = 1;
	bench->mem.regions[0] = (struct guest_region){0, MEMORY_BYTES, hva};
	bench->avail = (void *)(hva + AVAIL_GPA);
	bench->used = (void *)(hva + USED_GPA);
	for (uint16_t i = 0; i < BATCH; i++) {
		struct virtio_blk_outhdr *header = (void *)(hva + HEADERS_GPA + 16 * i);
		uint16_t first = (uint16_t)(3 * i);

		header->type = VIRTIO_BLK_T_IN;
		header->sector = (i * 7919u * DATA_BYTES % file_bytes) / BLK_SECTOR_BYTES;
		desc[first] = (struct vring_desc){HEADERS_GPA + 16u * i, 16, VRING_DESC_F_NEXT,
						  (uint16_t)(first + 1)};
		desc[first + 1] = (struct vring_desc){DATA_GPA + i * DATA_BYTES, DATA_BYTES,
						      VRING_DESC_F_NEXT | VRING_DESC_F_WRITE,
						      (uint16_t)(first + 2)};
		desc[first + 2] = (struct vring_desc){STATUS_GPA + i, 1, VRING_DESC_F_WRITE, 0};
	}
	CHECK(virtqueue_init(&bench->vq, &bench->mem, QUEUE_SIZE, RINGS_GPA, AVAIL_GPA, USED_GPA,
			     (uint64_t)1 << VIRTIO_RING_F_EVENT_IDX) == 0);
}

/* The driver's side of a batch: as much as Linux does to the rings, nothing else. */
static void offer(struct bench *bench)
{
	for (uint16_t i = 0; i < BATCH; i++)
		bench->avail->ring[(bench->avail_idx + i) % QUEUE_SIZE] = (uint16_t)(3 * i);
	bench->avail_idx = (uint16_t)(bench->avail_idx + BATCH);
	__atomic_store_n(&bench->avail->idx, bench->avail_idx, __ATOMIC_RELEASE);
}

static void take(struct bench *bench)
{
	const uint8_t *hva = bench->mem.regions[0].hva;
	uint16_t idx = __atomic_load_n(&bench->used->idx, __ATOMIC_ACQUIRE);

	CHECK((uint16_t)(idx - bench->used_seen) == BATCH);
	for (; bench->used_seen != idx; bench->used_seen++) {
		uint32_t head = bench->used->ring[bench->used_seen % QUEUE_SIZE].id;

		CHECK(hva[STATUS_GPA + head / 3] == VIRTIO_BLK_S_OK);
	}
}

static void driver_only(struct bench *bench)
{
	for (uint16_t i = 0; i < BATCH; i++)
		bench->used->ring[(bench->used_seen + i) % QUEUE_SIZE].id = 3u * i;
	bench->used->idx = (uint16_t)(bench->used->idx + BATCH);
}

static void ring_only(struct bench *bench)
{
	struct desc_chain chain = {.iov = bench->iov, .max_iov = QUEUE_SIZE};

	while (virtqueue_pop(&bench->vq, &chain) > 0)
		virtqueue_add_used(&bench->vq, chain.head, DATA_BYTES + 1);
	virtqueue_publish(&bench->vq);
}

static void ring_and_request(struct bench *bench)
{
	struct desc_chain chain = {.iov = bench->iov, .max_iov = QUEUE_SIZE};
	struct blk_buffers buffers;

	while (virtqueue_pop(&bench->vq, &chain) > 0) {
		CHECK(blk_request_parse(&bench->req, &chain, &buffers) == 0);
		CHECK(blk_request_begin(&bench->disk, &bench->req, &buffers) == BLK_NEXT_OP);
		CHECK(blk_request_advance(&bench->disk, &bench->req, DATA_BYTES) == BLK_NEXT_DONE);
		virtqueue_add_used(&bench->vq, chain.head, blk_request_answer(&bench->req));
	}
	virtqueue_publish(&bench->vq);
}

static void engine(struct bench *bench)
{
	CHECK(blk_engine_serve(bench->engine) == 0);
}

static const struct {
	const char *name;
	void (*serve)(struct bench *bench);
	enum blk_io_engine io_engine;
	bool is_null;
	bool is_deferred;
} cases[] = {
    {"driver", driver_only, BLK_IO_AUTO, true, false},
    {"ring", ring_only, BLK_IO_AUTO, true, false},
    {"request", ring_and_request, BLK_IO_AUTO, true, false},
    {"null", engine, BLK_IO_AUTO, true, false},
    {"deferred", engine, BLK_IO_AUTO, true, true},
    {"io_uring", engine, BLK_IO_URING, false, false},
    {"threads", engine, BLK_IO_THREADS, false, false},
};

static double cpu_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

int main(int argc, char **argv)
{
	static struct bench bench;
	static struct null_io null = {.io = {.submit = null_submit, .turn = null_turn}};
	long batches = argc > 3 ? strtol(argv[3], NULL, 10) / BATCH : 0;
	int fd = argc > 3 ? open(argv[2], O_RDONLY | O_CLOEXEC) : -1;
	off_t file_bytes = lseek(fd, 0, SEEK_END);
	size_t i = 0;
	double began;

	CHECK(file_bytes >= DATA_BYTES);
	while (i < sizeof(cases) / sizeof(cases[0]) && strcmp(cases[i].name, argv[1]) != 0)
		i++;
	CHECK(i < sizeof(cases) / sizeof(cases[0]));
	make_guest(&bench, (uint64_t)file_bytes);
	bench.disk.size_sectors = (uint64_t)file_bytes / BLK_SECTOR_BYTES;
	bench.disk.file = (struct blk_file){.fd = fd, .memory_align = 1, .offset_align = 1};
	null.is_deferred = cases[i].is_deferred;
	struct blk_config config = {
	    .size_sectors = bench.disk.size_sectors,
	    .disk_fd = fd,
	    .fault_fd = -1,
	    .is_read_only = true,
	    .io_engine = cases[i].io_engine,
	    .n_queues = 1,
	    .queues = {{&bench.vq, -1, -1}},
	    .io = cases[i].is_null ? &null.io : NULL,
	};
	CHECK(blk_engine_create(&config, &bench.engine) == 0);
	null.engine = bench.engine;
	began = cpu_ns();
	for (long n = 0; n < batches; n++) {
		offer(&bench);
		cases[i].serve(&bench);
		take(&bench);
	}
	printf("%.3f\n", (cpu_ns() - began) / (double)(batches * BATCH));
	return 0;
}
