/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#include "kvm_ioctl.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

int kvm_ioctl_int(int fd, unsigned long request, unsigned long arg)
{
	int ret = ioctl(fd, request, arg);

	return ret < 0 ? -errno : ret;
}

int kvm_ioctl_ptr(int fd, unsigned long request, void *arg)
{
	int ret = ioctl(fd, request, arg);

	return ret < 0 ? -errno : ret;
}

int kvm_get_dirty_log(int vm_fd, uint32_t slot, void *bitmap)
{
	struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = bitmap};

	return kvm_ioctl_ptr(vm_fd, KVM_GET_DIRTY_LOG, &log);
}

int kvm_set_irq_line(int vm_fd, uint32_t gsi, uint32_t level)
{
	struct kvm_irq_level line = {.irq = gsi, .level = level};

	return kvm_ioctl_ptr(vm_fd, KVM_IRQ_LINE, &line);
}

int kvm_coalesced_zone(int vm_fd, unsigned long request, uint64_t addr, uint32_t size, int is_pio)
{
	struct kvm_coalesced_mmio_zone zone = {.addr = addr, .size = size, .pio = is_pio ? 1 : 0};

	return kvm_ioctl_ptr(vm_fd, request, &zone);
}

void kvm_route_to_irqchip(struct kvm_irq_routing_entry *entry, uint32_t gsi, uint32_t irqchip,
			  uint32_t pin)
{
	memset(entry, 0, sizeof(*entry));
	entry->gsi = gsi;
	entry->type = KVM_IRQ_ROUTING_IRQCHIP;
	entry->u.irqchip.irqchip = irqchip;
	entry->u.irqchip.pin = pin;
}

void kvm_route_to_msi(struct kvm_irq_routing_entry *entry, uint32_t gsi, uint64_t address,
		      uint32_t data)
{
	memset(entry, 0, sizeof(*entry));
	entry->gsi = gsi;
	entry->type = KVM_IRQ_ROUTING_MSI;
	entry->u.msi.address_lo = (uint32_t)address;
	entry->u.msi.address_hi = (uint32_t)(address >> 32);
	entry->u.msi.data = data;
}
