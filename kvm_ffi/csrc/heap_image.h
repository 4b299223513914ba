/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * The writable memory of a process as a sealed file that its forks map privately.
 *
 * A fork of a Python process unshares a page by merely counting a reference in it, and nothing
 * makes the page shared again, although most of these counts return to what they were. On a
 * private mapping of a file there is a way back: MADV_DONTNEED drops the copy, and the next
 * access finds the file's page again. So the zygote moves its memory into a memfd, and a worker
 * drops what it holds of it whenever that is equal (madvise(2), MADV_DONTNEED).
 *
 * Most of a fork's first milliseconds go into the page faults of that unsharing, one by one. Which
 * pages those are is the same for each fork that does the same. So one is sent ahead to learn them,
 * and the others copy them in few system calls (MADV_POPULATE_WRITE).
 */
#ifndef HOSTEL_HEAP_IMAGE_H
#define HOSTEL_HEAP_IMAGE_H

#include <stdint.h>

struct page_range {
	uintptr_t start;
	uintptr_t end;
};

/* Lives as long as its process; a fork inherits it. */
struct heap_image {
	int memfd;
	/* Of the calling process's own /proc/self, which is why a fork opens its own. */
	int maps_fd;
	int pagemap_fd;
	int task_fd;
	uint64_t deadline_ns;
	/* Where the next call goes on, and how many pages those before it have kept. */
	uintptr_t given_back_to;
	int64_t kept;
};

/* Move the process's private writable mappings into a memfd, at the same addresses with the same
 * content; its stack stays, and what forks do not simply inherit. -EBUSY unless the process has one
 * thread. After another -errno some may have been moved, which works as well. */
int heap_image_create(struct heap_image *image);

/* In a fork: make the image its own, before it gives up the right to look into /proc/self. */
int heap_image_attach(struct heap_image *image);

/* In a fork that attached, and has done what others are to do: the ranges of pages that it
 * unshared, `max` of them at most; their number. */
int64_t heap_image_learn(struct heap_image *image, struct page_range *ranges, uint32_t max);

/* In a fork: unshare pages that it will write to anyway. -errno leaves some of them for page
 * faults; so does Linux before 5.14, with -EINVAL. */
int heap_image_unshare(const struct page_range *ranges, uint32_t n);

/* Drop every page of the image that the process has not changed; the number of pages that it
 * keeps. Once: what attach() opened is closed after that. Its other threads stand still meanwhile,
 * for 10 ms at most. -EAGAIN when the time was up, -ETIMEDOUT when a thread did not stand still:
 * then some is left, and another call goes on. */
int64_t heap_image_give_back(struct heap_image *image);

#endif
