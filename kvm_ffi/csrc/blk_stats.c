/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#include "blk_stats.h"

#include <stddef.h>

#include "engine.h"

static void count_request(struct blk_queue_stats *stats, const struct blk_request *req)
{
	static const size_t counter[] = {
	    [VIRTIO_BLK_T_IN] = offsetof(struct blk_queue_stats, reads),
	    [VIRTIO_BLK_T_OUT] = offsetof(struct blk_queue_stats, writes),
	    [VIRTIO_BLK_T_FLUSH] = offsetof(struct blk_queue_stats, flushes),
	    [VIRTIO_BLK_T_GET_ID] = offsetof(struct blk_queue_stats, get_ids),
	    [VIRTIO_BLK_T_DISCARD] = offsetof(struct blk_queue_stats, discards),
	    [VIRTIO_BLK_T_WRITE_ZEROES] = offsetof(struct blk_queue_stats, write_zeroes),
	};

	if (req->status == VIRTIO_BLK_S_IOERR)
		engine_count(&stats->errors, 1);
	else if (req->status == VIRTIO_BLK_S_UNSUPP)
		engine_count(&stats->unsupported, 1);
	if (req->host_errno)
		engine_count(&stats->host_errors, 1);
	if (!req->is_accepted)
		return;
	engine_count((void *)((uint8_t *)stats + counter[req->type]), 1);
	if (req->type == VIRTIO_BLK_T_IN)
		engine_count(&stats->read_bytes, req->done_bytes);
	else if (req->type == VIRTIO_BLK_T_OUT)
		engine_count(&stats->write_bytes, req->done_bytes);
}

static void count_latency(struct blk_queue_stats *stats, uint64_t took_ns)
{
	uint64_t units = took_ns >> BLK_LATENCY_SHIFT;
	uint32_t bucket = units == 0 ? 0 : 64u - (uint32_t)__builtin_clzll(units);

	if (bucket >= BLK_LATENCY_BUCKETS)
		bucket = BLK_LATENCY_BUCKETS - 1;
	engine_count(&stats->latency[bucket], 1);
}

void blk_stats_count(struct blk_queue_stats *stats, const struct blk_request *req, uint64_t took_ns)
{
	count_request(stats, req);
	count_latency(stats, took_ns);
}
