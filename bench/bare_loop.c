/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* The floor that bench/exits.py measures against: KVM_RUN and nothing else. */
#include <errno.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

/* Runs to KVM_EXIT_HLT; returns the exits before it, or -errno. */
long bare_loop(int vcpu_fd, unsigned long run_size)
{
	struct kvm_run *run = mmap(0, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd, 0);
	long exits = 0;

	if (run == MAP_FAILED)
		return -errno;
	for (;;) {
		if (ioctl(vcpu_fd, KVM_RUN, 0) < 0) {
			exits = -errno;
			break;
		}
		if (run->exit_reason == KVM_EXIT_HLT)
			break;
		exits++;
	}
	munmap(run, run_size);
	return exits;
}
