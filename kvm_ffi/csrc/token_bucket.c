/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#include "token_bucket.h"

#include <errno.h>
#include <string.h>

#define NANO ((int64_t)1000000000)

/* Add what has come since the last look, and no more than the bucket holds. */
static void refill(struct token_bucket *bucket, uint64_t now_ns)
{
	uint64_t missing = (uint64_t)(bucket->capacity - bucket->level);
	uint64_t elapsed = now_ns > bucket->updated_ns ? now_ns - bucket->updated_ns : 0;

	bucket->updated_ns += elapsed;
	/* The product is formed only where it fits the bucket. */
	if (elapsed > missing / bucket->rate)
		bucket->level = bucket->capacity;
	else
		bucket->level += (int64_t)(elapsed * bucket->rate);
}

void token_bucket_set(struct token_bucket *bucket, uint64_t rate, uint64_t burst, uint64_t now_ns)
{
	bool was_limited = bucket->rate != 0;

	if (was_limited)
		refill(bucket, now_ns);
	if (burst == 0)
		burst = rate / 10;
	if (burst < rate / 100)
		burst = rate / 100;
	if (burst == 0)
		burst = 1;
	if (burst > TOKEN_BUCKET_MAX_BURST)
		burst = TOKEN_BUCKET_MAX_BURST;
	bucket->rate = rate;
	bucket->capacity = (int64_t)burst * NANO;
	if (!was_limited || bucket->level > bucket->capacity)
		bucket->level = bucket->capacity;
	bucket->updated_ns = now_ns;
}

uint64_t token_bucket_wait_ns(struct token_bucket *bucket, uint32_t tokens, uint64_t now_ns)
{
	/* Guest-controlled: tokens. */
	int64_t need = (int64_t)tokens * NANO;

	if (bucket->rate == 0)
		return 0;
	refill(bucket, now_ns);
	if (need > bucket->capacity)
		need = bucket->capacity;
	if (bucket->level >= need)
		return 0;
	return ((uint64_t)(need - bucket->level) + bucket->rate - 1) / bucket->rate;
}

void token_bucket_take(struct token_bucket *bucket, uint32_t tokens)
{
	/* Guest-controlled: tokens. The level was at least 0, so it stays above -2^62. */
	if (bucket->rate != 0)
		bucket->level -= (int64_t)tokens * NANO;
}

void rate_limiter_init(struct rate_limiter *limiter)
{
	memset(limiter, 0, sizeof(*limiter));
	pthread_mutex_init(&limiter->lock, NULL);
}

void rate_limiter_deinit(struct rate_limiter *limiter)
{
	pthread_mutex_destroy(&limiter->lock);
}

int rate_limiter_set(struct rate_limiter *limiter, const struct rate_limit *limit, uint64_t now_ns)
{
	if (limit->bytes_per_s > TOKEN_BUCKET_MAX_RATE ||
	    limit->ops_per_s > TOKEN_BUCKET_MAX_RATE ||
	    limit->bytes_burst > TOKEN_BUCKET_MAX_BURST ||
	    limit->ops_burst > TOKEN_BUCKET_MAX_BURST)
		return -EINVAL;
	pthread_mutex_lock(&limiter->lock);
	token_bucket_set(&limiter->bytes, limit->bytes_per_s, limit->bytes_burst, now_ns);
	token_bucket_set(&limiter->ops, limit->ops_per_s, limit->ops_burst, now_ns);
	__atomic_store_n(&limiter->is_limited,
			 (uint32_t)(limit->bytes_per_s != 0 || limit->ops_per_s != 0),
			 __ATOMIC_RELAXED);
	pthread_mutex_unlock(&limiter->lock);
	return 0;
}

uint64_t rate_limiter_wait_locked(struct rate_limiter *limiter, uint32_t bytes, uint64_t now_ns)
{
	/* Guest-controlled: bytes. */
	uint64_t wait_ns = token_bucket_wait_ns(&limiter->bytes, bytes, now_ns);
	uint64_t wait_ops_ns = token_bucket_wait_ns(&limiter->ops, 1, now_ns);

	return wait_ns > wait_ops_ns ? wait_ns : wait_ops_ns;
}

void rate_limiter_take_locked(struct rate_limiter *limiter, uint32_t bytes)
{
	/* Guest-controlled: bytes. */
	token_bucket_take(&limiter->bytes, bytes);
	token_bucket_take(&limiter->ops, 1);
}

uint64_t rate_limiter_take(struct rate_limiter *limiter, uint32_t bytes, uint64_t now_ns)
{
	/* Guest-controlled: bytes. */
	uint64_t wait_ns;

	if (!rate_limiter_is_limited(limiter))
		return 0;
	pthread_mutex_lock(&limiter->lock);
	wait_ns = rate_limiter_wait_locked(limiter, bytes, now_ns);
	if (wait_ns == 0)
		rate_limiter_take_locked(limiter, bytes);
	pthread_mutex_unlock(&limiter->lock);
	return wait_ns;
}

uint64_t rate_limiter_wait(struct rate_limiter *limiter, uint32_t bytes, uint64_t now_ns)
{
	/* Guest-controlled: bytes. */
	uint64_t wait_ns;

	if (!rate_limiter_is_limited(limiter))
		return 0;
	pthread_mutex_lock(&limiter->lock);
	wait_ns = rate_limiter_wait_locked(limiter, bytes, now_ns);
	pthread_mutex_unlock(&limiter->lock);
	return wait_ns;
}

void rate_limiter_charge(struct rate_limiter *limiter, uint32_t bytes)
{
	/* Guest-controlled: bytes, as far as a guest has others send to it. */
	if (!rate_limiter_is_limited(limiter))
		return;
	pthread_mutex_lock(&limiter->lock);
	rate_limiter_take_locked(limiter, bytes);
	pthread_mutex_unlock(&limiter->lock);
}
