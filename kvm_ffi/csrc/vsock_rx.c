/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* From the host's sockets to the guest. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "vsock_priv.h"

static const struct {
	uint8_t due;
	uint8_t op;
} order[] = {
    {VSOCK_DUE_RST, VIRTIO_VSOCK_OP_RST},
    {VSOCK_DUE_REQUEST, VIRTIO_VSOCK_OP_REQUEST},
    {VSOCK_DUE_RESPONSE, VIRTIO_VSOCK_OP_RESPONSE},
    {VSOCK_DUE_SHUTDOWN, VIRTIO_VSOCK_OP_SHUTDOWN},
    {VSOCK_DUE_CREDIT_UPDATE, VIRTIO_VSOCK_OP_CREDIT_UPDATE},
    {VSOCK_DUE_CREDIT_REQUEST, VIRTIO_VSOCK_OP_CREDIT_REQUEST},
};

/* Pop one receive chain behind the slots' own: 1, 0 none or no room, -EPROTO. When there is none at
 * all, a kick was asked for and no chain came meanwhile. */
static int rx_pop(struct vsock_engine *engine)
{
	/* Guest-controlled: the receive ring. */
	struct virtqueue *vq = engine->config.rx;
	struct vsock_slot *slot = &engine->slots[engine->n_slots];
	uint32_t first_iov = engine->n_slots > 0 ? slot[-1].first_iov + slot[-1].n_iov : 0;
	struct desc_chain chain = {.iov = engine->rx_iov + first_iov,
				   .max_iov = VIRTQUEUE_MAX_SIZE};
	int got;

	/* A chain of any length must fit behind those that are there. */
	if (first_iov > VIRTQUEUE_MAX_SIZE)
		return 0;
	do
		got = virtqueue_pop(vq, &chain);
	while (got == 0 && engine->n_slots == 0 && virtqueue_enable_kick(vq));
	if (got <= 0) {
		engine->is_rx_starved = got == 0 && engine->n_slots == 0;
		return got;
	}
	/* A buffer for a header alone could never take data. */
	if (chain.n_readable > 0 || chain.writable_len <= VSOCK_HEADER_BYTES)
		return -EPROTO;
	slot->first_iov = first_iov;
	slot->n_iov = chain.n_writable;
	slot->room = chain.writable_len - VSOCK_HEADER_BYTES;
	slot->head = chain.head;
	engine->n_slots++;
	return 1;
}

static struct virtio_vsock_hdr header_for(const struct vsock_engine *engine, uint32_t guest_port,
					  uint32_t host_port, uint16_t op)
{
	return (struct virtio_vsock_hdr){
	    .src_cid = VSOCK_HOST_CID,
	    .dst_cid = engine->config.guest_cid,
	    .src_port = host_port,
	    .dst_port = guest_port,
	    .type = VIRTIO_VSOCK_TYPE_STREAM,
	    .op = op,
	};
}

/* Complete one slot with a header and the payload that is in place behind it. */
static void rx_complete(struct vsock_engine *engine, const struct vsock_slot *slot,
			const struct virtio_vsock_hdr *hdr)
{
	iov_copy_in(engine->rx_iov + slot->first_iov, slot->n_iov, 0, hdr, sizeof(*hdr));
	virtqueue_add_used(engine->config.rx, slot->head, VSOCK_HEADER_BYTES + hdr->len);
	engine_count(&engine->stats.rx_packets, 1);
}

/* Fill in what every packet of a connection tells. */
static void add_credit(struct vsock_conn *conn, struct virtio_vsock_hdr *hdr)
{
	hdr->buf_alloc = conn->buf_alloc;
	hdr->fwd_cnt = conn->fwd_cnt;
	conn->told_fwd_cnt = conn->fwd_cnt;
	conn->due &= (uint8_t)~VSOCK_DUE_CREDIT_UPDATE;
}

/* Answer a packet that has no connection: 1, 0 no room, -EPROTO. */
static int rx_reset(struct vsock_engine *engine)
{
	const struct vsock_reset *reset = &engine->resets[engine->first_reset];
	struct virtio_vsock_hdr hdr =
	    header_for(engine, reset->guest_port, reset->host_port, VIRTIO_VSOCK_OP_RST);
	int got = rx_pop(engine);

	if (got <= 0)
		return got;
	hdr.type = reset->type;
	rx_complete(engine, &engine->slots[0], &hdr);
	engine->n_slots = 0;
	engine->first_reset = (engine->first_reset + 1) % VSOCK_MAX_RESETS;
	engine->n_resets--;
	return 1;
}

/* Send the first packet that is due: 1, 0 no room, -EPROTO. */
static int rx_control(struct vsock_engine *engine, struct vsock_conn *conn)
{
	struct virtio_vsock_hdr hdr;
	int got = rx_pop(engine);
	size_t i = 0;

	if (got <= 0)
		return got;
	while (!(conn->due & order[i].due))
		i++;
	hdr = header_for(engine, conn->guest_port, conn->host_port, order[i].op);
	conn->due &= (uint8_t)~order[i].due;
	if (order[i].due == VSOCK_DUE_SHUTDOWN)
		hdr.flags = conn->host_shutdown;
	add_credit(conn, &hdr);
	rx_complete(engine, &engine->slots[0], &hdr);
	engine->n_slots = 0;
	if (order[i].due == VSOCK_DUE_RST)
		vsock_conn_free(&engine->table, conn);
	else if (conn->state == VSOCK_ENDING)
		vsock_start_timer(engine, conn);
	return 1;
}

/* Gather chains for up to limit bytes of payload: 1 (data_iov says where), 0 no room, -EPROTO. */
static int rx_gather(struct vsock_engine *engine, uint32_t limit, uint32_t *n_data, uint32_t *bytes)
{
	*n_data = *bytes = 0;
	while (engine->n_slots < VSOCK_RX_BATCH && *bytes < limit) {
		struct vsock_slot *slot = &engine->slots[engine->n_slots];
		size_t skip = VSOCK_HEADER_BYTES;
		int got = rx_pop(engine);

		if (got < 0 || (got == 0 && engine->n_slots == 0))
			return got;
		if (got == 0)
			break;
		/* Header and payload may be cut anywhere. A chain of which not all entries fit
		 * one read goes back, unless it is the first: that one always fits. */
		if (*n_data + slot->n_iov > VIRTQUEUE_MAX_SIZE) {
			virtqueue_unpop(engine->config.rx, 1);
			engine->n_slots--;
			break;
		}
		if (slot->room > limit - *bytes)
			slot->room = limit - *bytes;
		for (uint32_t i = 0, left = slot->room; i < slot->n_iov && left > 0; i++) {
			const struct iovec *from = &engine->rx_iov[slot->first_iov + i];
			size_t here = from->iov_len;

			if (skip >= here) {
				skip -= here;
				continue;
			}
			here = here - skip < left ? here - skip : left;
			engine->data_iov[*n_data].iov_base = (uint8_t *)from->iov_base + skip;
			engine->data_iov[(*n_data)++].iov_len = here;
			left -= (uint32_t)here;
			skip = 0;
		}
		*bytes += slot->room;
	}
	return 1;
}

/* Complete as many slots as got bytes fill; the others go back. */
static void rx_deliver(struct vsock_engine *engine, struct vsock_conn *conn, uint32_t got)
{
	struct virtio_vsock_hdr hdr =
	    header_for(engine, conn->guest_port, conn->host_port, VIRTIO_VSOCK_OP_RW);
	uint32_t n = 0;

	if (got > 0)
		add_credit(conn, &hdr);
	conn->sent_cnt += got;
	engine_count(&engine->stats.rx_bytes, got);
	for (; got > 0; n++) {
		const struct vsock_slot *slot = &engine->slots[n];

		hdr.len = got < slot->room ? got : slot->room;
		rx_complete(engine, slot, &hdr);
		got -= hdr.len;
	}
	virtqueue_unpop(engine->config.rx, (uint16_t)(engine->n_slots - n));
	engine->n_slots = 0;
}

/* The host's side has ended its stream, or all of it. */
static void rx_end_of_file(struct vsock_engine *engine, struct vsock_conn *conn)
{
	conn->is_readable = false;
	vsock_shut_host(engine, conn,
			conn->is_hung_up ? VSOCK_SHUTDOWN_BOTH
					 : (uint8_t)VIRTIO_VSOCK_SHUTDOWN_SEND);
}

/* The guest has no room. An end of file needs none; data makes us ask for some. */
static void rx_without_credit(struct vsock_engine *engine, struct vsock_conn *conn)
{
	uint8_t byte;
	ssize_t got = recv(conn->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);

	/* Once: its answer may be that there is still none, and it tells by itself when there is.
	 */
	if (got > 0 && !conn->has_asked)
		vsock_conn_run(&engine->table, conn, VSOCK_DUE_CREDIT_REQUEST);
	if (got > 0)
		conn->has_asked = true;
	else if (got < 0 && errno == EAGAIN)
		conn->is_readable = false;
	else
		rx_end_of_file(engine, conn);
}

/* Read once from the host's socket into the guest: 1, 0 no room, -EPROTO. */
static int rx_data(struct vsock_engine *engine, struct vsock_conn *conn)
{
	uint32_t n_data, bytes;
	ssize_t got;
	int ret = rx_gather(engine, vsock_conn_credit(conn), &n_data, &bytes);

	if (ret <= 0)
		return ret;
	got = readv(conn->fd, engine->data_iov, (int)n_data);
	rx_deliver(engine, conn, got > 0 ? (uint32_t)got : 0);
	/* A short read has emptied the socket, and what comes later is a new edge; an end of
	 * file that is known to be there is not. */
	if (got > 0)
		conn->is_readable = (uint32_t)got == bytes || conn->has_half_closed;
	else if (got < 0 && errno == EAGAIN)
		conn->is_readable = false;
	else if (got == 0 || errno != EINTR)
		rx_end_of_file(engine, conn);
	return 1;
}

/* Whether there may be something to read that the guest is to get. */
static bool has_data(const struct vsock_conn *conn)
{
	return conn->state == VSOCK_OPEN && conn->is_readable &&
	       !(conn->guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_RCV);
}

/* Give one connection its turn: 1, 0 no room, -EPROTO. */
static int rx_turn(struct vsock_engine *engine, struct vsock_conn *conn)
{
	if (conn->due)
		return rx_control(engine, conn);
	if (!has_data(conn))
		return 1;
	if (vsock_conn_credit(conn) == 0) {
		rx_without_credit(engine, conn);
		return 1;
	}
	conn->has_asked = false;
	return rx_data(engine, conn);
}

int vsock_serve_rx(struct vsock_engine *engine)
{
	/* Guest-controlled: the receive ring. */
	bool was_full = engine->n_resets == VSOCK_MAX_RESETS;
	struct vsock_conn *conn;
	int ret = 1;
	int n = 0;

	if (engine->is_rx_starved)
		return 0;
	virtqueue_disable_kick(engine->config.rx);
	for (; n < VSOCK_BURST_PACKETS && ret > 0 && engine->n_resets > 0; n++)
		ret = rx_reset(engine);
	while (n++ < VSOCK_BURST_PACKETS && ret > 0 && (conn = TAILQ_FIRST(&engine->table.run))) {
		ret = rx_turn(engine, conn);
		if (ret <= 0 || !conn->is_running)
			continue;
		/* To the end of the line, or out of it. */
		vsock_conn_unrun(&engine->table, conn);
		if (conn->due || (has_data(conn) && !conn->has_asked))
			vsock_conn_run(&engine->table, conn, 0);
	}
	vsock_publish(engine->config.rx, engine->config.rx_irq_fd, &engine->stats.rx_interrupts);
	if (ret <= 0)
		return ret;
	/* Room for resets lets the transmit ring go on. */
	return !TAILQ_EMPTY(&engine->table.run) || was_full;
}
