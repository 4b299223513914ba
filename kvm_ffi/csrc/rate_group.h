/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * One budget that several engines share: the limiter of token_bucket.h, and turns.
 *
 * Who asks takes what there is. But what each member has had is kept, as the time that the budget
 * needs to pay for it, and one that is more than a millisecond ahead of a member that waits lets
 * that go first. So members that always have requests get the same, within a millisecond's worth
 * and a request, however their requests differ in size. And what waits does so no longer than the
 * budget needs to pay, for each of the others, for two milliseconds, a request of theirs and one of
 * its own. A member that asked for nothing while others took is owed a millisecond, no more. One
 * that does not come for its turn within RATE_GROUP_LATE_NS (its thread is held up by a dead disk)
 * loses it, so nobody waits for it.
 */
#ifndef HOSTEL_RATE_GROUP_H
#define HOSTEL_RATE_GROUP_H

#include "token_bucket.h"

/* No bucket holds less than is added in this time, so what is kept for a member that comes late
 * is not lost. */
#define RATE_GROUP_LATE_NS 10000000u

struct rate_member;

struct rate_group {
	struct rate_limiter limiter; /* its lock is that of all below, and of the members */
	struct rate_member *members;
	uint64_t level_ns; /* the most that one had had when it took something */
};

/* An engine in a group; its thread alone asks. */
struct rate_member {
	struct rate_group *group; /* NULL: it is in none */
	struct rate_member *next;
	int wake_fd; /* signalled when it has reason to ask again before its time */
	uint64_t served_ns; /* what it has had, and what it missed by not asking */
	uint64_t due_ns; /* when it will ask again for what it waits for; 0: it does not wait */
};

void rate_group_init(struct rate_group *group);
/* After the last member has left. */
void rate_group_deinit(struct rate_group *group);
/* As rate_limiter_set(); those that wait are woken. Any thread. */
int rate_group_set(struct rate_group *group, const struct rate_limit *limit, uint64_t now_ns);

/* The group must outlive its members, and wake_fd be open until they have left; a member starts as
 * zeros. leave: nothing happens to one that is in no group. */
void rate_group_join(struct rate_group *group, struct rate_member *member, int wake_fd);
void rate_group_leave(struct rate_member *member);
/* As rate_limiter_take(), from the group and from the member's own limiter, unless that is NULL:
 * from both or from neither. The wait is one to ask again after; it may be another one then. */
uint64_t rate_group_take(struct rate_member *member, struct rate_limiter *own, uint32_t bytes,
			 uint64_t now_ns);

#endif
