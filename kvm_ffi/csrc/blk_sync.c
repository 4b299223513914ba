/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
/* The back end where io_uring is not permitted: the engine's thread does each operation itself. */
#include "blk_engine.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <time.h>

#define NS_PER_SEC 1000000000u

struct blk_sync {
	struct blk_io io;
	struct blk_engine *engine;
	const struct blk_file *file;
	const struct blk_listen *listen;
};

static bool sync_submit(struct blk_io *io, struct blk_request *req, int64_t *ret)
{
	struct blk_sync *sync = (struct blk_sync *)(void *)io;

	*ret = blk_file_execute(sync->file, &req->op);
	return true;
}

static int sync_turn(struct blk_io *io, uint64_t timeout_ns)
{
	struct blk_sync *sync = (struct blk_sync *)(void *)io;
	struct timespec timeout = {
	    .tv_sec = (time_t)(timeout_ns / NS_PER_SEC),
	    .tv_nsec = (long)(timeout_ns % NS_PER_SEC),
	};
	struct pollfd fds[BLK_MAX_QUEUES + 1];
	uint32_t n = 0;

	if (sync->listen) {
		for (; n < sync->listen->n_queues; n++)
			fds[n] = (struct pollfd){.fd = sync->listen->kick_fds[n], .events = POLLIN};
		fds[n] = (struct pollfd){.fd = sync->listen->wake_fd, .events = POLLIN};
		n++;
	}
	if (ppoll(fds, n, timeout_ns == BLK_IO_FOREVER ? NULL : &timeout, NULL) < 0)
		return errno == EINTR ? 0 : -errno;
	for (uint32_t i = 0; i < n; i++) {
		if (fds[i].revents & POLLNVAL)
			return -EBADF; /* closed under us: waiting on would spin */
		if (!fds[i].revents)
			continue;
		engine_drain_fd(fds[i].fd);
		if (i + 1 < n)
			blk_engine_kicked(sync->engine, i);
	}
	return 0;
}

static void sync_set_file(struct blk_io *io)
{
	(void)io; /* it looks at the file anew for each operation */
}

static void sync_close(struct blk_io *io)
{
	free(io);
}

int blk_sync_open(struct blk_engine *engine, const struct blk_file *file,
		  const struct blk_listen *listen, struct blk_io **ret)
{
	struct blk_sync *sync = calloc(1, sizeof(*sync));

	if (!sync)
		return -ENOMEM;
	sync->io = (struct blk_io){true, sync_submit, sync_turn, sync_set_file, sync_close};
	sync->engine = engine;
	sync->file = file;
	sync->listen = listen;
	*ret = &sync->io;
	return 0;
}
