/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#include "vsock_conn.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "virtqueue.h"

void vsock_table_init(struct vsock_table *table)
{
	TAILQ_INIT(&table->run);
	TAILQ_INIT(&table->timers);
	table->next_host_port = VSOCK_FIRST_HOST_PORT;
}

/* A guest that makes ports collide slows its own device down, by 1,024 comparisons at most. */
static struct vsock_conn_list *bucket_of(struct vsock_table *table, uint32_t guest_port,
					 uint32_t host_port)
{
	uint32_t mix = (guest_port * 0x9e3779b1u) ^ (host_port * 0x85ebca6bu);

	return &table->buckets[(mix ^ mix >> 16) % VSOCK_HASH_BUCKETS];
}

struct vsock_conn *vsock_conn_new(struct vsock_table *table, int fd)
{
	struct vsock_conn *conn = LIST_FIRST(&table->free);

	if (conn)
		LIST_REMOVE(conn, bucket);
	else if (table->n_ever < VSOCK_MAX_CONNS)
		conn = &table->conns[table->n_ever++];
	else
		return NULL;
	memset(conn, 0, sizeof(*conn));
	conn->fd = fd;
	conn->state = VSOCK_GREETING;
	table->n_used++;
	return conn;
}

void vsock_conn_bind(struct vsock_table *table, struct vsock_conn *conn, uint32_t guest_port,
		     uint32_t host_port)
{
	bool is_scarce = table->promised + VSOCK_LARGE_BUFFER > VSOCK_BUFFER_BUDGET;

	conn->guest_port = guest_port;
	conn->host_port = host_port;
	conn->buf_alloc = is_scarce ? VSOCK_SMALL_BUFFER : VSOCK_LARGE_BUFFER;
	table->promised += conn->buf_alloc;
	LIST_INSERT_HEAD(bucket_of(table, guest_port, host_port), conn, bucket);
}

/* Its buffer counts until the slot is free. */
static bool is_bound(const struct vsock_conn *conn)
{
	return conn->state != VSOCK_GREETING && conn->state != VSOCK_ORPHAN;
}

void vsock_conn_unbind(struct vsock_table *table, struct vsock_conn *conn)
{
	LIST_REMOVE(conn, bucket);
	vsock_conn_unrun(table, conn);
	vsock_conn_clear_timer(table, conn);
	conn->state = VSOCK_ORPHAN;
}

void vsock_conn_free(struct vsock_table *table, struct vsock_conn *conn)
{
	if (is_bound(conn))
		LIST_REMOVE(conn, bucket);
	vsock_conn_unrun(table, conn);
	vsock_conn_clear_timer(table, conn);
	if (conn->fd >= 0)
		close(conn->fd);
	free(conn->buffer);
	table->promised -= conn->buf_alloc;
	table->n_used--;
	memset(conn, 0, sizeof(*conn));
	conn->fd = -1;
	LIST_INSERT_HEAD(&table->free, conn, bucket);
}

struct vsock_conn *vsock_conn_find(struct vsock_table *table, uint32_t guest_port,
				   uint32_t host_port)
{
	/* Guest-controlled: both ports. */
	struct vsock_conn *conn;

	LIST_FOREACH(conn, bucket_of(table, guest_port, host_port), bucket)
	{
		if (conn->guest_port == guest_port && conn->host_port == host_port)
			return conn;
	}
	return NULL;
}

uint32_t vsock_pick_host_port(struct vsock_table *table, uint32_t guest_port)
{
	uint32_t port;

	/* Ends: there are more ports than connections. */
	do {
		port = table->next_host_port++;
		if (table->next_host_port >= 2 * VSOCK_FIRST_HOST_PORT)
			table->next_host_port = VSOCK_FIRST_HOST_PORT;
	} while (vsock_conn_find(table, guest_port, port));
	return port;
}

void vsock_conn_run(struct vsock_table *table, struct vsock_conn *conn, uint8_t due)
{
	conn->due |= due;
	if (conn->is_running)
		return;
	conn->is_running = true;
	TAILQ_INSERT_TAIL(&table->run, conn, run);
}

void vsock_conn_unrun(struct vsock_table *table, struct vsock_conn *conn)
{
	if (conn->is_running)
		TAILQ_REMOVE(&table->run, conn, run);
	conn->is_running = false;
}

void vsock_conn_set_timer(struct vsock_table *table, struct vsock_conn *conn, uint64_t deadline_ns)
{
	vsock_conn_clear_timer(table, conn);
	conn->is_timed = true;
	conn->deadline_ns = deadline_ns;
	TAILQ_INSERT_TAIL(&table->timers, conn, timer);
}

void vsock_conn_clear_timer(struct vsock_table *table, struct vsock_conn *conn)
{
	if (conn->is_timed)
		TAILQ_REMOVE(&table->timers, conn, timer);
	conn->is_timed = false;
}

uint32_t vsock_conn_credit(const struct vsock_conn *conn)
{
	/* Guest-controlled: peer_buf_alloc, peer_fwd_cnt. A guest that claims to have taken more
	 * than was sent has, by this subtraction, taken almost nothing. */
	uint32_t in_flight = conn->sent_cnt - conn->peer_fwd_cnt;

	return in_flight >= conn->peer_buf_alloc ? 0 : conn->peer_buf_alloc - in_flight;
}

bool vsock_conn_forwarded(struct vsock_conn *conn, uint32_t bytes)
{
	conn->fwd_cnt += bytes;
	/* At half: the guest can go on sending while the news is on its way. */
	return conn->fwd_cnt - conn->told_fwd_cnt >= conn->buf_alloc / 2;
}

int vsock_conn_keep(struct vsock_conn *conn, const struct iovec *iov, uint32_t n_iov, size_t offset,
		    uint32_t len)
{
	/* Guest-controlled: len, and the bytes. */
	uint32_t tail, first;

	if (len > conn->buf_alloc - conn->buffered)
		return -ENOBUFS;
	if (!conn->buffer)
		conn->buffer = malloc(conn->buf_alloc);
	if (!conn->buffer)
		return -ENOMEM;
	/* Sizes are powers of two. */
	tail = (conn->buffer_head + conn->buffered) & (conn->buf_alloc - 1);
	first = conn->buf_alloc - tail < len ? conn->buf_alloc - tail : len;
	iov_copy_out(iov, n_iov, offset, conn->buffer + tail, first);
	iov_copy_out(iov, n_iov, offset + first, conn->buffer, len - first);
	conn->buffered += len;
	return 0;
}

int vsock_conn_kept(const struct vsock_conn *conn, struct iovec iov[2])
{
	uint32_t to_end = conn->buf_alloc - conn->buffer_head;
	uint32_t first = conn->buffered < to_end ? conn->buffered : to_end;

	iov[0] = (struct iovec){conn->buffer + conn->buffer_head, first};
	iov[1] = (struct iovec){conn->buffer, conn->buffered - first};
	return iov[1].iov_len > 0 ? 2 : 1;
}

void vsock_conn_drop(struct vsock_conn *conn, uint32_t bytes)
{
	conn->buffer_head = (conn->buffer_head + bytes) & (conn->buf_alloc - 1);
	conn->buffered -= bytes;
}
