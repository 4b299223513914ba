/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * virtio-blk requests (VIRTIO 1.2, 5.2.6) on a raw file or block device.
 *
 * A request is parsed (blk_request_parse: the guest's bytes become checked numbers),
 * then submitted (blk_request_submit: host I/O straight on guest memory), then
 * completed. Nothing is allocated after blk_engine_create().
 */
#ifndef HOSTEL_BLK_ENGINE_H
#define HOSTEL_BLK_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "engine.h"
#include "virtqueue.h"

/* What the config space advertises and the engine holds the driver to. Many discard
 * segments or a huge one are cheap for the host; zeroes may have to be written out, so
 * one request is kept to 32 MiB of them: a quiesce waits for at most one request. */
#define BLK_MAX_DISCARD_SEGMENTS 32
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

struct blk_stats {
	uint64_t reads;
	uint64_t writes;
	uint64_t flushes;
	uint64_t discards;
	uint64_t write_zeroes;
	uint64_t get_ids;
	uint64_t read_bytes;
	uint64_t write_bytes;
	uint64_t errors; /* answered with IOERR */
	uint64_t unsupported; /* answered with UNSUPP */
	uint64_t host_errors; /* of the errors: those that the host's file gave */
	uint64_t syncs; /* fdatasync calls */
	uint64_t kicks;
	uint64_t interrupts;
};

struct blk_config {
	struct virtqueue *vq;
	uint64_t size_sectors;
	int disk_fd;
	int kick_fd;
	int irq_fd; /* -1: the driver polls */
	int fault_fd;
	bool is_read_only;
	bool is_writethrough; /* the driver did not negotiate FLUSH: every write is durable */
	uint8_t serial[BLK_SERIAL_BYTES];
};

struct blk_engine;

/* 0, or -errno. The virtqueue and the fds stay the caller's and must outlive the engine. */
int blk_engine_create(const struct blk_config *config, struct blk_engine **ret);
/* -EBUSY while a thread is in blk_engine_run(). */
int blk_engine_destroy(struct blk_engine *engine);

/* Serve until stopped: 0 stopped, -EPROTO the ring broke (fault_fd was signalled),
 * another -errno when the host failed. */
int blk_engine_run(struct blk_engine *engine);
/* Serve what is in the ring now; 1 when interrupted by the gate, 0 when empty, -EPROTO. */
int blk_engine_serve(struct blk_engine *engine);

struct engine_gate *blk_engine_gate(struct blk_engine *engine);
int blk_engine_set_size(struct blk_engine *engine, uint64_t size_sectors);
int blk_engine_fault(const struct blk_engine *engine);
void blk_engine_stats(const struct blk_engine *engine, struct blk_stats *ret);

#endif
