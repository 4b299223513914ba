/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * Rate limits for I/O engines: a token bucket each for bytes and for operations.
 *
 * Nothing ticks: a bucket is brought up to date when it is asked, in integers without
 * rounding, and says for how long exactly the next request has to wait.
 */
#ifndef HOSTEL_TOKEN_BUCKET_H
#define HOSTEL_TOKEN_BUCKET_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

/* A token is 10^9 nanotokens, and a rate of one token per second one nanotoken per
 * nanosecond. Both limits keep every sum below 2^63. */
#define TOKEN_BUCKET_MAX_BURST ((uint64_t)1 << 32)
#define TOKEN_BUCKET_MAX_RATE 1000000000000u

struct token_bucket {
	uint64_t rate; /* tokens per second; 0: no limit */
	int64_t capacity; /* nanotokens */
	int64_t level; /* nanotokens; below 0 after a request larger than the bucket */
	uint64_t updated_ns;
};

/* What a request costs: tokens up to UINT32_MAX. now_ns: any monotonic clock, the same for
 * all calls. A new limit keeps the debt that the bucket has, so changing it often gains
 * nothing; burst 0 is a tenth of a second's worth, and less than a hundredth counts as that:
 * below it a limit would be one of the host's timers. */
void token_bucket_set(struct token_bucket *bucket, uint64_t rate, uint64_t burst, uint64_t now_ns);
/* Nanoseconds until the request fits, 0: now. One larger than the bucket fits a full one. */
uint64_t token_bucket_wait_ns(struct token_bucket *bucket, uint32_t tokens, uint64_t now_ns);
/* After a wait of 0. */
void token_bucket_take(struct token_bucket *bucket, uint32_t tokens);

struct rate_limit {
	uint64_t bytes_per_s; /* 0: no limit */
	uint64_t bytes_burst; /* 0: a tenth of a second's worth */
	uint64_t ops_per_s;
	uint64_t ops_burst;
};

/* The limit of one device, shared by its engines; any thread. */
struct rate_limiter {
	pthread_mutex_t lock; /* innermost */
	uint32_t is_limited; /* atomic: spares unlimited devices the lock */
	struct token_bucket bytes;
	struct token_bucket ops;
};

void rate_limiter_init(struct rate_limiter *limiter);
void rate_limiter_deinit(struct rate_limiter *limiter);
/* 0, or -EINVAL for a rate or burst above the limits; nothing has changed then. Engines
 * that wait are the caller's to wake: engine_gate_wake(). */
int rate_limiter_set(struct rate_limiter *limiter, const struct rate_limit *limit, uint64_t now_ns);
/* 0: the request may go and is paid for; else the nanoseconds to wait, nothing taken. */
uint64_t rate_limiter_take(struct rate_limiter *limiter, uint32_t bytes, uint64_t now_ns);

/* The same in two steps: wait says when a request fits, and charge pays for one. For requests whose
 * size shows only when they are done, ask for one byte and pay for at most 2^20, by a few engines
 * at a time: what they go beyond the limit, the next one waits for. */
uint64_t rate_limiter_wait(struct rate_limiter *limiter, uint32_t bytes, uint64_t now_ns);
void rate_limiter_charge(struct rate_limiter *limiter, uint32_t bytes);
/* The same with the lock held. */
uint64_t rate_limiter_wait_locked(struct rate_limiter *limiter, uint32_t bytes, uint64_t now_ns);
void rate_limiter_take_locked(struct rate_limiter *limiter, uint32_t bytes);

static inline bool rate_limiter_is_limited(const struct rate_limiter *limiter)
{
	return __atomic_load_n(&limiter->is_limited, __ATOMIC_RELAXED) != 0;
}

#endif
