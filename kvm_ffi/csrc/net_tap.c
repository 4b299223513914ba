/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#include "net_tap.h"

#include <errno.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>

#include "net_engine.h"

/* What the guest can receive is what the host may leave undone. */
static unsigned int tap_offloads(uint64_t features)
{
	static const struct {
		uint8_t bit;
		uint8_t flag;
	} map[] = {
	    {VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM}, {VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4},
	    {VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6}, {VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN},
	    {VIRTIO_NET_F_GUEST_UFO, TUN_F_UFO},
	};
	unsigned int flags = 0;

	for (size_t i = 0; i < sizeof(map) / sizeof(map[0]); i++)
		if ((features >> map[i].bit) & 1)
			flags |= map[i].flag;
	return flags;
}

int net_tap_configure(int tap_fd, uint64_t features)
{
	/* Guest-controlled: features, of which only the negotiated bits can be set. */
	int header_bytes = NET_HEADER_BYTES;
	struct ifreq request;

	memset(&request, 0, sizeof(request));
	if (ioctl(tap_fd, TUNGETIFF, &request) < 0)
		return -errno;
	if ((request.ifr_flags & (IFF_TAP | IFF_VNET_HDR)) != (IFF_TAP | IFF_VNET_HDR))
		return -EINVAL;
	if (ioctl(tap_fd, TUNSETVNETHDRSZ, &header_bytes) < 0 ||
	    ioctl(tap_fd, TUNSETOFFLOAD, (unsigned long)tap_offloads(features)) < 0)
		return -errno;
	return 0;
}

int net_tap_set_queue(int tap_fd, bool is_attached)
{
	struct ifreq request;

	memset(&request, 0, sizeof(request));
	request.ifr_flags = is_attached ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE;
	/* EINVAL: it is so already. */
	if (ioctl(tap_fd, TUNSETQUEUE, &request) < 0 && errno != EINVAL)
		return -errno;
	return 0;
}

int net_tap_set_carrier(int tap_fd, bool is_up)
{
	int carrier = is_up;

	return ioctl(tap_fd, TUNSETCARRIER, &carrier) < 0 ? -errno : 0;
}
