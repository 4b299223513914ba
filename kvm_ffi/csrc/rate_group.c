/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#include "rate_group.h"

#include "engine.h"

#include <string.h>

#define NANO 1000000000u
/* How far one may be ahead of another that waits: small beside what people notice, and large
 * enough that at 100,000 requests a second threads need not take turns at each. */
#define SLACK_NS 1000000u
/* What a thread needs to wake up and take its turn, after which the next one looks. */
#define TURN_NS 100000u

void rate_group_init(struct rate_group *group)
{
	memset(group, 0, sizeof(*group));
	rate_limiter_init(&group->limiter);
}

void rate_group_deinit(struct rate_group *group)
{
	rate_limiter_deinit(&group->limiter);
}

/* With the lock held. */
static void wake_all(const struct rate_group *group)
{
	for (const struct rate_member *each = group->members; each; each = each->next)
		engine_signal_fd(each->wake_fd);
}

int rate_group_set(struct rate_group *group, const struct rate_limit *limit, uint64_t now_ns)
{
	int err = rate_limiter_set(&group->limiter, limit, now_ns);

	if (err < 0)
		return err;
	pthread_mutex_lock(&group->limiter.lock);
	wake_all(group);
	pthread_mutex_unlock(&group->limiter.lock);
	return 0;
}

void rate_group_join(struct rate_group *group, struct rate_member *member, int wake_fd)
{
	pthread_mutex_lock(&group->limiter.lock);
	member->group = group;
	member->wake_fd = wake_fd;
	member->next = group->members;
	group->members = member;
	pthread_mutex_unlock(&group->limiter.lock);
}

void rate_group_leave(struct rate_member *member)
{
	struct rate_group *group = member->group;
	struct rate_member **link;

	if (!group)
		return;
	pthread_mutex_lock(&group->limiter.lock);
	for (link = &group->members; *link != member; link = &(*link)->next)
		;
	*link = member->next;
	wake_all(group); /* one may have let it go first */
	pthread_mutex_unlock(&group->limiter.lock);
	member->group = NULL;
}

static bool is_waiting(const struct rate_member *member, uint64_t now_ns)
{
	return member->due_ns != 0 && now_ns < member->due_ns + RATE_GROUP_LATE_NS;
}

/* The one that a member has to let go first, or NULL. */
static const struct rate_member *first_before(const struct rate_member *member, uint64_t now_ns)
{
	const struct rate_member *first = NULL;
	uint64_t served_ns = member->served_ns;

	for (const struct rate_member *each = member->group->members; each; each = each->next) {
		if (each == member || !is_waiting(each, now_ns) ||
		    each->served_ns + (first ? 0 : SLACK_NS) >= served_ns)
			continue;
		first = each;
		served_ns = each->served_ns;
	}
	return first;
}

/* How long the budget needs to pay for one request. */
static uint64_t cost_ns(const struct rate_limiter *limiter, uint32_t bytes)
{
	uint64_t of_op = limiter->ops.rate ? NANO / limiter->ops.rate : 0;
	uint64_t of_bytes = limiter->bytes.rate ? (uint64_t)bytes * NANO / limiter->bytes.rate : 0;

	return of_op > of_bytes ? of_op : of_bytes;
}

/* With the lock held. */
static uint64_t take(struct rate_member *member, uint32_t bytes, uint64_t now_ns)
{
	struct rate_group *group = member->group;
	const struct rate_member *first;
	uint64_t wait_ns;

	if (!is_waiting(member, now_ns) && member->served_ns + SLACK_NS < group->level_ns)
		member->served_ns = group->level_ns - SLACK_NS;
	first = first_before(member, now_ns);
	if (first) {
		/* Not for long at a time: what the other asked for last may be less by now. */
		wait_ns = first->due_ns > now_ns ? first->due_ns - now_ns : 0;
		if (wait_ns > RATE_GROUP_LATE_NS)
			wait_ns = RATE_GROUP_LATE_NS;
		wait_ns += TURN_NS;
	} else {
		wait_ns = rate_limiter_wait_locked(&group->limiter, bytes, now_ns);
	}
	if (wait_ns > 0) {
		member->due_ns = now_ns + wait_ns;
		return wait_ns;
	}
	rate_limiter_take_locked(&group->limiter, bytes);
	member->due_ns = 0;
	if (group->level_ns < member->served_ns)
		group->level_ns = member->served_ns;
	member->served_ns += cost_ns(&group->limiter, bytes);
	return 0;
}

uint64_t rate_group_take(struct rate_member *member, struct rate_limiter *own, uint32_t bytes,
			 uint64_t now_ns)
{
	/* Guest-controlled: bytes. */
	struct rate_limiter *shared = &member->group->limiter;
	uint64_t wait_ns = own ? rate_limiter_wait(own, bytes, now_ns) : 0;

	if (rate_limiter_is_limited(shared)) {
		pthread_mutex_lock(&shared->lock);
		if (wait_ns > 0)
			member->due_ns = 0; /* nobody has to let it go first */
		else
			wait_ns = take(member, bytes, now_ns);
		pthread_mutex_unlock(&shared->lock);
	}
	if (wait_ns == 0 && own)
		rate_limiter_charge(own, bytes);
	return wait_ns;
}
