/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* What other threads than a block engine's own may do with it while it runs. */
#include "blk_engine_priv.h"

#include <errno.h>

struct engine_gate *blk_engine_gate(struct blk_engine *engine)
{
	return &engine->gate;
}

int blk_engine_set_size(struct blk_engine *engine, uint64_t size_sectors)
{
	if (size_sectors > BLK_MAX_SECTORS)
		return -EINVAL;
	__atomic_store_n(&engine->disk.size_sectors, size_sectors, __ATOMIC_RELAXED);
	return 0;
}

/* Make what was written so far durable. One failure is told and kept, as in end_sync(): the kernel
 * would not tell the driver again. */
static int64_t leave_file(struct blk_engine *engine)
{
	const struct blk_op op = {.kind = BLK_OP_SYNC};
	int64_t res;

	if (engine->disk.is_read_only || engine->has_lost_writes)
		return 0;
	res = blk_file_execute(&engine->disk.file, &op);
	engine_count(&engine->syncs, 1);
	if (res < 0)
		engine->has_lost_writes = true;
	return res;
}

int blk_engine_set_file(struct blk_engine *engine, int disk_fd, uint64_t size_sectors)
{
	struct blk_file file;
	int64_t err;

	if (size_sectors > BLK_MAX_SECTORS)
		return -EINVAL;
	if (!engine_gate_is_quiet(&engine->gate))
		return -EBUSY;
	err = blk_file_init(&file, disk_fd);
	if (err == 0)
		err = leave_file(engine);
	if (err < 0)
		return (int)err;
	/* The thread is parked: the gate's lock orders this before all that it does next. */
	engine->disk.file = file;
	engine->has_new_file = true;
	engine->has_lost_writes = false;
	return blk_engine_set_size(engine, size_sectors);
}

int blk_engine_fault(const struct blk_engine *engine)
{
	return (int)__atomic_load_n(&engine->fault, __ATOMIC_ACQUIRE);
}

int blk_engine_host_errno(const struct blk_engine *engine)
{
	return (int)__atomic_load_n(&engine->host_errno, __ATOMIC_RELAXED);
}

void blk_engine_await_error(struct blk_engine *engine)
{
	__atomic_store_n(&engine->is_error_awaited, 1u, __ATOMIC_RELEASE);
}

int blk_engine_io(const struct blk_engine *engine)
{
	return (int)__atomic_load_n(&engine->running_io, __ATOMIC_RELAXED);
}

uint64_t blk_engine_syncs(const struct blk_engine *engine)
{
	return __atomic_load_n(&engine->syncs, __ATOMIC_RELAXED);
}

void blk_engine_queue_stats(const struct blk_engine *engine, uint32_t queue,
			    struct blk_queue_stats *ret)
{
	engine_copy_counters(ret, &engine->queues[queue].stats, sizeof(*ret));
}
