/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#include "exit_table.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

enum {
	N_PORTS = 65536,
	PCI_CONFIG_ADDRESS = 0xcf8,
	PCI_CONFIG_DATA = 0xcfc,
};

#define PCI_ADDRESS_ENABLE 0x80000000u
/* Bus and function: only function 0 of each slot of bus 0 exists. */
#define PCI_ADDRESS_ELSEWHERE 0x00ff0700u
#define ECAM_ELSEWHERE (~(uint64_t)0xf8fff)

struct mmio_range {
	uint64_t start;
	uint64_t last;
};

struct uart_at {
	struct uart16550 *uart;
	uint32_t port;
};

struct exit_table {
	/* Odd while ranges[] is being changed. */
	uint32_t sequence;
	uint32_t n_ranges;
	uint32_t n_uarts;
	uint32_t pci_present; /* a bit per slot */
	uint32_t pci_address; /* the latch behind port 0xcf8 */
	uint8_t *pci_config;
	uint64_t ecam_gpa;
	uint64_t ecam_length;
	struct uart_at uarts[EXIT_TABLE_MAX_UARTS];
	uint32_t pci_traps[EXIT_TABLE_PCI_SLOTS]; /* start << 16 | end */
	struct mmio_range ranges[EXIT_TABLE_MAX_MMIO];
	uint8_t ports[N_PORTS / 8];
};

#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)
#define STORE(x, value) __atomic_store_n(&(x), value, __ATOMIC_RELAXED)

struct exit_table *exit_table_create(uint8_t *pci_config)
{
	struct exit_table *table =
	    mmap(NULL, sizeof(*table), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (table == MAP_FAILED)
		return NULL;
	table->pci_config = pci_config;
	return table;
}

void exit_table_destroy(struct exit_table *table)
{
	munmap(table, sizeof(*table));
}

int exit_table_set_pio(struct exit_table *table, uint32_t port, uint32_t length, bool is_claimed)
{
	if (!length || port >= N_PORTS || length > N_PORTS - port)
		return -ERANGE;
	for (uint32_t p = port; p < port + length; p++) {
		uint8_t bit = (uint8_t)(1u << (p % 8));
		uint8_t byte = LOAD(table->ports[p / 8]);

		byte = is_claimed ? byte | bit : (uint8_t)(byte & ~bit);
		STORE(table->ports[p / 8], byte);
	}
	return 0;
}

static void begin_update(struct exit_table *table)
{
	STORE(table->sequence, table->sequence + 1);
	/* Pairs with the acquire fence at the end of is_claimed_mmio(): odd is seen before any new
	 * range. */
	__atomic_thread_fence(__ATOMIC_RELEASE);
}

static void end_update(struct exit_table *table)
{
	/* Pairs with the acquire load at the start of is_claimed_mmio(). */
	__atomic_store_n(&table->sequence, table->sequence + 1, __ATOMIC_RELEASE);
}

static void set_range(struct mmio_range *range, struct mmio_range value)
{
	STORE(range->start, value.start);
	STORE(range->last, value.last);
}

int exit_table_claim_mmio(struct exit_table *table, uint64_t gpa, uint64_t length)
{
	struct mmio_range claim = {.start = gpa, .last = gpa + length - 1};
	uint32_t n = table->n_ranges;
	uint32_t at = 0;

	if (!length || claim.last < gpa)
		return -ERANGE;
	while (at < n && table->ranges[at].last < gpa)
		at++;
	if (at < n && table->ranges[at].start <= claim.last)
		return -EEXIST;
	if (n == EXIT_TABLE_MAX_MMIO)
		return -ENOSPC;
	begin_update(table);
	for (uint32_t i = n; i > at; i--)
		set_range(&table->ranges[i], table->ranges[i - 1]);
	set_range(&table->ranges[at], claim);
	STORE(table->n_ranges, n + 1);
	end_update(table);
	return 0;
}

int exit_table_unclaim_mmio(struct exit_table *table, uint64_t gpa, uint64_t length)
{
	uint32_t n = table->n_ranges;
	uint32_t at = 0;

	while (at < n && table->ranges[at].start != gpa)
		at++;
	if (at == n || table->ranges[at].last != gpa + length - 1)
		return -ENOENT;
	begin_update(table);
	for (uint32_t i = at; i + 1 < n; i++)
		set_range(&table->ranges[i], table->ranges[i + 1]);
	STORE(table->n_ranges, n - 1);
	end_update(table);
	return 0;
}

int exit_table_attach_uart(struct exit_table *table, struct uart16550 *uart, uint32_t port)
{
	uint32_t n = table->n_uarts;

	if (port > N_PORTS - UART16550_PORTS)
		return -ERANGE;
	if (n == EXIT_TABLE_MAX_UARTS)
		return -ENOSPC;
	table->uarts[n] = (struct uart_at){.uart = uart, .port = port};
	/* Pairs with the acquire load in exit_table_pio(): the entry is complete before it counts.
	 */
	__atomic_store_n(&table->n_uarts, n + 1, __ATOMIC_RELEASE);
	return 0;
}

void exit_table_set_ecam(struct exit_table *table, uint64_t gpa, uint64_t length)
{
	/* A vCPU that runs meanwhile may see the range empty, never one with the wrong start. */
	STORE(table->ecam_length, 0);
	__atomic_store_n(&table->ecam_gpa, gpa, __ATOMIC_RELEASE);
	__atomic_store_n(&table->ecam_length, length, __ATOMIC_RELEASE);
}

void exit_table_set_pci_present(struct exit_table *table, uint32_t slot, bool is_present)
{
	uint32_t bit = 1u << (slot % EXIT_TABLE_PCI_SLOTS);
	uint32_t present = LOAD(table->pci_present);

	/* Release: config space is filled in before the slot shows up. */
	__atomic_store_n(&table->pci_present, is_present ? present | bit : present & ~bit,
			 __ATOMIC_RELEASE);
}

void exit_table_trap_pci_reads(struct exit_table *table, uint32_t slot, uint32_t start,
			       uint32_t end)
{
	STORE(table->pci_traps[slot % EXIT_TABLE_PCI_SLOTS], start << 16 | end);
}

uint32_t exit_table_pci_address(struct exit_table *table)
{
	return LOAD(table->pci_address);
}

void exit_table_set_pci_address(struct exit_table *table, uint32_t address)
{
	STORE(table->pci_address, address);
}

/* reg + size <= EXIT_TABLE_PCI_SLOT_SIZE is the callers' business. */
static enum access_result pci_access(struct exit_table *table, uint32_t slot, uint32_t reg,
				     uint32_t size, bool is_write, uint8_t *data,
				     uint64_t *pci_addr)
{
	uint32_t trap;

	if (!(__atomic_load_n(&table->pci_present, __ATOMIC_ACQUIRE) >> slot & 1)) {
		if (!is_write)
			memset(data, 0xff, size);
		return ACCESS_PCI;
	}
	*pci_addr = (uint64_t)slot * EXIT_TABLE_PCI_SLOT_SIZE + reg;
	if (is_write)
		return ACCESS_PCI_PYTHON;
	trap = LOAD(table->pci_traps[slot]);
	if (reg < (trap & 0xffff) && reg + size > trap >> 16 && size <= 4)
		return ACCESS_PCI_PYTHON;
	memcpy(data, table->pci_config + *pci_addr, size);
	return ACCESS_PCI;
}

/* Ports 0xcf8..0xcff: PCI Local Bus 3.0, 3.2.2.3.2. */
static enum access_result pci_port(struct exit_table *table, uint16_t port, uint32_t size,
				   bool is_write, uint8_t *data, uint64_t *pci_addr)
{
	uint32_t address = LOAD(table->pci_address);
	uint32_t byte = port & 3u;

	if (port < PCI_CONFIG_DATA) {
		/* Only a whole dword is the latch; narrower accesses are other devices' (reset
		 * control at 0xcf9). */
		if (port != PCI_CONFIG_ADDRESS || size != 4)
			return ACCESS_UNCLAIMED;
		if (is_write) {
			memcpy(&address, data, sizeof(address));
			STORE(table->pci_address, address);
		} else {
			memcpy(data, &address, sizeof(address));
		}
		return ACCESS_PCI;
	}
	if (!(address & PCI_ADDRESS_ENABLE) || (address & PCI_ADDRESS_ELSEWHERE) ||
	    byte + size > 4) {
		if (!is_write)
			memset(data, 0xff, size);
		return ACCESS_PCI;
	}
	return pci_access(table, address >> 11 & 31, (address & 0xfc) + byte, size, is_write, data,
			  pci_addr);
}

/* PCI Express Base 5.0, 7.2.2: accesses that cross a dword are undefined; here they read as stored
 * and write nothing. */
static enum access_result ecam_access(struct exit_table *table, uint64_t offset, uint32_t size,
				      bool is_write, uint8_t *data, uint64_t *pci_addr)
{
	uint32_t reg = (uint32_t)offset & (EXIT_TABLE_PCI_SLOT_SIZE - 1);

	if ((offset & ECAM_ELSEWHERE) || reg + size > EXIT_TABLE_PCI_SLOT_SIZE) {
		if (!is_write)
			memset(data, 0xff, size);
		return ACCESS_PCI;
	}
	if (is_write && (size == 3 || (reg & 3) + size > 4))
		return ACCESS_PCI;
	return pci_access(table, (uint32_t)(offset >> 15) & 31, reg, size, is_write, data,
			  pci_addr);
}

/* An 8-bit device sees a wide access as one per byte, as on ISA. */
static void uart_access(const struct uart_at *at, uint32_t offset, uint32_t size, bool is_write,
			uint8_t *data)
{
	for (uint32_t i = 0; i < size; i++) {
		if (is_write)
			uart16550_write(at->uart, offset + i, data[i]);
		else
			data[i] = uart16550_read(at->uart, offset + i);
	}
}

enum access_result exit_table_pio(struct exit_table *table, uint16_t port, uint32_t size,
				  bool is_write, uint8_t *data, uint64_t *pci_addr)
{
	/* Guest-controlled: port, size (1, 2 or 4 by KVM), data. */
	uint32_t n_uarts = __atomic_load_n(&table->n_uarts, __ATOMIC_ACQUIRE);

	for (uint32_t i = 0; i < n_uarts; i++) {
		uint32_t offset = port - table->uarts[i].port;

		if (offset < UART16550_PORTS) {
			uart_access(&table->uarts[i], offset, size, is_write, data);
			return ACCESS_UART;
		}
	}
	if ((port & 0xfff8) == PCI_CONFIG_ADDRESS) {
		enum access_result result = pci_port(table, port, size, is_write, data, pci_addr);

		if (result != ACCESS_UNCLAIMED)
			return result;
	}
	if (LOAD(table->ports[port / 8]) >> (port % 8) & 1)
		return ACCESS_PYTHON;
	if (!is_write)
		memset(data, 0xff, size);
	return ACCESS_UNCLAIMED;
}

static bool find_range(struct exit_table *table, uint64_t gpa)
{
	uint32_t low = 0;
	uint32_t high = LOAD(table->n_ranges);

	while (low < high) {
		uint32_t middle = (low + high) / 2;

		if (gpa < LOAD(table->ranges[middle].start))
			high = middle;
		else if (gpa > LOAD(table->ranges[middle].last))
			low = middle + 1;
		else
			return true;
	}
	return false;
}

static bool is_claimed_mmio(struct exit_table *table, uint64_t gpa)
{
	uint32_t before, after;
	bool is_claimed;

	do {
		before = __atomic_load_n(&table->sequence, __ATOMIC_ACQUIRE);
		is_claimed = find_range(table, gpa);
		/* Pairs with the release fence in begin_update(). */
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		after = LOAD(table->sequence);
	} while (before != after || (before & 1));
	return is_claimed;
}

enum access_result exit_table_mmio(struct exit_table *table, uint64_t gpa, uint32_t size,
				   bool is_write, uint8_t *data, uint64_t *pci_addr)
{
	/* Guest-controlled: gpa, size (1 to 8 by KVM), data. */
	uint64_t ecam_length = __atomic_load_n(&table->ecam_length, __ATOMIC_ACQUIRE);
	uint64_t ecam_offset = gpa - LOAD(table->ecam_gpa);

	if (ecam_offset < ecam_length)
		return ecam_access(table, ecam_offset, size, is_write, data, pci_addr);
	if (is_claimed_mmio(table, gpa))
		return ACCESS_PYTHON;
	if (!is_write)
		memset(data, 0xff, size);
	return ACCESS_UNCLAIMED;
}
