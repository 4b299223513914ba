/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* What a block engine counts for each of its queues. */
#ifndef HOSTEL_BLK_STATS_H
#define HOSTEL_BLK_STATS_H

#include <stdint.h>

#include "blk_request.h"

/* Bucket i counts requests that took less than 2^(BLK_LATENCY_SHIFT + i) ns, the last one all
 * that took longer. */
#define BLK_LATENCY_SHIFT 10
#define BLK_LATENCY_BUCKETS 24

struct blk_queue_stats {
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
	uint64_t kicks;
	uint64_t interrupts;
	uint64_t suppressed; /* batches that the driver wanted no interrupt for */
	uint64_t throttled; /* times that a request had to wait for a rate limit */
	uint64_t in_flight; /* now */
	uint64_t latency[BLK_LATENCY_BUCKETS];
};

/* Count a request that was answered, took_ns after it had begun. */
void blk_stats_count(struct blk_queue_stats *stats, const struct blk_request *req,
		     uint64_t took_ns);

#endif
