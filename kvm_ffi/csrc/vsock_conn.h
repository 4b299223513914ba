/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * The connections of a vsock device (VIRTIO 1.2, 5.10.6): a fixed table, found by the
 * pair of ports, each with its credit in both directions and a bounded buffer for what the
 * host's side does not read yet.
 *
 * Used by the engine's thread alone.
 */
#ifndef HOSTEL_VSOCK_CONN_H
#define HOSTEL_VSOCK_CONN_H

#include <stdbool.h>
#include <stdint.h>
#include <linux/virtio_vsock.h>
#include <sys/queue.h>
#include <sys/uio.h>

#define VSOCK_MAX_CONNS 1024u
#define VSOCK_HASH_BUCKETS 1024u
/* What a guest may send ahead of the host's reader, and so what each connection can make
 * us keep: the larger one until VSOCK_BUFFER_BUDGET is promised, then the smaller one. A
 * guest's connections together hold 32 MiB at most. */
#define VSOCK_LARGE_BUFFER (256u << 10)
#define VSOCK_SMALL_BUFFER (16u << 10)
#define VSOCK_BUFFER_BUDGET (16u << 20)
/* Ports that are given to connections from the host; the guest's own programs choose
 * theirs below, and the pair is what counts. */
#define VSOCK_FIRST_HOST_PORT (1u << 30)
#define VSOCK_SHUTDOWN_BOTH ((uint8_t)(VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND))

enum vsock_state {
	VSOCK_FREE,
	VSOCK_GREETING, /* from the host; its CONNECT line has not come */
	VSOCK_REQUESTED, /* from the host; the guest's RESPONSE or RST has not come */
	VSOCK_OPEN,
	VSOCK_ENDING, /* no socket any more; the guest's RST has not come, or ours not gone */
	VSOCK_ORPHAN, /* the guest has let go; the host has not read everything yet */
};

/* Packets that are due to the guest, in the order in which they go out. */
enum vsock_due {
	VSOCK_DUE_RST = 1,
	VSOCK_DUE_REQUEST = 2,
	VSOCK_DUE_RESPONSE = 4,
	VSOCK_DUE_SHUTDOWN = 8,
	VSOCK_DUE_CREDIT_UPDATE = 16,
	VSOCK_DUE_CREDIT_REQUEST = 32,
};

struct vsock_conn {
	TAILQ_ENTRY(vsock_conn) run; /* has something for the guest */
	TAILQ_ENTRY(vsock_conn) timer; /* waits for its peer, deadline by deadline */
	LIST_ENTRY(vsock_conn) bucket; /* or in the list of free ones */
	uint64_t deadline_ns;
	int fd; /* the host's side, -1 when it is closed */
	uint32_t guest_port;
	uint32_t host_port;
	/* Towards the host: counters wrap, as the specification's do. */
	uint32_t buf_alloc; /* promised to the guest */
	uint32_t fwd_cnt; /* bytes that the host has taken */
	uint32_t told_fwd_cnt; /* fwd_cnt as the guest knows it */
	uint8_t *buffer; /* buf_alloc bytes in a circle, once they are needed */
	uint32_t buffer_head;
	uint32_t buffered;
	/* Towards the guest. */
	uint32_t peer_buf_alloc; /* guest-controlled, and so is peer_fwd_cnt */
	uint32_t peer_fwd_cnt;
	uint32_t sent_cnt;
	uint8_t state;
	uint8_t due; /* enum vsock_due */
	uint8_t guest_shutdown; /* VIRTIO_VSOCK_SHUTDOWN_*, as the guest has told */
	uint8_t host_shutdown; /* as the guest is told */
	bool is_readable; /* no EAGAIN since epoll said that there is something */
	bool is_hung_up; /* the host's side is closed in both directions */
	bool has_half_closed; /* EPOLLRDHUP came: an end of file follows the data */
	bool has_asked; /* for credit, and there has been none since */
	bool is_running; /* in the run list */
	bool is_timed; /* in the timer list */
};

TAILQ_HEAD(vsock_conn_queue, vsock_conn);
LIST_HEAD(vsock_conn_list, vsock_conn);

struct vsock_table {
	struct vsock_conn_queue run;
	struct vsock_conn_queue timers; /* one length of wait, so the first is the next */
	struct vsock_conn_list free;
	struct vsock_conn_list buckets[VSOCK_HASH_BUCKETS];
	uint32_t n_used;
	uint32_t
	    n_ever; /* slots that were used at least once: memory that nobody touches is free */
	uint32_t promised; /* sum of buf_alloc */
	uint32_t next_host_port;
	struct vsock_conn conns[VSOCK_MAX_CONNS];
};

/* The table must be zeroed memory; most of it is not touched. */
void vsock_table_init(struct vsock_table *table);

/* A slot for a socket, in state VSOCK_GREETING and without ports; NULL when all are taken. */
struct vsock_conn *vsock_conn_new(struct vsock_table *table, int fd);
/* Give the connection its ports, by which it is found from then on, and its buffer's size. */
void vsock_conn_bind(struct vsock_table *table, struct vsock_conn *conn, uint32_t guest_port,
		     uint32_t host_port);
/* Its ports are free for another connection from now on. */
void vsock_conn_unbind(struct vsock_table *table, struct vsock_conn *conn);
/* Close the socket, drop what is buffered, and free the slot. */
void vsock_conn_free(struct vsock_table *table, struct vsock_conn *conn);
struct vsock_conn *vsock_conn_find(struct vsock_table *table, uint32_t guest_port,
				   uint32_t host_port);
/* A port of the host's side that has no connection to guest_port. */
uint32_t vsock_pick_host_port(struct vsock_table *table, uint32_t guest_port);

/* Queue it for the guest (a second time changes nothing), with more packets due. */
void vsock_conn_run(struct vsock_table *table, struct vsock_conn *conn, uint8_t due);
void vsock_conn_unrun(struct vsock_table *table, struct vsock_conn *conn);
void vsock_conn_set_timer(struct vsock_table *table, struct vsock_conn *conn, uint64_t deadline_ns);
void vsock_conn_clear_timer(struct vsock_table *table, struct vsock_conn *conn);

/* How many more bytes the guest takes now. */
uint32_t vsock_conn_credit(const struct vsock_conn *conn);
/* Count bytes that the host took; whether the guest should be told of the room by now. */
bool vsock_conn_forwarded(struct vsock_conn *conn, uint32_t bytes);
/* Keep the bytes of some iovecs from an offset on: 0, -ENOBUFS when the guest sent more than
 * it was promised, -ENOMEM. */
int vsock_conn_keep(struct vsock_conn *conn, const struct iovec *iov, uint32_t n_iov, size_t offset,
		    uint32_t len);
/* What is kept, as at most two pieces; how many. */
int vsock_conn_kept(const struct vsock_conn *conn, struct iovec iov[2]);
/* Drop bytes from the front of it. */
void vsock_conn_drop(struct vsock_conn *conn, uint32_t bytes);

#endif
