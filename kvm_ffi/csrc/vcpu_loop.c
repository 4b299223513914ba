/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#define _GNU_SOURCE
#include "vcpu_loop.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* Not an exit kind: C has served it, the vCPU goes on. */
enum { SERVED = EXIT_KINDS };

/* In place of a thread id, for good: vcpu_run() finds the vCPU taken. */
enum { CLOSED = -1 };

int vcpu_init(struct vcpu *vcpu, int fd, size_t run_size)
{
	void *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (run == MAP_FAILED)
		return -errno;
	memset(vcpu, 0, sizeof(*vcpu));
	vcpu->run = run;
	vcpu->run_size = run_size;
	vcpu->fd = fd;
	return 0;
}

int vcpu_deinit(struct vcpu *vcpu)
{
	int nobody = 0;

	if (!__atomic_compare_exchange_n(&vcpu->tid, &nobody, CLOSED, false, __ATOMIC_SEQ_CST,
					 __ATOMIC_SEQ_CST))
		return -EBUSY;
	munmap(vcpu->run, vcpu->run_size);
	vcpu->run = NULL;
	return 0;
}

static void count(struct vcpu *vcpu, unsigned int counter)
{
	/* One writer; atomic only so that a reader never sees half of it. */
	__atomic_store_n(&vcpu->counters[counter], vcpu->counters[counter] + 1, __ATOMIC_RELAXED);
}

/* Turns an access into an exit for Python. data stays valid until the next KVM_RUN. */
static int hand_out(struct vcpu *vcpu, int read_kind, uint64_t addr, uint32_t size, bool is_write,
		    uint8_t *data)
{
	struct vcpu_exit *exit = &vcpu->exit;

	exit->addr = addr;
	exit->len = size;
	exit->value = 0;
	if (is_write)
		memcpy(&exit->value, data, size);
	else
		vcpu->read_into = data;
	if (read_kind == EXIT_PCI_CONFIG_READ)
		return is_write ? EXIT_PCI_CONFIG_WRITE : EXIT_PCI_CONFIG_READ;
	return is_write ? read_kind + 1 : read_kind;
}

static int serve(struct vcpu *vcpu, enum access_result result, unsigned int unclaimed_counter)
{
	switch (result) {
	case ACCESS_UART:
		count(vcpu, COUNT_UART);
		break;
	case ACCESS_PCI:
		count(vcpu, COUNT_PCI);
		break;
	default:
		count(vcpu, unclaimed_counter);
		break;
	}
	return SERVED;
}

/* Goes on with the elements of a port operation: all of them served, or one for Python. */
static int handle_pio(struct vcpu *vcpu)
{
	/* Guest-controlled: port, size, count and the data; KVM bounds size * count to its page. */
	struct kvm_run *run = vcpu->run;
	uint16_t port = run->io.port;
	uint32_t size = run->io.size;
	bool is_write = run->io.direction == KVM_EXIT_IO_OUT;
	uint8_t *data = (uint8_t *)run + run->io.data_offset + (size_t)vcpu->next_element * size;
	uint64_t pci_addr = 0;

	for (; vcpu->next_element < vcpu->elements; data += size) {
		enum access_result result =
		    exit_table_pio(vcpu->table, port, size, is_write, data, &pci_addr);

		vcpu->next_element++;
		if (result == ACCESS_PYTHON)
			return hand_out(vcpu, EXIT_PIO_READ, port, size, is_write, data);
		if (result == ACCESS_PCI_PYTHON)
			return hand_out(vcpu, EXIT_PCI_CONFIG_READ, pci_addr, size, is_write, data);
		serve(vcpu, result, COUNT_PIO_UNCLAIMED);
	}
	return SERVED;
}

static int handle_mmio(struct vcpu *vcpu)
{
	/* Guest-controlled: all of run->mmio; KVM bounds len to 8. */
	struct kvm_run *run = vcpu->run;
	uint64_t gpa = run->mmio.phys_addr;
	uint32_t size = run->mmio.len;
	bool is_write = run->mmio.is_write;
	uint64_t pci_addr = 0;
	enum access_result result =
	    exit_table_mmio(vcpu->table, gpa, size, is_write, run->mmio.data, &pci_addr);

	if (result == ACCESS_PYTHON)
		return hand_out(vcpu, EXIT_MMIO_READ, gpa, size, is_write, run->mmio.data);
	if (result == ACCESS_PCI_PYTHON)
		return hand_out(vcpu, EXIT_PCI_CONFIG_READ, pci_addr, size, is_write,
				run->mmio.data);
	return serve(vcpu, result, COUNT_MMIO_UNCLAIMED);
}

static void fill_data(struct vcpu_exit *exit, uint32_t suberror, uint32_t ndata, const __u64 *data)
{
	exit->suberror = suberror;
	exit->ndata = ndata < VCPU_EXIT_DATA ? ndata : VCPU_EXIT_DATA;
	for (uint32_t i = 0; i < exit->ndata; i++)
		exit->data[i] = data[i];
}

/* The rare ends of a vCPU's run. */
static int handle_other(struct vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	struct vcpu_exit *exit = &vcpu->exit;

	switch (run->exit_reason) {
	case KVM_EXIT_HLT:
		return EXIT_HLT;
	case KVM_EXIT_SHUTDOWN:
		return EXIT_SHUTDOWN;
	case KVM_EXIT_SYSTEM_EVENT:
		fill_data(exit, run->system_event.type, run->system_event.ndata,
			  run->system_event.data);
		return EXIT_SYSTEM_EVENT;
	case KVM_EXIT_FAIL_ENTRY:
		fill_data(exit, run->fail_entry.cpu, 1,
			  &run->fail_entry.hardware_entry_failure_reason);
		return EXIT_FAIL_ENTRY;
	case KVM_EXIT_INTERNAL_ERROR:
		fill_data(exit, run->internal.suberror, run->internal.ndata, run->internal.data);
		return EXIT_INTERNAL_ERROR;
	default:
		fill_data(exit, run->exit_reason, run->exit_reason == KVM_EXIT_UNKNOWN,
			  &run->hw.hardware_exit_reason);
		return EXIT_UNKNOWN;
	}
}

static int handle_exit(struct vcpu *vcpu)
{
	switch (vcpu->run->exit_reason) {
	case KVM_EXIT_IO:
		vcpu->next_element = 0;
		vcpu->elements = vcpu->run->io.count;
		return handle_pio(vcpu);
	case KVM_EXIT_MMIO:
		return handle_mmio(vcpu);
	default:
		return handle_other(vcpu);
	}
}

/* Gives KVM the answer to the last exit, and hands out what is left of a string operation. */
static int finish_last_exit(struct vcpu *vcpu)
{
	if (vcpu->read_into) {
		memcpy(vcpu->read_into, &vcpu->exit.value, vcpu->exit.len);
		vcpu->read_into = NULL;
	}
	return vcpu->next_element < vcpu->elements ? handle_pio(vcpu) : SERVED;
}

static int run_until_exit(struct vcpu *vcpu)
{
	int kind = finish_last_exit(vcpu);

	while (kind == SERVED) {
		if (ioctl(vcpu->fd, KVM_RUN, 0) == 0)
			kind = handle_exit(vcpu);
		else if (errno == EINTR)
			kind = EXIT_KICKED;
		else if (errno !=
			 EAGAIN) /* a vCPU that waits for its INIT has been woken: go on waiting */
			return -errno;
	}
	vcpu->exit.kind = kind;
	count(vcpu, (unsigned int)kind);
	return kind;
}

/*
 * Why no kick is lost. vcpu_kick() stores immediate_exit, then reads tid; vcpu_run() stores tid,
 * then KVM_RUN reads immediate_exit. Both orders are sequentially consistent, so at least one side
 * sees the other:
 *  - the kicker saw no tid: KVM_RUN will see immediate_exit and return -EINTR at once;
 *  - the kicker saw the tid and signals. Before the ioctl, the empty handler runs and KVM_RUN sees
 * immediate_exit; inside it, a pending signal ends it. A thread that has left vcpu_run() in between
 * runs the empty handler.
 */
int vcpu_run(struct vcpu *vcpu)
{
	int nobody = 0;
	int ret;

	if (!__atomic_compare_exchange_n(&vcpu->tid, &nobody, gettid(), false, __ATOMIC_SEQ_CST,
					 __ATOMIC_SEQ_CST))
		return -EBUSY;
	ret = run_until_exit(vcpu);
	__atomic_store_n(&vcpu->tid, 0, __ATOMIC_SEQ_CST);
	return ret;
}

void vcpu_kick(struct vcpu *vcpu)
{
	int tid;

	__atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
	tid = __atomic_load_n(&vcpu->tid, __ATOMIC_SEQ_CST);
	if (tid > 0)
		/* The thread may be gone by now, which is as good as having left vcpu_run(). */
		(void)tgkill(getpid(), tid, SIGRTMIN);
}

void vcpu_clear_kick(struct vcpu *vcpu)
{
	__atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
}

static void do_nothing(int signal)
{
	(void)signal;
}

int vcpu_install_kick_signal(void)
{
	/* KVM_RUN returns -EINTR whatever the flags; anything else the signal may hit shall go on.
	 */
	struct sigaction action = {.sa_handler = do_nothing, .sa_flags = SA_RESTART};

	return sigaction(SIGRTMIN, &action, NULL) < 0 ? -errno : 0;
}

int vcpu_take_coalesced(struct vcpu *vcpu, uint32_t ring_page, struct coalesced_write *ret)
{
	size_t page_size = (size_t)sysconf(_SC_PAGESIZE);
	size_t offset = ring_page * page_size;
	struct kvm_coalesced_mmio_ring *ring = (void *)((uint8_t *)vcpu->run + offset);
	uint32_t entries =
	    (uint32_t)((page_size - sizeof(*ring)) / sizeof(ring->coalesced_mmio[0]));
	const struct kvm_coalesced_mmio *entry;
	uint32_t first;

	if (!ring_page || offset + page_size > vcpu->run_size)
		return -EINVAL;
	first = ring->first;
	/* Pairs with the kernel's barrier before it moves last: the entry is complete. */
	if (first >= entries || first == __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE))
		return 0;
	entry = &ring->coalesced_mmio[first];
	*ret = (struct coalesced_write){
	    .addr = entry->phys_addr, .len = entry->len, .is_pio = entry->pio};
	memcpy(&ret->value, entry->data,
	       entry->len < sizeof(ret->value) ? entry->len : sizeof(ret->value));
	/* Release: the slot is the kernel's again only after it has been read. */
	__atomic_store_n(&ring->first, (first + 1) % entries, __ATOMIC_RELEASE);
	return 1;
}
