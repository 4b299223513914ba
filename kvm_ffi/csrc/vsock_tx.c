/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* From the guest to the host's sockets. */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#include "vsock_host.h"
#include "vsock_priv.h"

static void violated(struct vsock_engine *engine, struct vsock_conn *conn)
{
	engine_count(&engine->stats.violations, 1);
	if (conn->state == VSOCK_ENDING)
		vsock_conn_run(&engine->table, conn, VSOCK_DUE_RST);
	else
		vsock_end(engine, conn, VSOCK_DUE_RST);
}

static void count_forwarded(struct vsock_engine *engine, struct vsock_conn *conn, uint32_t bytes)
{
	if (vsock_conn_forwarded(conn, bytes) && conn->state == VSOCK_OPEN)
		vsock_conn_run(&engine->table, conn, VSOCK_DUE_CREDIT_UPDATE);
}

/* All that the guest sent has been written; act on what it said about more. */
static void finish_forwarding(struct vsock_engine *engine, struct vsock_conn *conn)
{
	if (conn->state == VSOCK_ORPHAN)
		vsock_conn_free(&engine->table, conn);
	else if (conn->guest_shutdown == VSOCK_SHUTDOWN_BOTH)
		vsock_end(engine, conn, VSOCK_DUE_RST);
	else if (conn->guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND)
		shutdown(conn->fd, SHUT_WR);
}

/* The host's program reads no more: what it did not get is lost, as with any socket. What
 * it wrote before may still wait in the socket, so that direction goes on. */
static void host_is_deaf(struct vsock_engine *engine, struct vsock_conn *conn)
{
	uint32_t lost = conn->buffered;

	vsock_conn_drop(conn, lost);
	if (conn->state == VSOCK_ORPHAN) {
		vsock_conn_free(&engine->table, conn);
		return;
	}
	count_forwarded(engine, conn, lost);
	if (conn->guest_shutdown == VSOCK_SHUTDOWN_BOTH)
		vsock_end(engine, conn, VSOCK_DUE_RST);
	else
		vsock_shut_host(engine, conn, VIRTIO_VSOCK_SHUTDOWN_RCV);
}

void vsock_flush(struct vsock_engine *engine, struct vsock_conn *conn)
{
	struct iovec kept[2];
	uint32_t n_kept;
	int64_t wrote;

	if (conn->buffered == 0)
		return;
	n_kept = (uint32_t)vsock_conn_kept(conn, kept);
	wrote = vsock_host_write(conn->fd, kept, n_kept, 0, conn->buffered);
	if (wrote < 0) {
		host_is_deaf(engine, conn);
		return;
	}
	vsock_conn_drop(conn, (uint32_t)wrote);
	count_forwarded(engine, conn, (uint32_t)wrote);
	if (conn->buffered == 0)
		finish_forwarding(engine, conn);
}

static void tx_payload(struct vsock_engine *engine, struct vsock_conn *conn,
		       const struct desc_chain *chain, uint32_t len)
{
	/* Guest-controlled: the payload; its length is checked against the chain. */
	int64_t wrote = 0;
	int err;

	if (conn->state == VSOCK_ENDING)
		return; /* sent before the guest knew */
	if (conn->state != VSOCK_OPEN || (conn->guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND)) {
		violated(engine, conn);
		return;
	}
	engine_count(&engine->stats.tx_bytes, len);
	if (conn->buffered == 0 && !(conn->host_shutdown & VIRTIO_VSOCK_SHUTDOWN_RCV))
		wrote = vsock_host_write(conn->fd, chain->iov, chain->n_readable,
					 VSOCK_HEADER_BYTES, len);
	if (wrote < 0 || (conn->host_shutdown & VIRTIO_VSOCK_SHUTDOWN_RCV)) {
		count_forwarded(engine, conn, len);
		host_is_deaf(engine, conn);
		return;
	}
	count_forwarded(engine, conn, (uint32_t)wrote);
	if ((uint32_t)wrote == len)
		return;
	err = vsock_conn_keep(conn, chain->iov, chain->n_readable,
			      VSOCK_HEADER_BYTES + (size_t)wrote, len - (uint32_t)wrote);
	if (err < 0)
		violated(engine, conn);
}

static void reply_reset(struct vsock_engine *engine, const struct virtio_vsock_hdr *hdr)
{
	uint32_t last = (engine->first_reset + engine->n_resets) % VSOCK_MAX_RESETS;

	if (hdr->op == VIRTIO_VSOCK_OP_RST)
		return; /* never a reset for a reset */
	engine->resets[last] = (struct vsock_reset){hdr->src_port, hdr->dst_port, hdr->type};
	engine->n_resets++; /* serve_tx() has seen to it that there is room */
}

static void tx_request(struct vsock_engine *engine, const struct virtio_vsock_hdr *hdr)
{
	/* Guest-controlled: hdr (a private copy). */
	bool is_full = engine->table.n_used == VSOCK_MAX_CONNS;
	int fd = is_full ? -EMFILE : vsock_host_connect(engine->config.name, hdr->dst_port);
	struct vsock_conn *conn = fd < 0 ? NULL : vsock_conn_new(&engine->table, fd);

	if (!conn || vsock_watch_conn(engine, conn) < 0) {
		if (conn)
			vsock_conn_free(&engine->table, conn);
		engine_count(&engine->stats.refused, 1);
		reply_reset(engine, hdr);
		return;
	}
	conn->state = VSOCK_OPEN;
	conn->peer_buf_alloc = hdr->buf_alloc;
	conn->peer_fwd_cnt = hdr->fwd_cnt;
	vsock_conn_bind(&engine->table, conn, hdr->src_port, hdr->dst_port);
	engine_count(&engine->stats.guest_connections, 1);
	vsock_conn_run(&engine->table, conn, VSOCK_DUE_RESPONSE);
}

static void tx_response(struct vsock_engine *engine, struct vsock_conn *conn)
{
	if (conn->state != VSOCK_REQUESTED) {
		violated(engine, conn);
		return;
	}
	vsock_conn_clear_timer(&engine->table, conn);
	if (vsock_host_welcome(conn->fd, conn->host_port) < 0) {
		vsock_end(engine, conn, VSOCK_DUE_RST);
		return;
	}
	conn->state = VSOCK_OPEN;
	engine_count(&engine->stats.host_connections, 1);
}

static void tx_reset(struct vsock_engine *engine, struct vsock_conn *conn)
{
	bool is_over = conn->guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_SEND;

	if (conn->state == VSOCK_ENDING) {
		vsock_conn_free(&engine->table, conn);
	} else if (conn->state == VSOCK_OPEN && is_over && conn->buffered > 0) {
		/* It had said that this was all: the host's program shall get all of it. */
		engine_count(&engine->stats.closed, 1);
		vsock_conn_unbind(&engine->table, conn);
	} else {
		vsock_drop(engine, conn);
	}
}

static void tx_shutdown(struct vsock_engine *engine, struct vsock_conn *conn, uint32_t flags)
{
	/* Guest-controlled: flags. */
	if (conn->state == VSOCK_ENDING) {
		/* Both sides ended at once: the guest waits for a reset as we do. */
		if ((conn->guest_shutdown |= flags & VSOCK_SHUTDOWN_BOTH) == VSOCK_SHUTDOWN_BOTH)
			vsock_conn_run(&engine->table, conn, VSOCK_DUE_RST);
		return;
	}
	if (conn->state != VSOCK_OPEN) {
		violated(engine, conn);
		return;
	}
	conn->guest_shutdown |= flags & VSOCK_SHUTDOWN_BOTH;
	if (conn->guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_RCV)
		shutdown(conn->fd, SHUT_RD);
	if (conn->buffered == 0)
		finish_forwarding(engine, conn);
}

static void tx_for_conn(struct vsock_engine *engine, struct vsock_conn *conn,
			const struct virtio_vsock_hdr *hdr, const struct desc_chain *chain)
{
	/* Guest-controlled: hdr (a private copy). */
	conn->peer_buf_alloc = hdr->buf_alloc;
	conn->peer_fwd_cnt = hdr->fwd_cnt;
	switch (hdr->op) {
	case VIRTIO_VSOCK_OP_RW:
		tx_payload(engine, conn, chain, hdr->len);
		break;
	case VIRTIO_VSOCK_OP_CREDIT_UPDATE:
		break;
	case VIRTIO_VSOCK_OP_CREDIT_REQUEST:
		if (conn->state == VSOCK_OPEN)
			vsock_conn_run(&engine->table, conn, VSOCK_DUE_CREDIT_UPDATE);
		break;
	case VIRTIO_VSOCK_OP_RESPONSE:
		tx_response(engine, conn);
		break;
	case VIRTIO_VSOCK_OP_SHUTDOWN:
		tx_shutdown(engine, conn, hdr->flags);
		return;
	case VIRTIO_VSOCK_OP_RST:
		tx_reset(engine, conn);
		return;
	default: /* a second REQUEST for the same ports, or no operation at all */
		violated(engine, conn);
	}
	/* It may have had data for which the guest had no room. */
	if (conn->state == VSOCK_OPEN && conn->is_readable)
		vsock_conn_run(&engine->table, conn, 0);
}

static void tx_packet(struct vsock_engine *engine, const struct desc_chain *chain)
{
	/* Guest-controlled: the packet, its header copied once. */
	struct virtio_vsock_hdr hdr;
	struct vsock_conn *conn;

	engine_count(&engine->stats.tx_packets, 1);
	if (chain->n_writable > 0 ||
	    iov_copy_out(chain->iov, chain->n_readable, 0, &hdr, sizeof(hdr)) < sizeof(hdr)) {
		engine_count(&engine->stats.tx_malformed, 1);
		return;
	}
	/* The empty asm claims to change hdr: what is checked is what is used. */
	__asm__ volatile("" : "+m"(hdr));
	if (hdr.src_cid != engine->config.guest_cid || hdr.dst_cid != VSOCK_HOST_CID ||
	    hdr.len > chain->readable_len - VSOCK_HEADER_BYTES) {
		engine_count(&engine->stats.tx_malformed, 1);
		return;
	}
	if (hdr.type != VIRTIO_VSOCK_TYPE_STREAM) {
		reply_reset(engine, &hdr);
		return;
	}
	conn = vsock_conn_find(&engine->table, hdr.src_port, hdr.dst_port);
	if (conn)
		tx_for_conn(engine, conn, &hdr, chain);
	else if (hdr.op == VIRTIO_VSOCK_OP_REQUEST)
		tx_request(engine, &hdr);
	else
		reply_reset(engine, &hdr);
}

int vsock_serve_tx(struct vsock_engine *engine)
{
	/* Guest-controlled: the transmit ring. */
	struct virtqueue *vq = engine->config.tx;
	struct desc_chain chain = {.iov = engine->tx_iov, .max_iov = VIRTQUEUE_MAX_SIZE};
	bool is_blocked = false;
	int n = 0;
	int ret = 0;

	virtqueue_disable_kick(vq);
	do {
		while (n < VSOCK_BURST_PACKETS && !is_blocked) {
			is_blocked = engine->n_resets == VSOCK_MAX_RESETS;
			ret = is_blocked ? 0 : virtqueue_pop(vq, &chain);
			if (ret <= 0)
				break;
			tx_packet(engine, &chain);
			virtqueue_add_used(vq, chain.head, 0);
			n++;
		}
	} while (ret == 0 && n < VSOCK_BURST_PACKETS && !is_blocked && virtqueue_enable_kick(vq));
	vsock_publish(vq, engine->config.tx_irq_fd, &engine->stats.tx_interrupts);
	return ret < 0 ? ret : n == VSOCK_BURST_PACKETS;
}
