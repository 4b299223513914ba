/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * The kernel's KVM interface, plus what the headers of an older distribution lack.
 *
 * A missing ioctl is 0 and a missing capability is -1 (0 is a real one: KVM_CAP_IRQCHIP). Both mean
 * "not built in"; Python turns them into CapabilityMissing. Numbers are never typed by hand.
 */
#ifndef HOSTEL_COMPAT_H
#define HOSTEL_COMPAT_H

#include <linux/kvm.h>

#ifndef KVM_CAP_MEMORY_FAULT_INFO
#define KVM_CAP_MEMORY_FAULT_INFO (-1)
#endif
#ifndef KVM_CAP_USER_MEMORY2
#define KVM_CAP_USER_MEMORY2 (-1)
#endif
#ifndef KVM_CAP_DIRTY_LOG_RING_ACQ_REL
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL (-1)
#endif

#endif
