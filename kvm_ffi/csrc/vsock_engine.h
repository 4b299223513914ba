/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * virtio-vsock streams (VIRTIO 1.2, 5.10) between a guest and Unix sockets of the host.
 *
 * A program of the host connects to the listener and writes "CONNECT <port>\n"; once the guest
 * has accepted it reads "OK <port of its own>\n", and all else is the stream. A guest that
 * connects to port P of CID 2 reaches the socket "<name>_P" in the engine's directory.
 */
#ifndef HOSTEL_VSOCK_ENGINE_H
#define HOSTEL_VSOCK_ENGINE_H

#include <stdint.h>

#include "engine.h"
#include "virtqueue.h"
#include "vsock_conn.h"

#define VSOCK_HEADER_BYTES 44u
#define VSOCK_HOST_CID 2u
/* With "_4294967295" behind it still a file name that a socket address holds. */
#define VSOCK_MAX_NAME_BYTES 32u
struct vsock_stats {
	uint64_t rx_packets; /* to the guest, control packets included */
	uint64_t rx_bytes; /* payload, and so are tx_bytes */
	uint64_t tx_packets; /* from the guest */
	uint64_t tx_bytes;
	uint64_t tx_malformed; /* no whole header, a wrong address, a length that is not there */
	uint64_t host_connections; /* opened from the host's side */
	uint64_t guest_connections; /* opened from the guest's side */
	uint64_t refused; /* either side wanted one and did not get it */
	uint64_t closed; /* of those that were opened */
	uint64_t violations; /* ended because the guest broke the protocol or its credit */
	uint64_t rx_kicks;
	uint64_t tx_kicks;
	uint64_t rx_interrupts;
	uint64_t tx_interrupts;
};

struct vsock_config {
	struct virtqueue *rx;
	struct virtqueue *tx;
	uint64_t guest_cid;
	uint64_t peer_timeout_ns; /* for a greeting, the guest's answer, or its last word */
	int listener_fd; /* a listening Unix stream socket, non-blocking */
	int directory_fd; /* what the guest connects to lies there; -1 for the working directory */
	char name[VSOCK_MAX_NAME_BYTES]; /* of those files, up to the "_" */
	int rx_kick_fd;
	int tx_kick_fd;
	int rx_irq_fd; /* -1: the driver polls; so is tx_irq_fd */
	int tx_irq_fd;
	int fault_fd;
};

struct vsock_engine;

/* 0, or -errno. The virtqueues and the fds stay the caller's and must outlive the engine. */
int vsock_engine_create(const struct vsock_config *config, struct vsock_engine **ret);
/* Closes every connection. -EBUSY while a thread is in vsock_engine_run(). */
int vsock_engine_destroy(struct vsock_engine *engine);

/* Serve until stopped: 0 stopped, -EPROTO a ring broke (fault_fd was signalled), another -errno
 * when the host failed. The thread's working directory is directory_fd from then on. */
int vsock_engine_run(struct vsock_engine *engine);
/* Serve one burst in both directions without waiting: 1 there may be more, 0, -EPROTO. */
int vsock_engine_serve(struct vsock_engine *engine);
/* Wait for a kick, a socket, a deadline or the gate; timeout_ms as in poll(2). 0, or -errno. */
int vsock_engine_wait(struct vsock_engine *engine, int timeout_ms);

struct engine_gate *vsock_engine_gate(struct vsock_engine *engine);
int vsock_engine_fault(const struct vsock_engine *engine);
void vsock_engine_stats(const struct vsock_engine *engine, struct vsock_stats *ret);

#endif
