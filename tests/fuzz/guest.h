/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * A guest made of fuzzer input: two regions of memory with a hole between them, in heap
 * blocks of exactly their size, so that AddressSanitizer sees one byte too many.
 */
#ifndef HOSTEL_FUZZ_GUEST_H
#define HOSTEL_FUZZ_GUEST_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "guest_mem.h"
#include "virtqueue.h"

#define LOW_SIZE 0x2000u
#define HIGH_GPA 0x4000u
#define HIGH_SIZE 0x800u

/* The first ring; a second one lies SECOND_RING behind it. Queue size 8 at most, so a
 * whole interesting guest is a few hundred bytes. */
#define DESC_GPA 0x0u
#define AVAIL_GPA 0x80u
#define USED_GPA 0xa0u
#define SECOND_RING 0x100u

#define REQUIRE(claim)                                                                             \
	do {                                                                                       \
		if (!(claim))                                                                      \
			__builtin_trap();                                                          \
	} while (0)

struct input {
	const uint8_t *data;
	size_t left;
};

static inline uint8_t next_byte(struct input *input)
{
	if (input->left == 0)
		return 0;
	input->left--;
	return *input->data++;
}

static inline uint16_t next_u16(struct input *input)
{
	uint16_t low = next_byte(input);

	return (uint16_t)(low | next_byte(input) << 8);
}

/* Take n bytes at most; how many there were. */
static inline size_t next_bytes(struct input *input, uint8_t *to, size_t n)
{
	if (n > input->left)
		n = input->left;
	memcpy(to, input->data, n);
	input->data += n;
	input->left -= n;
	return n;
}

static inline void guest_init(struct guest_mem *mem)
{
	memset(mem, 0, sizeof(*mem));
	mem->n_regions = 2;
	mem->regions[0] = (struct guest_region){0, LOW_SIZE, aligned_alloc(4096, LOW_SIZE)};
	mem->regions[1] = (struct guest_region){HIGH_GPA, HIGH_SIZE, malloc(HIGH_SIZE)};
	memset(mem->regions[0].hva, 0, LOW_SIZE);
	memset(mem->regions[1].hva, 0, HIGH_SIZE);
}

static inline void guest_deinit(struct guest_mem *mem)
{
	free(mem->regions[0].hva);
	free(mem->regions[1].hva);
}

/* The driver changes up to four bytes of the rings and tables behind the device's back. */
static inline void guest_mutate(struct guest_mem *mem, struct input *input)
{
	for (int n = next_byte(input) & 3; n >= 0; n--) {
		uint16_t at = next_u16(input) % 0x400;

		mem->regions[0].hva[at] = next_byte(input);
	}
}

/* Every buffer of a chain is inside one region, and the sums are right. */
static inline void guest_check_chain(const struct guest_mem *mem, const struct desc_chain *chain,
				     uint32_t size)
{
	uint64_t readable = 0, writable = 0;

	REQUIRE(chain->n_readable + chain->n_writable <= size);
	for (uint32_t i = 0; i < chain->n_readable + chain->n_writable; i++) {
		const uint8_t *base = chain->iov[i].iov_base;
		uint64_t len = chain->iov[i].iov_len;
		int is_inside = 0;

		for (uint32_t r = 0; r < mem->n_regions; r++) {
			const struct guest_region *region = &mem->regions[r];

			is_inside |=
			    base >= region->hva && base + len <= region->hva + region->size;
		}
		REQUIRE(is_inside && len > 0);
		*(i < chain->n_readable ? &readable : &writable) += len;
	}
	REQUIRE(readable == chain->readable_len && writable == chain->writable_len);
	REQUIRE(readable + writable <= UINT32_MAX);
}

#endif
