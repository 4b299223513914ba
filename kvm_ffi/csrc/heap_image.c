/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "heap_image.h"

#include "stand_still.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES 4096u
/* On the stack, which is no part of the image. A worker has some 150 mappings, of 100 bytes in maps
 * and 800 in smaps. */
#define MAPS_BYTES (512u * 1024)
/* The guest stands still meanwhile. */
#define GIVE_BACK_LIMIT_NS (10 * 1000 * 1000)
#define EXIT_WAIT_MS 1000
/* Room behind the image: mremap(2) may let a mapping grow past its end. */
#define SPARE_BYTES (1ll << 30)
/* Also how many pages are compared between two looks at the clock. */
#define PAGEMAP_BATCH 64u
/* Linux Documentation/admin-guide/mm/pagemap.rst. */
#define PAGEMAP_PRESENT (1ull << 63)
#define PAGEMAP_SWAPPED (1ull << 62)
#define PAGEMAP_FILE (1ull << 61)
#define PAGEMAP_EXCLUSIVE (1ull << 56)

struct mapping {
	uintptr_t start;
	uintptr_t end;
	uint64_t offset;
	dev_t device;
	uint64_t inode;
	bool is_private_writable;
	bool is_stack;
	bool is_special; /* known from smaps alone */
};

typedef int visit_mapping(const struct heap_image *image, const struct mapping *mapping,
			  void *user);

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static bool has_one_thread(void)
{
	const struct timespec pause = {.tv_nsec = 1000 * 1000};
	struct stat status;

	/* A thread that was joined is in the directory for a moment still. */
	for (int i = 0; i < EXIT_WAIT_MS; i++) {
		/* One directory a thread, beside "." and "..". */
		if (stat("/proc/self/task", &status) == 0 && status.st_nlink == 3)
			return true;
		nanosleep(&pause, NULL);
	}
	return false;
}

static ssize_t read_all(int fd, char *buffer, size_t bytes)
{
	size_t done = 0;
	ssize_t got;

	while ((got = pread(fd, buffer + done, bytes - done, (off_t)done)) > 0)
		done += (size_t)got;
	if (got < 0)
		return -errno;
	return done == bytes ? -E2BIG : (ssize_t)done;
}

/* One line of /proc/PID/maps (proc(5)): start-end perms offset dev inode name. */
static bool parse_mapping(const char *line, struct mapping *ret)
{
	char perms[5];
	unsigned int major, minor;
	int name_at = 0;

	if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s %" SCNx64 " %x:%x %" SCNu64 " %n",
		   &ret->start, &ret->end, perms, &ret->offset, &major, &minor, &ret->inode,
		   &name_at) != 7)
		return false;
	ret->device = makedev(major, minor);
	ret->is_private_writable = strcmp(perms, "rw-p") == 0;
	ret->is_stack = strncmp(line + name_at, "[stack]", 7) == 0;
	ret->is_special = false;
	return true;
}

/* Whether a mapping is more than memory, by its line "VmFlags:" in smaps: not for forks, wiped in
 * them, droppable, of a device, locked, or a shadow stack. */
static bool has_special_flags(const char *line)
{
	static const char *const special[] = {" dc", " wf", " dp", " io", " pf", " lo", " ss"};

	for (size_t i = 0; i < sizeof(special) / sizeof(special[0]); i++) {
		if (strstr(line, special[i]))
			return true;
	}
	return false;
}

/* Call `visit` for each mapping until one fails. The text, of maps or smaps, is read before the
 * first call, since a visit may change the mappings. */
static int visit_mappings(const struct heap_image *image, int text_fd, visit_mapping *visit,
			  void *user)
{
	char text[MAPS_BYTES];
	ssize_t got = read_all(text_fd, text, sizeof(text) - 1);
	struct mapping next, mapping = {0};
	char *line, *rest;
	int err = 0;

	if (got < 0)
		return (int)got;
	text[got] = '\0';
	for (line = strtok_r(text, "\n", &rest); line && err == 0;
	     line = strtok_r(NULL, "\n", &rest)) {
		if (strncmp(line, "VmFlags:", 8) == 0)
			mapping.is_special = has_special_flags(line);
		if (!parse_mapping(line, &next))
			continue;
		/* Now all is known of the one before. */
		if (mapping.is_private_writable)
			err = visit(image, &mapping, user);
		mapping = next;
	}
	if (err == 0 && mapping.is_private_writable)
		err = visit(image, &mapping, user);
	return err;
}

/* With no signal in between: its handler would write to memory that is being compared or moved. */
static int visit_undisturbed(const struct heap_image *image, int text_fd, visit_mapping *visit,
			     void *user)
{
	sigset_t all, before;
	int ret;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	ret = visit_mappings(image, text_fd, visit, user);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return ret;
}

static bool is_zero(const uint8_t *page)
{
	return page[0] == 0 && memcmp(page, page + 1, PAGE_BYTES - 1) == 0;
}

/* Copy a range to the memfd's end, untouched pages as holes. */
static int copy_out(int memfd, const struct mapping *mapping, off_t offset)
{
	size_t bytes = mapping->end - mapping->start;

	if (ftruncate(memfd, offset + (off_t)bytes) < 0)
		return -errno;
	for (size_t at = 0; at < bytes; at += PAGE_BYTES) {
		const uint8_t *page = (const uint8_t *)(mapping->start + at);

		if (is_zero(page))
			continue;
		if (pwrite(memfd, page, PAGE_BYTES, offset + (off_t)at) != PAGE_BYTES)
			return -EIO;
	}
	return 0;
}

static int move_mapping(const struct heap_image *image, const struct mapping *mapping, void *user)
{
	size_t bytes = mapping->end - mapping->start;
	struct stat status;
	int err;

	(void)user;
	if (mapping->is_stack || mapping->is_special)
		return 0;
	if (fstat(image->memfd, &status) < 0)
		return -errno;
	err = copy_out(image->memfd, mapping, status.st_size);
	if (err < 0)
		return err;
	/* Nothing has written to the range since: this is the only thread, it takes no signal, and
	 * its own memory is on the stack. */
	if (mmap((void *)mapping->start, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED,
		 image->memfd, status.st_size) == MAP_FAILED)
		return -errno;
	return 0;
}

static void detach(struct heap_image *image)
{
	int *fds[] = {&image->maps_fd, &image->pagemap_fd, &image->task_fd};

	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
		if (*fds[i] >= 0)
			close(*fds[i]);
		*fds[i] = -1;
	}
}

int heap_image_attach(struct heap_image *image)
{
	int err;

	image->maps_fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	image->pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	image->task_fd = open("/proc/self/task", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (image->maps_fd >= 0 && image->pagemap_fd >= 0 && image->task_fd >= 0)
		return stand_still_install();
	err = -errno;
	detach(image);
	return err;
}

/* Nobody may change the image any more, a worker that a guest has taken over least of all. */
static int seal(const struct heap_image *image)
{
	unsigned int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL;
	struct stat status;

	if (fstat(image->memfd, &status) < 0 ||
	    ftruncate(image->memfd, status.st_size + SPARE_BYTES) < 0 ||
	    fcntl(image->memfd, F_ADD_SEALS, seals) < 0)
		return -errno;
	return 0;
}

int heap_image_create(struct heap_image *image)
{
	int smaps_fd, err;

	if (!has_one_thread())
		return -EBUSY;
	smaps_fd = open("/proc/self/smaps", O_RDONLY | O_CLOEXEC);
	if (smaps_fd < 0)
		return -errno;
	image->maps_fd = image->pagemap_fd = image->task_fd = -1;
	image->memfd = memfd_create("hostel-heap", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (image->memfd < 0) {
		err = -errno;
	} else {
		err = visit_undisturbed(image, smaps_fd, move_mapping, NULL);
		if (err == 0)
			err = seal(image);
		if (err < 0)
			close(image->memfd);
	}
	close(smaps_fd);
	return err;
}

static int drop(uintptr_t start, uintptr_t end)
{
	if (start < end && madvise((void *)start, end - start, MADV_DONTNEED) < 0)
		return -errno;
	return 0;
}

/* Whether the process has a copy of its own of a page, and the copy differs. */
static bool is_changed(const struct heap_image *image, uint64_t entry, const uint8_t *page,
		       uint64_t offset)
{
	uint8_t original[PAGE_BYTES];

	if (entry & PAGEMAP_SWAPPED)
		return true; /* not worth reading it back */
	if (!(entry & PAGEMAP_PRESENT) || (entry & PAGEMAP_FILE))
		return false;
	/* Read, not mapped: page faults would cost several times as much. */
	return pread(image->memfd, original, sizeof(original), (off_t)offset) !=
		   (ssize_t)sizeof(original) ||
	       memcmp(page, original, PAGE_BYTES) != 0;
}

static int read_entries(const struct heap_image *image, uintptr_t page, uint64_t *entries, size_t n)
{
	size_t bytes = n * sizeof(entries[0]);
	off_t at = (off_t)(page / PAGE_BYTES * sizeof(entries[0]));

	return pread(image->pagemap_fd, entries, bytes, at) == (ssize_t)bytes ? 0 : -EIO;
}

static size_t batch_at(const struct mapping *mapping, uintptr_t page)
{
	size_t left = (mapping->end - page) / PAGE_BYTES;

	return left < PAGEMAP_BATCH ? left : PAGEMAP_BATCH;
}

/* How far giving back has come. */
struct progress {
	uintptr_t next; /* all below is done */
	int64_t kept;
};

static int give_back_mapping(const struct heap_image *image, const struct mapping *mapping,
			     struct progress *progress)
{
	uint64_t entries[PAGEMAP_BATCH];
	uintptr_t page = mapping->start > progress->next ? mapping->start : progress->next;
	uintptr_t unchanged_since = page;
	int err;

	while (page < mapping->end) {
		size_t n = batch_at(mapping, page);

		err = read_entries(image, page, entries, n);
		if (err < 0)
			return err;
		if (now_ns() > image->deadline_ns) {
			err = drop(unchanged_since, page);
			progress->next = page;
			return err < 0 ? err : -EAGAIN;
		}
		for (size_t i = 0; i < n; i++, page += PAGE_BYTES) {
			uint64_t offset = mapping->offset + (page - mapping->start);

			if (!is_changed(image, entries[i], (const uint8_t *)page, offset))
				continue;
			err = drop(unchanged_since, page);
			if (err < 0)
				return err;
			++progress->kept;
			unchanged_since = page + PAGE_BYTES;
		}
	}
	return drop(unchanged_since, mapping->end);
}

/* Whether it is of the image, by what is mapped there now: the process may have unmapped a part,
 * and put something else in its place. */
static int is_of_image(const struct heap_image *image, const struct mapping *mapping)
{
	struct stat status;

	if (fstat(image->memfd, &status) < 0)
		return -errno;
	return mapping->inode == status.st_ino && mapping->device == status.st_dev;
}

static int visit_give_back(const struct heap_image *image, const struct mapping *mapping,
			   void *user)
{
	int ret = is_of_image(image, mapping);

	return ret <= 0 ? ret : give_back_mapping(image, mapping, user);
}

/* What learning fills; `user` of its visits. */
struct learned {
	struct page_range *ranges;
	uint32_t max;
	uint32_t n;
};

static void learn_page(struct learned *learned, uintptr_t page)
{
	struct page_range *last = learned->n ? &learned->ranges[learned->n - 1] : NULL;

	if (last && last->end == page)
		last->end += PAGE_BYTES;
	else if (learned->n < learned->max)
		learned->ranges[learned->n++] = (struct page_range){page, page + PAGE_BYTES};
}

static int visit_learn(const struct heap_image *image, const struct mapping *mapping, void *user)
{
	/* A copy that is its parent's too is no work of this fork. */
	const uint64_t own = PAGEMAP_PRESENT | PAGEMAP_EXCLUSIVE;
	uint64_t entries[PAGEMAP_BATCH];
	uintptr_t page = mapping->start;
	int ret = is_of_image(image, mapping);

	if (ret <= 0)
		return ret;
	while (page < mapping->end) {
		size_t n = batch_at(mapping, page);

		ret = read_entries(image, page, entries, n);
		if (ret < 0)
			return ret;
		for (size_t i = 0; i < n; i++, page += PAGE_BYTES) {
			if ((entries[i] & own) == own && !(entries[i] & PAGEMAP_FILE))
				learn_page(user, page);
		}
	}
	return 0;
}

int64_t heap_image_learn(struct heap_image *image, struct page_range *ranges, uint32_t max)
{
	struct learned learned = {ranges, max, 0};
	int ret = visit_undisturbed(image, image->maps_fd, visit_learn, &learned);

	return ret < 0 ? ret : (int64_t)learned.n;
}

int heap_image_unshare(const struct page_range *ranges, uint32_t n)
{
	int err = 0;

	for (uint32_t i = 0; i < n; i++) {
		size_t bytes = ranges[i].end - ranges[i].start;

		if (madvise((void *)ranges[i].start, bytes, MADV_POPULATE_WRITE) < 0)
			err = -errno;
	}
	return err;
}

int64_t heap_image_give_back(struct heap_image *image)
{
	/* Another thread could write to a page between its comparison and its drop. */
	struct progress progress = {image->given_back_to, image->kept};
	int ret = stand_still_begin(image->task_fd);

	if (ret == 0) {
		image->deadline_ns = now_ns() + GIVE_BACK_LIMIT_NS;
		ret = visit_undisturbed(image, image->maps_fd, visit_give_back, &progress);
		stand_still_end();
	}
	image->given_back_to = progress.next;
	image->kept = progress.kept;
	if (ret < 0)
		return ret;
	detach(image);
	return image->kept;
}
