/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * Runs one vCPU until an exit that C cannot serve.
 *
 * struct kvm_run has anonymous unions whose layout cffi does not check, so Python never sees it: C
 * fills in the flat struct vcpu_exit instead.
 */
#ifndef HOSTEL_VCPU_LOOP_H
#define HOSTEL_VCPU_LOOP_H

#include <stddef.h>
#include <stdint.h>

#include "compat.h"
#include "exit_table.h"

enum vcpu_exit_kind {
	EXIT_KICKED, /* vcpu_kick(), or a signal */
	EXIT_PIO_READ, /* the answer goes into value, before the next vcpu_run() */
	EXIT_PIO_WRITE,
	EXIT_MMIO_READ, /* as EXIT_PIO_READ */
	EXIT_MMIO_WRITE,
	EXIT_PCI_CONFIG_WRITE, /* addr = slot << 12 | register */
	EXIT_HLT,
	EXIT_SHUTDOWN, /* triple fault */
	EXIT_SYSTEM_EVENT, /* suberror = type */
	EXIT_FAIL_ENTRY, /* data[0] = hardware reason, suberror = host CPU */
	EXIT_INTERNAL_ERROR,
	EXIT_UNKNOWN, /* suberror = KVM_EXIT_*, data[0] = hardware reason if that is
			 KVM_EXIT_UNKNOWN */
	EXIT_PCI_CONFIG_READ, /* a trapped register; as EXIT_PIO_READ */
	EXIT_KINDS,
};

/* What was counted: first the exits that Python got, by kind, then what C served. */
enum vcpu_counter {
	COUNT_UART = EXIT_KINDS,
	COUNT_PCI,
	COUNT_PIO_UNCLAIMED,
	COUNT_MMIO_UNCLAIMED,
	VCPU_COUNTERS,
};

enum { VCPU_EXIT_DATA = 16 };

struct vcpu_exit {
	int32_t kind;
	uint32_t len; /* bytes accessed: 1, 2, 4; for MMIO 1 to 8 */
	uint64_t addr;
	uint64_t value;
	uint32_t suberror;
	uint32_t ndata;
	uint64_t data[VCPU_EXIT_DATA];
};

struct vcpu {
	struct vcpu_exit exit;
	uint64_t counters[VCPU_COUNTERS]; /* written by the running thread alone */
	struct kvm_run *run;
	struct exit_table *table;
	size_t run_size;
	int fd;
	int tid; /* of the thread inside vcpu_run(), or 0 */
	uint8_t *read_into; /* where value goes when the vCPU goes on, or NULL */
	uint32_t next_element; /* of a port string operation that is being handed out */
	uint32_t elements;
};

/* fd stays the caller's until vcpu_deinit() has succeeded. */
int vcpu_init(struct vcpu *vcpu, int fd, size_t run_size);
/* -EBUSY while a thread is in vcpu_run(). */
int vcpu_deinit(struct vcpu *vcpu);

/* An exit kind, or -errno of KVM_RUN; -EBUSY if another thread runs this vCPU. */
int vcpu_run(struct vcpu *vcpu);

/*
 * Gets the vCPU out of vcpu_run(), now or at its next call, with EXIT_KICKED; stays in force until
 * vcpu_clear_kick(). Any thread may call it; vcpu_loop.c says why no kick is lost.
 */
void vcpu_kick(struct vcpu *vcpu);
void vcpu_clear_kick(struct vcpu *vcpu);
/* Once per process: a handler that does nothing, so that the signal interrupts instead of kills. */
int vcpu_install_kick_signal(void);

struct coalesced_write {
	uint64_t addr;
	uint64_t value;
	uint32_t len;
	uint32_t is_pio;
};

/* Takes the oldest write from the VM's coalescing ring: 1, or 0 if there is none. ring_page:
 * KVM_CAP_COALESCED_MMIO. */
int vcpu_take_coalesced(struct vcpu *vcpu, uint32_t ring_page, struct coalesced_write *ret);

#endif
