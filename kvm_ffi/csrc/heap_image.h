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
 */
#ifndef HOSTEL_HEAP_IMAGE_H
#define HOSTEL_HEAP_IMAGE_H

#include <stdint.h>

/* Lives as long as its process; a fork inherits it. */
struct heap_image {
	int memfd;
	/* Of the calling process's own /proc/self, which is why a fork opens its own. */
	int maps_fd;
	int pagemap_fd;
	int task_fd;
	uint64_t deadline_ns;
};

/* Move the process's private writable mappings into a memfd, at the same addresses with the same
 * content; its stack stays, and what forks do not simply inherit. -EBUSY unless the process has one
 * thread. After another -errno some may have been moved, which works as well. */
int heap_image_create(struct heap_image *image);

/* In a fork: make the image its own, before it gives up the right to look into /proc/self. */
int heap_image_attach(struct heap_image *image);

/* Drop every page of the image that the process has not changed; the number of pages that it
 * keeps. Once: what attach() opened is closed after that. Its other threads stand still meanwhile,
 * for 10 ms at most. -EAGAIN when the time was up, -ETIMEDOUT when a thread did not stand still:
 * then some is left, and another call goes on. */
int64_t heap_image_give_back(struct heap_image *image);

#endif
