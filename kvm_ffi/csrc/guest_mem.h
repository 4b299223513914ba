/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * Guest RAM: a few regions of one memfd, and the one checked door from a
 * guest-physical address to a host pointer.
 *
 * The table is filled before any vCPU or engine runs and is read-only from then
 * on, so readers take no lock. What the pointers lead to is shared with the
 * guest's vCPUs: copy a value once, bound the copy, use the copy.
 */
#ifndef HOSTEL_GUEST_MEM_H
#define HOSTEL_GUEST_MEM_H

#include <stdint.h>

#define GUEST_MEM_MAX_REGIONS 16

struct guest_region {
	uint64_t gpa;
	uint64_t size;
	uint8_t *hva;
};

struct guest_mem {
	uint32_t n_regions;
	struct guest_region regions[GUEST_MEM_MAX_REGIONS];
};

/* Host pointer to [gpa, gpa + len), or NULL unless wholly inside one region.
 * len 0 asks only whether gpa itself is inside. */
void *guest_mem_ptr(const struct guest_mem *mem, uint64_t gpa, uint64_t len);

/* Copy in or out: 0, or -EFAULT unless the range is inside one region. */
int guest_mem_read(const struct guest_mem *mem, uint64_t gpa, void *buf, uint64_t len);
int guest_mem_write(const struct guest_mem *mem, uint64_t gpa, const void *buf, uint64_t len);

/* Zero a range; whole pages are given back to the host. */
int guest_mem_zero(const struct guest_mem *mem, uint64_t gpa, uint64_t len);

/* Map [file_offset, file_offset + size) of a memfd as a region at gpa (all three
 * page aligned, by the caller); append it to the table. */
int guest_mem_map(struct guest_mem *mem, int memfd, uint64_t file_offset, uint64_t gpa,
		  uint64_t size);
/* Unmap every region; nothing may use the table any more. */
void guest_mem_unmap_all(struct guest_mem *mem);

#endif
