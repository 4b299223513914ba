/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* What a block engine is made of: for blk_engine.c, its thread, and blk_control.c, all others. */
#ifndef HOSTEL_BLK_ENGINE_PRIV_H
#define HOSTEL_BLK_ENGINE_PRIV_H

#include "blk_engine.h"

struct blk_queue {
	struct virtqueue *vq;
	int irq_fd;
	bool is_empty; /* as the last look showed: ask for a kick before waiting */
	bool is_staged; /* there are used elements to publish */
	struct blk_queue_stats stats;
};

struct blk_engine {
	struct engine_gate gate;
	struct blk_disk disk;
	struct blk_listen listen;
	struct blk_io *io;
	struct rate_limiter *limiter;
	struct rate_member member; /* of the group whose budget it shares */
	int fault_fd;
	enum blk_io_engine wanted_io;
	uint32_t running_io; /* atomic: enum blk_io_engine */
	uint32_t fault; /* atomic: enum engine_fault */
	uint32_t host_errno; /* atomic: of the last request that the host's file failed */
	uint32_t is_error_awaited; /* atomic: the next such request is told by fault_fd */
	bool is_broken; /* a driver broke its ring: answer what is in flight, begin nothing */
	bool must_be_alone; /* of one that runs, or waits until nothing is in flight */
	bool has_lost_writes; /* a sync failed: nothing is durable any more */
	bool has_own_io; /* a test's back end, not ours to close */
	bool has_new_file; /* io does not know it yet; written while the thread is parked */
	uint32_t next_queue; /* the first to get its turn */
	uint32_t in_flight;
	uint32_t n_slots_used;
	uint64_t now_ns;
	uint64_t staged_since_ns;
	uint64_t throttle_ns; /* until a request that waits for a limit fits; 0: none does */
	uint64_t syncs;
	struct blk_request *free_slots;
	struct blk_request *wants_sync;
	struct blk_request *in_sync; /* those that the sync under way is for */
	struct blk_request sync;
	struct blk_queue queues[BLK_MAX_QUEUES];
	struct iovec iov[VIRTQUEUE_MAX_SIZE];
	/* Taken from the front and used again last in, first out: what a quiet disk never needed
	 * was never touched, and costs no memory. */
	struct blk_request slots[BLK_MAX_IN_FLIGHT];
	struct blk_large_iov large[BLK_LARGE_IOVS];
};

#endif
