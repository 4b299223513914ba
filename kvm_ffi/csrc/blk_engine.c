/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#include "blk_engine_priv.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* A turn ends here, so that what is served from the page cache does not wait for a whole ring
 * of its like. */
#define TURN_MAX_REQUESTS 32u
#define TURN_MAX_BYTES (256u << 10)
/* Where operations block, completions wait no longer than this for company ... */
#define BATCH_MAX_NS 50000u
/* ... and not at all for one of this size. */
#define SLOW_BYTES 65536u

int blk_engine_create(const struct blk_config *config, struct blk_engine **ret)
{
	struct blk_engine *engine;
	int err;

	if (config->size_sectors > BLK_MAX_SECTORS || config->n_queues == 0 ||
	    config->n_queues > BLK_MAX_QUEUES)
		return -EINVAL;
	engine = calloc(1, sizeof(*engine));
	if (!engine)
		return -ENOMEM;
	err = blk_file_init(&engine->disk.file, config->disk_fd);
	if (err == 0)
		err = engine_gate_init(&engine->gate);
	if (err < 0) {
		free(engine);
		return err;
	}
	engine->disk.size_sectors = config->size_sectors;
	engine->disk.is_read_only = config->is_read_only;
	engine->disk.is_writethrough = config->is_writethrough;
	engine->disk.large = engine->large;
	memcpy(engine->disk.serial, config->serial, sizeof(config->serial));
	engine->limiter = config->limiter;
	engine->fault_fd = config->fault_fd;
	engine->is_error_awaited = 1;
	engine->wanted_io = config->io_engine;
	engine->io = config->io;
	engine->has_own_io = config->io != NULL;
	engine->sync.op.kind = BLK_OP_SYNC;
	engine->listen.n_queues = config->n_queues;
	engine->listen.wake_fd = engine->gate.wake_fd;
	for (uint32_t i = 0; i < config->n_queues; i++) {
		engine->listen.kick_fds[i] = config->queues[i].kick_fd;
		engine->queues[i].vq = config->queues[i].vq;
		engine->queues[i].irq_fd = config->queues[i].irq_fd;
	}
	if (config->group)
		rate_group_join(config->group, &engine->member, engine->gate.wake_fd);
	*ret = engine;
	return 0;
}

static void close_io(struct blk_engine *engine)
{
	if (engine->io && !engine->has_own_io) {
		engine->io->close(engine->io);
		engine->io = NULL;
	}
}

int blk_engine_destroy(struct blk_engine *engine)
{
	if (engine_gate_is_running(&engine->gate))
		return -EBUSY;
	rate_group_leave(&engine->member); /* before its wake_fd is closed */
	engine_gate_deinit(&engine->gate);
	close_io(engine);
	free(engine);
	return 0;
}

/* On the thread that will use it: a ring belongs to its maker. */
static int open_io(struct blk_engine *engine, const struct blk_listen *listen)
{
	enum blk_io_engine chosen = BLK_IO_URING;
	int err = -ENOSYS;

	if (engine->io)
		return 0;
	if (engine->wanted_io != BLK_IO_THREADS)
		err = blk_ring_open(engine, &engine->disk.file, listen, &engine->io);
	if (err < 0 && engine->wanted_io != BLK_IO_URING) {
		chosen = BLK_IO_THREADS;
		err = blk_sync_open(engine, &engine->disk.file, listen, &engine->io);
	}
	if (err == 0)
		__atomic_store_n(&engine->running_io, (uint32_t)chosen, __ATOMIC_RELAXED);
	return err;
}

uint64_t blk_engine_update_now(struct blk_engine *engine)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	engine->now_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
	return engine->now_ns;
}

uint64_t blk_engine_now(const struct blk_engine *engine)
{
	return engine->now_ns;
}

static void publish(struct blk_queue *queue)
{
	if (!queue->is_staged)
		return;
	queue->is_staged = false;
	if (!virtqueue_publish(queue->vq)) {
		engine_count(&queue->stats.suppressed, 1);
	} else if (queue->irq_fd >= 0) {
		engine_count(&queue->stats.interrupts, 1);
		engine_signal_fd(queue->irq_fd);
	}
}

static void publish_all(struct blk_engine *engine)
{
	engine->staged_since_ns = 0;
	for (uint32_t i = 0; i < engine->listen.n_queues; i++)
		publish(&engine->queues[i]);
}

/* After it was counted: whoever is told sees the count. */
static void note_host_error(struct blk_engine *engine, int host_errno)
{
	__atomic_store_n(&engine->host_errno, (uint32_t)host_errno, __ATOMIC_RELAXED);
	/* Told once, until somebody asks again: a guest can bring on any number of them. */
	if (__atomic_exchange_n(&engine->is_error_awaited, 0u, __ATOMIC_ACQ_REL))
		engine_signal_fd(engine->fault_fd);
}

/* Answer a request and give its slot back; the driver sees it at publish(). */
static void complete(struct blk_engine *engine, struct blk_request *req)
{
	struct blk_queue *queue = req->queue;

	virtqueue_add_used(queue->vq, req->head, blk_request_answer(req));
	queue->is_staged = true;
	blk_stats_count(&queue->stats, req, engine->now_ns - req->started_ns);
	if (req->host_errno)
		note_host_error(engine, req->host_errno);
	__atomic_store_n(&queue->stats.in_flight, queue->stats.in_flight - 1, __ATOMIC_RELAXED);
	blk_request_release(&engine->disk, req);
	req->next = engine->free_slots;
	engine->free_slots = req;
	engine->in_flight--;
	if (!engine->io->is_blocking)
		return;
	blk_engine_update_now(engine);
	if (engine->staged_since_ns == 0)
		engine->staged_since_ns = engine->now_ns;
	else if (engine->now_ns - engine->staged_since_ns > BATCH_MAX_NS)
		publish_all(engine);
}

/* Have operations carried out until one is under way or the request is done with. */
static void drive(struct blk_engine *engine, struct blk_request *req, enum blk_next next)
{
	int64_t res;

	while (next == BLK_NEXT_OP) {
		if (engine->io->is_blocking &&
		    (req->op.len >= SLOW_BYTES || req->op.kind == BLK_OP_ALLOCATE))
			publish_all(engine);
		if (!engine->io->submit(engine->io, req, &res))
			return;
		next = blk_request_advance(&engine->disk, req, res);
	}
	if (next == BLK_NEXT_SYNC) {
		req->next = engine->wants_sync;
		engine->wants_sync = req;
		return;
	}
	complete(engine, req);
}

static void end_sync(struct blk_engine *engine, int64_t res)
{
	/* Sticky: Linux reports a failed write-back once and forgets the pages, so a later sync
	 * that succeeds says nothing about the data that this one lost. */
	if (res < 0)
		engine->has_lost_writes = true;
	else if (engine->has_lost_writes)
		res = -EIO;
	while (engine->in_sync) {
		struct blk_request *req = engine->in_sync;

		engine->in_sync = req->next;
		blk_request_synced(req, res);
		complete(engine, req);
	}
}

/* One sync at a time, for everyone who asked before it began. Were there two, the failure could
 * be reported to one and the other believe that all is well. */
static void begin_sync(struct blk_engine *engine)
{
	int64_t res;

	while (!engine->in_sync && engine->wants_sync) {
		engine->in_sync = engine->wants_sync;
		engine->wants_sync = NULL;
		res = -EIO;
		if (!engine->has_lost_writes) {
			engine_count(&engine->syncs, 1);
			if (engine->io->is_blocking)
				publish_all(engine);
			if (!engine->io->submit(engine->io, &engine->sync, &res))
				return;
		}
		end_sync(engine, res);
	}
}

void blk_engine_done(struct blk_engine *engine, struct blk_request *req, int64_t res)
{
	if (req == &engine->sync)
		end_sync(engine, res);
	else
		drive(engine, req, blk_request_advance(&engine->disk, req, res));
}

void blk_engine_kicked(struct blk_engine *engine, uint32_t queue)
{
	engine_count(&engine->queues[queue].stats.kicks, 1);
}

/* Pay for a request: 0, or how long to wait for a limit. */
static uint64_t pay(struct blk_engine *engine, uint32_t bytes)
{
	if (engine->member.group)
		return rate_group_take(&engine->member, engine->limiter, bytes, engine->now_ns);
	return engine->limiter ? rate_limiter_take(engine->limiter, bytes, engine->now_ns) : 0;
}

/* Whether a checked request has to wait: for others to finish, or for a rate limit. */
static bool must_wait(struct blk_engine *engine, struct blk_queue *queue, struct blk_request *req,
		      enum blk_next next)
{
	uint64_t wait_ns;

	if (next == BLK_NEXT_LATER)
		return true;
	if (next == BLK_NEXT_OP && req->must_be_alone && engine->in_flight > 0) {
		engine->must_be_alone = true;
		return true;
	}
	wait_ns = pay(engine, req->cost_bytes);
	if (wait_ns == 0)
		return false;
	engine_count(&queue->stats.throttled, 1);
	if (engine->throttle_ns == 0 || wait_ns < engine->throttle_ns)
		engine->throttle_ns = wait_ns;
	return true;
}

static struct blk_request *peek_slot(struct blk_engine *engine)
{
	if (engine->free_slots)
		return engine->free_slots;
	if (engine->n_slots_used < BLK_MAX_IN_FLIGHT)
		return &engine->slots[engine->n_slots_used];
	return NULL;
}

static void take_slot(struct blk_engine *engine, struct blk_request *next_free)
{
	if (engine->free_slots)
		engine->free_slots = next_free;
	else
		engine->n_slots_used++;
	engine->in_flight++;
}

/* Begin one request: its bytes, or -1 when there is none that can begin now. */
static int64_t admit_one(struct blk_engine *engine, struct blk_queue *queue)
{
	/* Guest-controlled: the ring and the request. */
	struct desc_chain chain = {.iov = engine->iov, .max_iov = VIRTQUEUE_MAX_SIZE};
	struct blk_request *req = peek_slot(engine);
	struct blk_request *next_free = req ? req->next : NULL;
	struct blk_buffers buffers;
	enum blk_next next;
	int got;

	if (!req)
		return -1;
	got = virtqueue_pop(queue->vq, &chain);
	queue->is_empty = got == 0;
	if (got > 0 && blk_request_parse(req, &chain, &buffers) < 0)
		got = -EPROTO;
	if (got < 0) {
		queue->vq->is_broken = true;
		engine->is_broken = true;
	}
	if (got <= 0) {
		req->next = next_free;
		return -1;
	}
	next = blk_request_begin(&engine->disk, req, &buffers);
	if (must_wait(engine, queue, req, next)) {
		blk_request_release(&engine->disk, req);
		req->next = next_free;
		virtqueue_unpop(queue->vq, 1);
		return -1;
	}
	take_slot(engine, next_free);
	engine->must_be_alone = next == BLK_NEXT_OP && req->must_be_alone;
	req->queue = queue;
	req->started_ns = engine->now_ns;
	__atomic_store_n(&queue->stats.in_flight, queue->stats.in_flight + 1, __ATOMIC_RELAXED);
	drive(engine, req, next);
	return req->cost_bytes;
}

/* Begin a turn's worth of requests; whether that was all that a turn may take. */
static bool admit(struct blk_engine *engine)
{
	uint32_t n_queues = engine->listen.n_queues;
	uint32_t requests = TURN_MAX_REQUESTS;
	int64_t bytes = TURN_MAX_BYTES;

	engine->throttle_ns = 0;
	if (engine->in_flight == 0)
		engine->must_be_alone = false;
	for (uint32_t i = 0; i < n_queues; i++) {
		struct blk_queue *queue = &engine->queues[engine->next_queue];
		int64_t cost = 0;

		virtqueue_disable_kick(queue->vq);
		while (requests > 0 && bytes > 0 && !engine->is_broken && !engine->must_be_alone &&
		       !engine_gate_is_wanted(&engine->gate) &&
		       (cost = admit_one(engine, queue)) >= 0) {
			requests--;
			bytes -= cost;
		}
		/* The next turn goes on with the same queue only if there is no other. */
		engine->next_queue = (engine->next_queue + 1) % n_queues;
		if (requests == 0 || bytes <= 0)
			return true;
	}
	return false;
}

/* Before a wait: ask for kicks where nothing was found. Whether there is something after all:
 * it came meanwhile, or was left behind a request that had to be alone. */
static bool has_work(struct blk_engine *engine)
{
	bool is_free = engine->in_flight == 0 && engine->throttle_ns == 0;
	bool has_work = false;

	for (uint32_t i = 0; i < engine->listen.n_queues; i++) {
		if (!engine->queues[i].is_empty)
			has_work |= is_free;
		else if (virtqueue_enable_kick(engine->queues[i].vq))
			has_work = true;
	}
	return has_work;
}

static uint64_t wait_limit(const struct blk_engine *engine, bool has_more)
{
	if (has_more)
		return 0;
	return engine->throttle_ns ? engine->throttle_ns : BLK_IO_FOREVER;
}

int blk_engine_serve(struct blk_engine *engine)
{
	int ret = open_io(engine, NULL);

	if (ret < 0)
		return ret;
	if (engine->has_new_file)
		engine->io->set_file(engine->io);
	engine->has_new_file = false;
	blk_engine_update_now(engine);
	for (;;) {
		bool is_wanted = engine_gate_is_wanted(&engine->gate);
		bool has_more = false;

		engine->throttle_ns = 0;
		if (!is_wanted && !engine->is_broken)
			has_more = admit(engine);
		begin_sync(engine);
		publish_all(engine);
		if (!is_wanted && !engine->is_broken && !has_more)
			has_more = has_work(engine);
		if (engine->in_flight == 0 && engine->is_broken)
			return -EPROTO;
		if (engine->in_flight == 0 && !has_more && engine->throttle_ns == 0)
			return is_wanted ? 1 : 0;
		ret = engine->io->turn(engine->io, wait_limit(engine, has_more));
		if (ret < 0)
			return ret;
		blk_engine_update_now(engine);
	}
}

int blk_engine_run(struct blk_engine *engine)
{
	int ret = engine_gate_enter(&engine->gate);

	if (ret < 0)
		return ret;
	close_io(engine); /* another thread's, of blk_engine_serve() */
	ret = open_io(engine, &engine->listen);
	/* The rings are looked at first: they may hold chains whose kick was heard before a
	 * quiesce, or came before the engine existed. */
	while (ret >= 0 && !engine_gate_checkpoint(&engine->gate)) {
		ret = blk_engine_serve(engine);
		if (ret == 0)
			ret = engine->io->turn(engine->io, BLK_IO_FOREVER);
	}
	if (ret == -EPROTO) {
		__atomic_store_n(&engine->fault, (uint32_t)ENGINE_FAULT_RING, __ATOMIC_RELEASE);
		engine_signal_fd(engine->fault_fd);
	}
	close_io(engine);
	engine_gate_leave(&engine->gate);
	return ret < 0 ? ret : 0;
}
