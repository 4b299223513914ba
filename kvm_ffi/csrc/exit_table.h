/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * Which exits go to Python, and what C answers to the others. One table per VM, read by all vCPU
 * threads.
 *
 * Ports are looked up in a bitmap (each byte is read and written whole), MMIO ranges by binary
 * search under a sequence count: a lookup that met an update is done again, so readers share no
 * written cache line. Updates come from Python, one at a time (its lock). PCI config space belongs
 * to Python, which writes the bytes; C only reads them for the guest.
 */
#ifndef HOSTEL_EXIT_TABLE_H
#define HOSTEL_EXIT_TABLE_H

#include <stdbool.h>
#include <stdint.h>

#include "uart16550.h"

enum {
	EXIT_TABLE_MAX_MMIO = 256,
	EXIT_TABLE_MAX_UARTS = 4,
	EXIT_TABLE_PCI_SLOTS = 32,
	EXIT_TABLE_PCI_SLOT_SIZE = 4096,
};

struct exit_table;

/* pci_config: EXIT_TABLE_PCI_SLOTS * EXIT_TABLE_PCI_SLOT_SIZE bytes that outlive the table. NULL:
 * no memory. */
struct exit_table *exit_table_create(uint8_t *pci_config);
void exit_table_destroy(struct exit_table *table);

int exit_table_set_pio(struct exit_table *table, uint32_t port, uint32_t length, bool is_claimed);
int exit_table_claim_mmio(struct exit_table *table, uint64_t gpa, uint64_t length);
int exit_table_unclaim_mmio(struct exit_table *table, uint64_t gpa, uint64_t length);
int exit_table_attach_uart(struct exit_table *table, struct uart16550 *uart, uint32_t port);
void exit_table_set_ecam(struct exit_table *table, uint64_t gpa, uint64_t length);
void exit_table_set_pci_present(struct exit_table *table, uint32_t slot, bool is_present);
/* Config reads that touch [start, end) of a present slot exit to Python; start == end: none do. */
void exit_table_trap_pci_reads(struct exit_table *table, uint32_t slot, uint32_t start,
			       uint32_t end);
uint32_t exit_table_pci_address(struct exit_table *table);
void exit_table_set_pci_address(struct exit_table *table, uint32_t address);

/* What becomes of one access. */
enum access_result {
	ACCESS_UNCLAIMED, /* nobody's: a read got all-ones, a write went nowhere */
	ACCESS_UART,
	ACCESS_PCI, /* served from config space, or nothing there to serve */
	ACCESS_PYTHON,
	ACCESS_PCI_PYTHON, /* *pci_addr says what is accessed: slot << 12 | register */
};

/* data holds size bytes; a read that C serves fills them. */
enum access_result exit_table_pio(struct exit_table *table, uint16_t port, uint32_t size,
				  bool is_write, uint8_t *data, uint64_t *pci_addr);
enum access_result exit_table_mmio(struct exit_table *table, uint64_t gpa, uint32_t size,
				   bool is_write, uint8_t *data, uint64_t *pci_addr);

#endif
