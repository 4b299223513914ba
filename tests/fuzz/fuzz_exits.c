/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* Input: operations; accesses as a guest makes them, and what the machine claims meanwhile. */
#include "exit_table.h"
#include "guest.h"

#define ECAM_GPA 0xe0000000u
#define ECAM_SIZE 0x100000u
#define CONFIG_SIZE ((size_t)EXIT_TABLE_PCI_SLOTS * EXIT_TABLE_PCI_SLOT_SIZE)

static uint64_t next_u64(struct input *input)
{
	uint64_t value = 0;

	next_bytes(input, (uint8_t *)&value, sizeof(value));
	return value;
}

/* Near what is interesting, or anywhere. */
static uint64_t next_gpa(struct input *input)
{
	switch (next_byte(input) % 4) {
	case 0:
		return ECAM_GPA + next_u16(input) * 17u;
	case 1:
		return 0xc0000000u + next_u16(input);
	case 2:
		return UINT64_MAX - next_byte(input);
	default:
		return next_u64(input);
	}
}

static void check(enum access_result result, uint64_t pci_addr, uint32_t size)
{
	REQUIRE(result <= ACCESS_PCI_PYTHON);
	if (result == ACCESS_PCI_PYTHON)
		REQUIRE(pci_addr % EXIT_TABLE_PCI_SLOT_SIZE + size <= EXIT_TABLE_PCI_SLOT_SIZE &&
			pci_addr < CONFIG_SIZE);
}

static void access_port(struct exit_table *table, struct input *input)
{
	/* Exactly as large as the access, so that AddressSanitizer sees one byte too many. */
	uint8_t shift = next_byte(input) % 3;
	uint32_t size = 1u << shift;
	uint8_t *data = malloc(size);
	uint16_t port = next_u16(input);
	uint64_t pci_addr = 0;

	if (port & 1)
		port = (uint16_t)(0xcf8 + (port >> 1) % 8);
	next_bytes(input, data, size);
	check(exit_table_pio(table, port, size, next_byte(input) & 1, data, &pci_addr), pci_addr,
	      size);
	free(data);
}

static void access_memory(struct exit_table *table, struct input *input)
{
	uint32_t size = 1 + next_byte(input) % 8u;
	uint8_t *data = malloc(size);
	uint64_t gpa = next_gpa(input);
	uint64_t pci_addr = 0;

	next_bytes(input, data, size);
	check(exit_table_mmio(table, gpa, size, next_byte(input) & 1, data, &pci_addr), pci_addr,
	      size);
	free(data);
}

static void change(struct exit_table *table, struct input *input)
{
	uint32_t slot = next_byte(input) % EXIT_TABLE_PCI_SLOTS;
	uint64_t gpa = next_gpa(input);
	uint32_t start = next_u16(input) % EXIT_TABLE_PCI_SLOT_SIZE;

	switch (next_byte(input) % 6) {
	case 0:
		exit_table_claim_mmio(table, gpa, next_u16(input));
		break;
	case 1:
		exit_table_unclaim_mmio(table, gpa, next_u16(input));
		break;
	case 2:
		exit_table_set_pio(table, start * 16, next_byte(input), next_byte(input) & 1);
		break;
	case 3:
		exit_table_set_pci_present(table, slot, next_byte(input) & 1);
		break;
	case 4:
		exit_table_trap_pci_reads(table, slot, start, start + 4);
		break;
	case 5:
		exit_table_set_ecam(table, ECAM_GPA, next_byte(input) & 1 ? ECAM_SIZE : 0);
		break;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {data, size};
	uint8_t *config = calloc(1, CONFIG_SIZE);
	struct exit_table *table = exit_table_create(config);
	struct uart16550 *uart = uart16550_create(-1, -1);

	REQUIRE(table != NULL && uart != NULL);
	exit_table_set_ecam(table, ECAM_GPA, ECAM_SIZE);
	exit_table_set_pci_present(table, 0, true);
	exit_table_set_pci_present(table, EXIT_TABLE_PCI_SLOTS - 1, true);
	REQUIRE(exit_table_attach_uart(table, uart, 0x3f8) == 0);
	while (input.left > 0) {
		switch (next_byte(&input) % 4) {
		case 0:
			access_port(table, &input);
			break;
		case 1:
		case 2:
			access_memory(table, &input);
			break;
		case 3:
			change(table, &input);
			break;
		}
	}
	exit_table_destroy(table);
	uart16550_destroy(uart);
	free(config);
	return 0;
}
