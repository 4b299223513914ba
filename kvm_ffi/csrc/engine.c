/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#include "engine.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_SEC 1000000000

int engine_gate_init(struct engine_gate *gate)
{
	pthread_condattr_t attr;

	memset(gate, 0, sizeof(*gate));
	gate->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (gate->wake_fd < 0)
		return -errno;
	pthread_mutex_init(&gate->lock, NULL);
	pthread_condattr_init(&attr);
	/* A bounded wait must not depend on somebody setting the host's clock. */
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&gate->changed, &attr);
	pthread_condattr_destroy(&attr);
	return 0;
}

int engine_gate_deinit(struct engine_gate *gate)
{
	if (engine_gate_is_running(gate))
		return -EBUSY;
	pthread_cond_destroy(&gate->changed);
	pthread_mutex_destroy(&gate->lock);
	close(gate->wake_fd);
	return 0;
}

/* With the lock held, after a change of the wishes. The store comes before the signal, and the
 * engine drains wake_fd before it loads: whoever drains a signal sees its wish. */
static void update_attention(struct engine_gate *gate)
{
	__atomic_store_n(&gate->attention, (uint32_t)(gate->wants_quiet || gate->wants_stop),
			 __ATOMIC_RELEASE);
	pthread_cond_broadcast(&gate->changed);
	engine_signal_fd(gate->wake_fd);
}

int engine_gate_enter(struct engine_gate *gate)
{
	int ret = -EBUSY;

	pthread_mutex_lock(&gate->lock);
	if (!gate->is_running) {
		gate->is_running = true;
		ret = 0;
	}
	pthread_mutex_unlock(&gate->lock);
	return ret;
}

void engine_gate_leave(struct engine_gate *gate)
{
	pthread_mutex_lock(&gate->lock);
	gate->is_running = false;
	pthread_cond_broadcast(&gate->changed);
	pthread_mutex_unlock(&gate->lock);
}

bool engine_gate_checkpoint(struct engine_gate *gate)
{
	bool must_stop;

	/* A wish that this misses leaves wake_fd readable, so the poll that follows returns. */
	if (!engine_gate_is_wanted(gate))
		return false;
	pthread_mutex_lock(&gate->lock);
	while (gate->wants_quiet && !gate->wants_stop) {
		if (!gate->is_parked) {
			gate->is_parked = true;
			pthread_cond_broadcast(&gate->changed);
		}
		pthread_cond_wait(&gate->changed, &gate->lock);
	}
	gate->is_parked = false;
	must_stop = gate->wants_stop;
	pthread_mutex_unlock(&gate->lock);
	return must_stop;
}

static struct timespec deadline_after(uint64_t timeout_ns)
{
	struct timespec when;

	clock_gettime(CLOCK_MONOTONIC, &when);
	when.tv_sec += (time_t)(timeout_ns / NS_PER_SEC);
	when.tv_nsec += (long)(timeout_ns % NS_PER_SEC);
	if (when.tv_nsec >= NS_PER_SEC) {
		when.tv_sec++;
		when.tv_nsec -= NS_PER_SEC;
	}
	return when;
}

int engine_gate_quiesce(struct engine_gate *gate, uint64_t timeout_ns)
{
	struct timespec deadline = deadline_after(timeout_ns);
	int ret = 0;

	pthread_mutex_lock(&gate->lock);
	gate->wants_quiet = true;
	update_attention(gate);
	while (gate->is_running && !gate->is_parked && ret == 0)
		ret = pthread_cond_timedwait(&gate->changed, &gate->lock, &deadline);
	if (gate->is_running && !gate->is_parked) {
		gate->wants_quiet = false;
		update_attention(gate);
		ret = -ETIMEDOUT;
	} else {
		ret = 0;
	}
	pthread_mutex_unlock(&gate->lock);
	return ret;
}

void engine_gate_resume(struct engine_gate *gate)
{
	pthread_mutex_lock(&gate->lock);
	gate->wants_quiet = false;
	update_attention(gate);
	pthread_mutex_unlock(&gate->lock);
}

void engine_gate_stop(struct engine_gate *gate)
{
	pthread_mutex_lock(&gate->lock);
	gate->wants_stop = true;
	update_attention(gate);
	pthread_mutex_unlock(&gate->lock);
}

bool engine_gate_is_running(struct engine_gate *gate)
{
	bool is_running;

	pthread_mutex_lock(&gate->lock);
	is_running = gate->is_running;
	pthread_mutex_unlock(&gate->lock);
	return is_running;
}

bool engine_gate_is_quiet(struct engine_gate *gate)
{
	bool is_quiet;

	pthread_mutex_lock(&gate->lock);
	is_quiet = !gate->is_running || gate->is_parked;
	pthread_mutex_unlock(&gate->lock);
	return is_quiet;
}

void engine_signal_fd(int fd)
{
	uint64_t one = 1;
	ssize_t wrote;

	if (fd < 0)
		return;
	do
		wrote = write(fd, &one, sizeof(one));
	while (wrote < 0 && errno == EINTR);
}

void engine_drain_fd(int fd)
{
	uint64_t count;
	ssize_t got;

	do
		got = read(fd, &count, sizeof(count));
	while (got < 0 && errno == EINTR);
}

void engine_copy_counters(void *to, const void *from, size_t bytes)
{
	uint64_t *out = to;
	const uint64_t *in = from;

	for (size_t i = 0; i < bytes / sizeof(*in); i++)
		out[i] = __atomic_load_n(&in[i], __ATOMIC_RELAXED);
}
