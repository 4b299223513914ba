/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * ioctl() that returns -errno, and setters for the UAPI structs with anonymous unions, whose layout
 * cffi cannot check (see docs of cffi on "...;" in nested structs).
 */
#ifndef HOSTEL_KVM_IOCTL_H
#define HOSTEL_KVM_IOCTL_H

#include <stdint.h>

#include "compat.h"

int kvm_ioctl_int(int fd, unsigned long request, unsigned long arg);
int kvm_ioctl_ptr(int fd, unsigned long request, void *arg);

/* KVM_GET_DIRTY_LOG: bitmap holds one bit per page, rounded up to 64 pages. */
int kvm_get_dirty_log(int vm_fd, uint32_t slot, void *bitmap);
/* KVM_IRQ_LINE */
int kvm_set_irq_line(int vm_fd, uint32_t gsi, uint32_t level);
/* KVM_(UN)REGISTER_COALESCED_MMIO */
int kvm_coalesced_zone(int vm_fd, unsigned long request, uint64_t addr, uint32_t size, int is_pio);

void kvm_route_to_irqchip(struct kvm_irq_routing_entry *entry, uint32_t gsi, uint32_t irqchip,
			  uint32_t pin);
void kvm_route_to_msi(struct kvm_irq_routing_entry *entry, uint32_t gsi, uint64_t address,
		      uint32_t data);

#endif
