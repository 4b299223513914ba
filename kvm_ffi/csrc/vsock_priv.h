/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* What the three parts of the vsock engine share: vsock_engine.c, vsock_rx.c, vsock_tx.c. */
#ifndef HOSTEL_VSOCK_PRIV_H
#define HOSTEL_VSOCK_PRIV_H

#include "vsock_engine.h"

/* Packets per direction between two looks at everything else. */
#define VSOCK_BURST_PACKETS 64
/* Chains that one read of a socket fills: as much as a driver with 4 KiB buffers sends at once. */
#define VSOCK_RX_BATCH 16u
/* Answers to packets without a connection that wait for room in the receive ring. When they
 * are this many, the transmit ring waits too: a guest cannot make us remember more. */
#define VSOCK_MAX_RESETS 64u

/* A receive chain that was popped but not filled yet. */
struct vsock_slot {
	uint32_t first_iov; /* of the whole chain, in rx_iov */
	uint32_t n_iov;
	uint32_t room; /* for payload */
	uint16_t head;
};

struct vsock_reset {
	uint32_t guest_port;
	uint32_t host_port;
	uint16_t type;
};

struct vsock_engine {
	struct vsock_config config;
	struct engine_gate gate;
	struct vsock_stats stats;
	uint32_t fault; /* atomic: enum engine_fault */
	int epoll_fd;
	uint64_t parked_ns; /* time spent held still, which no deadline counts */
	bool is_listener_ready; /* no EAGAIN since epoll said that someone waits */
	bool is_rx_starved; /* the receive ring ran empty and a kick was asked for */
	uint32_t first_reset;
	uint32_t n_resets;
	struct vsock_reset resets[VSOCK_MAX_RESETS];
	uint32_t n_slots;
	struct vsock_slot slots[VSOCK_RX_BATCH];
	struct iovec rx_iov[2 * VIRTQUEUE_MAX_SIZE]; /* of all slots, one behind the other */
	struct iovec data_iov[VIRTQUEUE_MAX_SIZE]; /* the same without the headers */
	struct iovec tx_iov[VIRTQUEUE_MAX_SIZE];
	struct vsock_table table;
};

/* Watch the socket of a connection: 0, or -errno. */
int vsock_watch_conn(struct vsock_engine *engine, struct vsock_conn *conn);
/* From now on its peer has peer_timeout_ns for the next step. */
void vsock_start_timer(struct vsock_engine *engine, struct vsock_conn *conn);

/* A connection with ports ends: its socket is closed, and the ports are taken until the guest
 * has its last packet (a reset, or a SHUTDOWN that it answers with a reset). */
void vsock_end(struct vsock_engine *engine, struct vsock_conn *conn, uint8_t due);
/* It ends without another word to the guest. */
void vsock_drop(struct vsock_engine *engine, struct vsock_conn *conn);
/* The host's side takes or sends no more: tell the guest. With both the socket is done. */
void vsock_shut_host(struct vsock_engine *engine, struct vsock_conn *conn, uint8_t flags);

/* Write to the host's socket what waits for it. */
void vsock_flush(struct vsock_engine *engine, struct vsock_conn *conn);
/* Serve a burst of the transmit ring: 1 there may be more, 0, -EPROTO. */
int vsock_serve_tx(struct vsock_engine *engine);
/* Send a burst of what is due to the guest: 1 there may be more, 0 not now, -EPROTO. */
int vsock_serve_rx(struct vsock_engine *engine);

/* Publish a queue's completions, and interrupt if the driver wants that. */
void vsock_publish(struct virtqueue *vq, int irq_fd, uint64_t *interrupts);

#endif
