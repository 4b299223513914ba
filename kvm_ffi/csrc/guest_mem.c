/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "guest_mem.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <unistd.h>

/* Below this, giving pages back costs more than clearing them. */
#define ZERO_BY_REMOVE_MIN ((uint64_t)256 * 1024)

void *guest_mem_ptr(const struct guest_mem *mem, uint64_t gpa, uint64_t len)
{
	/* Guest-controlled: gpa, len. No sum of the two is formed: it could wrap. */
	for (uint32_t i = 0; i < mem->n_regions; i++) {
		const struct guest_region *region = &mem->regions[i];
		uint64_t offset = gpa - region->gpa;

		if (gpa < region->gpa || offset >= region->size)
			continue;
		if (len > region->size - offset)
			return NULL;
		return region->hva + offset;
	}
	return NULL;
}

int guest_mem_read(const struct guest_mem *mem, uint64_t gpa, void *buf, uint64_t len)
{
	/* Guest-controlled: gpa, len, and the bytes while they are copied. */
	const void *from = guest_mem_ptr(mem, gpa, len);

	if (!from)
		return -EFAULT;
	memcpy(buf, from, len);
	return 0;
}

int guest_mem_write(const struct guest_mem *mem, uint64_t gpa, const void *buf, uint64_t len)
{
	/* Guest-controlled: gpa, len. */
	void *to = guest_mem_ptr(mem, gpa, len);

	if (!to)
		return -EFAULT;
	memcpy(to, buf, len);
	return 0;
}

int guest_mem_zero(const struct guest_mem *mem, uint64_t gpa, uint64_t len)
{
	/* Guest-controlled: gpa, len. */
	uint8_t *start = guest_mem_ptr(mem, gpa, len);
	uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);

	if (!start)
		return -EFAULT;
	if (len >= ZERO_BY_REMOVE_MIN) {
		uint8_t *first = start + (-(uintptr_t)start & (page - 1));
		uint8_t *last = start + len - ((uintptr_t)(start + len) & (page - 1));

		/* Refused on a private mapping and on some file systems: clear by hand. */
		if (madvise(first, (size_t)(last - first), MADV_REMOVE) == 0) {
			memset(start, 0, (size_t)(first - start));
			memset(last, 0, (size_t)(start + len - last));
			return 0;
		}
	}
	memset(start, 0, len);
	return 0;
}

int guest_mem_map(struct guest_mem *mem, int memfd, uint64_t file_offset, uint64_t gpa,
		  uint64_t size)
{
	struct guest_region *region;
	void *hva;

	if (mem->n_regions >= GUEST_MEM_MAX_REGIONS)
		return -ENOSPC;
	hva = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memfd,
		   (off_t)file_offset);
	if (hva == MAP_FAILED)
		return -errno;
	/* A worker's core dump must not hold its guest's memory. */
	if (madvise(hva, size, MADV_DONTDUMP) < 0) {
		int err = errno;

		munmap(hva, size);
		return -err;
	}
	region = &mem->regions[mem->n_regions++];
	region->gpa = gpa;
	region->size = size;
	region->hva = hva;
	return 0;
}

void guest_mem_unmap_all(struct guest_mem *mem)
{
	while (mem->n_regions > 0) {
		struct guest_region *region = &mem->regions[--mem->n_regions];

		munmap(region->hva, region->size);
	}
}
