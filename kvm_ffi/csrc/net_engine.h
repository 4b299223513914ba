/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * virtio-net packets (VIRTIO 1.2, 5.1.6) between one queue pair and a tap, without a
 * copy of our own: the tap reads and writes guest buffers, virtio_net_hdr included.
 */
#ifndef HOSTEL_NET_ENGINE_H
#define HOSTEL_NET_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "engine.h"
#include "token_bucket.h"
#include "virtqueue.h"

/* struct virtio_net_hdr_v1; the tap is told by TUNSETVNETHDRSZ. */
#define NET_HEADER_BYTES 12u
/* Header and the largest frame, as VIRTIO 1.2, 5.1.6.3.1 sizes receive buffers. */
#define NET_MAX_PACKET_BYTES 65562u

struct net_stats {
	uint64_t rx_packets;
	uint64_t rx_bytes; /* of frames, without virtio_net_hdr; so is tx_bytes */
	uint64_t rx_dropped;
	uint64_t tx_packets;
	uint64_t tx_bytes;
	uint64_t tx_dropped; /* the tap did not take it */
	uint64_t tx_malformed; /* no whole header, a writable buffer, or too long */
	uint64_t rx_kicks;
	uint64_t tx_kicks;
	uint64_t rx_interrupts;
	uint64_t tx_interrupts;
	uint64_t rx_suppressed; /* used buffers were shown, and the driver wanted no interrupt */
	uint64_t tx_suppressed;
	uint64_t rx_throttled; /* times that a packet had to wait for a limit */
	uint64_t tx_throttled;
};

struct net_config {
	struct virtqueue *rx;
	struct virtqueue *tx;
	int tap_fd; /* non-blocking */
	int rx_kick_fd;
	int tx_kick_fd;
	int rx_irq_fd; /* -1: the driver polls; so is tx_irq_fd */
	int tx_irq_fd;
	int fault_fd;
	struct rate_limiter *rx_limiter; /* NULL: no limit, ever; so is tx_limiter */
	struct rate_limiter *tx_limiter;
	bool is_mergeable; /* VIRTIO_NET_F_MRG_RXBUF was negotiated */
};

struct net_engine;

/* 0, or -errno. The virtqueues and the fds stay the caller's and must outlive the engine. */
int net_engine_create(const struct net_config *config, struct net_engine **ret);
/* -EBUSY while a thread is in net_engine_run(). */
int net_engine_destroy(struct net_engine *engine);

/* Serve until stopped: 0 stopped, -EPROTO a ring broke (fault_fd was signalled), another
 * -errno when the host failed. */
int net_engine_run(struct net_engine *engine);
/* Serve one burst in both directions without waiting: 1 there may be more, 0, -EPROTO. */
int net_engine_serve(struct net_engine *engine);
/* Wait for a kick, a packet, the gate or the end of a limit; timeout_ms as in poll(2). 0, or
 * -errno. Whoever changes a limit wakes the engine by its gate. */
int net_engine_wait(struct net_engine *engine, int timeout_ms);

struct engine_gate *net_engine_gate(struct net_engine *engine);
int net_engine_fault(const struct net_engine *engine);
void net_engine_stats(const struct net_engine *engine, struct net_stats *ret);

#endif
