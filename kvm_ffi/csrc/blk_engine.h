/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * A disk's engine: one thread that serves all its virtqueues (VIRTIO 1.2, 5.2.6).
 *
 * One thread, because then a disk costs the same however many vCPUs there are, one wait and one
 * system call serve all queues, and what a failed sync means for everyone needs no lock.
 * Nothing is allocated after blk_engine_create() but the back end's own things.
 */
#ifndef HOSTEL_BLK_ENGINE_H
#define HOSTEL_BLK_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "blk_io.h"
#include "blk_request.h"
#include "blk_stats.h"
#include "engine.h"
#include "rate_group.h"
#include "virtqueue.h"

/* Of all queues together. More waits in the rings, where it costs nothing. */
#define BLK_MAX_IN_FLIGHT 256
/* What carries operations out. */
enum blk_io_engine {
	BLK_IO_AUTO, /* io_uring where the host permits it, else threads; also: not running yet */
	BLK_IO_URING,
	BLK_IO_THREADS,
};

struct blk_queue_config {
	struct virtqueue *vq;
	int kick_fd;
	int irq_fd; /* -1: the driver polls */
};

struct blk_config {
	uint64_t size_sectors;
	int disk_fd;
	int fault_fd;
	bool is_read_only;
	bool is_writethrough; /* the driver did not negotiate FLUSH: every write is durable */
	uint8_t serial[BLK_SERIAL_BYTES];
	enum blk_io_engine io_engine;
	struct rate_limiter *limiter; /* or NULL */
	struct rate_group *group; /* whose budget it shares, or NULL */
	uint32_t n_queues;
	struct blk_queue_config queues[BLK_MAX_QUEUES];
	struct blk_io *io; /* a test's own back end, or NULL */
};

/* 0, or -errno. Virtqueues, limiter, group and fds stay the caller's and must outlive the engine.
 */
int blk_engine_create(const struct blk_config *config, struct blk_engine **ret);
/* -EBUSY while a thread is in blk_engine_run(). */
int blk_engine_destroy(struct blk_engine *engine);

/* Serve until stopped: 0 stopped, -EPROTO the ring broke (fault_fd was signalled, as it is for
 * what the host's file fails: see blk_engine_await_error()),
 * another -errno when the host failed. */
int blk_engine_run(struct blk_engine *engine);
/* Serve what is in the rings now, to the end; 1 when interrupted by the gate, 0 when empty,
 * -EPROTO, or -errno. */
int blk_engine_serve(struct blk_engine *engine);

struct engine_gate *blk_engine_gate(struct blk_engine *engine);
int blk_engine_set_size(struct blk_engine *engine, uint64_t size_sectors);
/* Make the file durable and use another one from now on, which stays the caller's as the first one
 * did. 0, or -EBUSY unless it is quiet (engine_gate_quiesce()), or -errno of a new file that is of
 * no use or an old one that lost writes; then it stays, and asked again it may be left. */
int blk_engine_set_file(struct blk_engine *engine, int disk_fd, uint64_t size_sectors);
int blk_engine_fault(const struct blk_engine *engine);
/* Why the host's file failed the last request that it did; 0: none yet. */
int blk_engine_host_errno(const struct blk_engine *engine);
/* Have fault_fd signalled for the next such request: once, and then it is to be asked again.
 * A new engine does that for the first one. */
void blk_engine_await_error(struct blk_engine *engine);
/* Which enum blk_io_engine runs; BLK_IO_AUTO before any has. */
int blk_engine_io(const struct blk_engine *engine);
/* fdatasync(2) calls of the disk. */
uint64_t blk_engine_syncs(const struct blk_engine *engine);
void blk_engine_queue_stats(const struct blk_engine *engine, uint32_t queue,
			    struct blk_queue_stats *ret);
/* 0, or why io_uring cannot be used here: -errno. */
int blk_io_uring_probe(void);

/* For back ends. */
void blk_engine_done(struct blk_engine *engine, struct blk_request *req, int64_t res);
void blk_engine_kicked(struct blk_engine *engine, uint32_t queue);
/* CLOCK_MONOTONIC: read now, or as last read. */
uint64_t blk_engine_update_now(struct blk_engine *engine);
uint64_t blk_engine_now(const struct blk_engine *engine);

#endif
