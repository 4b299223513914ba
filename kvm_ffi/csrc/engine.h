/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * What every I/O engine shares: the gate through which other threads stop it or
 * hold it still, eventfd helpers, and counters.
 *
 * An engine is one thread in one C call for its whole life. It passes
 * engine_gate_checkpoint() whenever it holds no popped chain, so a gate that reports
 * the engine parked means: nothing in flight, every completion published.
 */
#ifndef HOSTEL_ENGINE_H
#define HOSTEL_ENGINE_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Why an engine signalled its fault eventfd. */
enum engine_fault {
	ENGINE_FAULT_NONE = 0,
	ENGINE_FAULT_RING = 1, /* the driver broke a ring: the device needs a reset */
	ENGINE_FAULT_BACKEND = 2, /* the host side is gone for good (the tap was deleted) */
};

struct engine_gate {
	pthread_mutex_t lock;
	pthread_cond_t changed; /* any of the flags below, under lock */
	int wake_fd; /* eventfd in the engine's poll set; the engine drains it */
	uint32_t attention; /* atomic: wants_quiet || wants_stop, read without the lock */
	bool wants_quiet;
	bool wants_stop;
	bool is_running;
	bool is_parked;
};

int engine_gate_init(struct engine_gate *gate);
/* -EBUSY while the engine runs. */
int engine_gate_deinit(struct engine_gate *gate);

/* The engine's side. enter: 0, or -EBUSY when a thread is inside already. */
int engine_gate_enter(struct engine_gate *gate);
void engine_gate_leave(struct engine_gate *gate);
/* Parks here while asked to be quiet; true when the engine must return. */
bool engine_gate_checkpoint(struct engine_gate *gate);
/* Whether somebody waits for the next checkpoint: cheap, for use between requests. */
static inline bool engine_gate_is_wanted(const struct engine_gate *gate)
{
	return __atomic_load_n(&gate->attention, __ATOMIC_ACQUIRE) != 0;
}

/* The controlling side, any thread. quiesce: 0 when the engine is parked, not running or
 * finished; -ETIMEDOUT withdraws the request. It need not be running yet. */
int engine_gate_quiesce(struct engine_gate *gate, uint64_t timeout_ns);
void engine_gate_resume(struct engine_gate *gate);
void engine_gate_stop(struct engine_gate *gate);
bool engine_gate_is_running(struct engine_gate *gate);
/* Whether it is parked, does not run, or has finished. */
bool engine_gate_is_quiet(struct engine_gate *gate);

/* eventfds are non-blocking. A full counter is as good as a signal; -1 is "no wire". */
void engine_signal_fd(int fd);
void engine_drain_fd(int fd);

/* Have the engine look around: something that it waits for has changed. Any thread. */
static inline void engine_gate_wake(struct engine_gate *gate)
{
	engine_signal_fd(gate->wake_fd);
}

/* Counters have one writer, the engine; other threads read them at any time. */
static inline void engine_count(uint64_t *counter, uint64_t n)
{
	uint64_t old = __atomic_load_n(counter, __ATOMIC_RELAXED);

	__atomic_store_n(counter, old + n, __ATOMIC_RELAXED);
}
/* Copy a struct that holds nothing but such counters. */
void engine_copy_counters(void *to, const void *from, size_t bytes);

#endif
