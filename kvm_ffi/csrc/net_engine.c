/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "net_engine.h"

#include <errno.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

_Static_assert(sizeof(struct virtio_net_hdr_v1) == NET_HEADER_BYTES, "the header the tap uses");

/* Packets per direction between two looks at everything else, so that neither direction,
 * nor a quiesce, starves; also the most that one interrupt covers. */
#define BURST_PACKETS 64
#define NS_PER_SEC 1000000000u
/* readv(2) takes IOV_MAX; one entry is the spare. */
#define RX_MAX_IOV (VIRTQUEUE_MAX_SIZE - 1)

/* A receive chain that was popped but not filled yet. */
struct rx_slot {
	uint16_t head;
	uint16_t n_iov;
	uint32_t len;
};

struct net_engine {
	struct net_config config;
	struct engine_gate gate;
	struct net_stats stats;
	uint32_t fault; /* atomic: enum engine_fault */
	bool is_tap_ready; /* the tap may have a packet: no EAGAIN since poll(2) said so */
	bool is_rx_starved; /* the receive ring ran empty and a kick was asked for */
	bool is_tap_dead;
	/* CLOCK_MONOTONIC, until when a limit lets nothing through; 0: it does. */
	uint64_t rx_held_ns;
	uint64_t tx_held_ns;
	/* Receive buffers, gathered for the largest packet: n_slots chains from
	 * slots[first_slot], whose n_iov entries start at iov[first_iov]. A slot has at
	 * least one entry, so room in iov is room in slots. */
	uint32_t first_slot;
	uint32_t n_slots;
	uint32_t first_iov;
	uint32_t n_iov;
	uint32_t gathered; /* bytes that they hold */
	struct rx_slot slots[2 * VIRTQUEUE_MAX_SIZE];
	struct iovec iov[2 * VIRTQUEUE_MAX_SIZE];
	struct iovec tx_iov[VIRTQUEUE_MAX_SIZE];
	uint8_t spare; /* receives the first byte that does not fit */
};

int net_engine_create(const struct net_config *config, struct net_engine **ret)
{
	struct net_engine *engine = calloc(1, sizeof(*engine));
	int err;

	if (!engine)
		return -ENOMEM;
	err = engine_gate_init(&engine->gate);
	if (err < 0) {
		free(engine);
		return err;
	}
	engine->config = *config;
	engine->is_tap_ready = true; /* find out */
	*ret = engine;
	return 0;
}

int net_engine_destroy(struct net_engine *engine)
{
	int err = engine_gate_deinit(&engine->gate);

	if (err == 0)
		free(engine);
	return err;
}

static void signal_fault(struct net_engine *engine, enum engine_fault fault)
{
	__atomic_store_n(&engine->fault, (uint32_t)fault, __ATOMIC_RELEASE);
	engine_signal_fd(engine->config.fault_fd);
}

/* The tap is gone for good. The guest's link stays up as far as it knows: what it sends is
 * dropped until the device is given another tap. */
static void lose_tap(struct net_engine *engine)
{
	if (engine->is_tap_dead)
		return;
	engine->is_tap_dead = true;
	engine->is_tap_ready = false;
	signal_fault(engine, ENGINE_FAULT_BACKEND);
}

static void publish(struct virtqueue *vq, int irq_fd, uint64_t *interrupts, uint64_t *suppressed)
{
	bool is_news = vq->next_used != vq->published_used;

	if (virtqueue_publish(vq) && irq_fd >= 0) {
		engine_count(interrupts, 1);
		engine_signal_fd(irq_fd);
	} else if (is_news) {
		engine_count(suppressed, 1);
	}
}

static uint64_t clock_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * NS_PER_SEC + (uint64_t)now.tv_nsec;
}

static bool is_limited(const struct rate_limiter *limiter)
{
	return limiter && rate_limiter_is_limited(limiter);
}

/* Have a direction wait for a limit: whether it must. */
static bool hold(uint64_t wait_ns, uint64_t now_ns, uint64_t *held_ns, uint64_t *throttled)
{
	if (wait_ns == 0)
		return false;
	*held_ns = now_ns + wait_ns;
	engine_count(throttled, 1);
	return true;
}

/* Whether a limit still holds a direction. */
static bool is_held(uint64_t *held_ns)
{
	if (*held_ns != 0 && clock_ns() >= *held_ns)
		*held_ns = 0;
	return *held_ns != 0;
}

/* Pop one receive chain behind the gathered ones: 1, 0 no more or no room, -EPROTO. */
static int rx_pop_slot(struct net_engine *engine)
{
	/* Guest-controlled: the receive ring. */
	struct virtqueue *vq = engine->config.rx;
	uint32_t end = engine->first_iov + engine->n_iov;
	struct desc_chain chain = {.iov = engine->iov + end, .max_iov = VIRTQUEUE_MAX_SIZE};
	struct rx_slot *slot;
	int got = virtqueue_pop(vq, &chain);

	if (got <= 0)
		return got;
	/* VIRTIO 1.2, 5.1.6.3.1: writable, and at least the header in each. */
	if (chain.n_readable > 0 || chain.writable_len < NET_HEADER_BYTES)
		return -EPROTO;
	if (engine->n_iov + chain.n_writable > RX_MAX_IOV) {
		if (engine->n_slots > 0) {
			virtqueue_unpop(vq, 1);
			return 0;
		}
		/* A chain of all descriptors there are: do without its last one. */
		chain.n_writable--;
		chain.writable_len -= (uint32_t)chain.iov[chain.n_writable].iov_len;
		if (chain.writable_len < NET_HEADER_BYTES)
			return -EPROTO;
	}
	slot = &engine->slots[engine->first_slot + engine->n_slots++];
	slot->head = chain.head;
	slot->n_iov = (uint16_t)chain.n_writable;
	slot->len = chain.writable_len;
	engine->n_iov += chain.n_writable;
	/* Only the first NET_MAX_PACKET_BYTES count, so a few 4 GiB chains cannot wrap. */
	if (slot->len > NET_MAX_PACKET_BYTES)
		slot->len = NET_MAX_PACKET_BYTES;
	engine->gathered += slot->len;
	return 1;
}

/* Move what is gathered to the front when another chain and the spare might not fit. */
static void rx_make_room(struct net_engine *engine)
{
	if (engine->first_iov + engine->n_iov + VIRTQUEUE_MAX_SIZE < 2 * VIRTQUEUE_MAX_SIZE)
		return;
	memmove(engine->iov, engine->iov + engine->first_iov,
		engine->n_iov * sizeof(engine->iov[0]));
	memmove(engine->slots, engine->slots + engine->first_slot,
		engine->n_slots * sizeof(engine->slots[0]));
	engine->first_iov = engine->first_slot = 0;
}

/* Gather buffers for the largest packet, or what there is: 0 (n_slots says what), -EPROTO.
 * An empty ring is reported after a kick was asked for and no chain came meanwhile. */
static int rx_gather(struct net_engine *engine)
{
	uint32_t max_slots = engine->config.is_mergeable ? RX_MAX_IOV : 1;

	do {
		int got = 1;

		while (got > 0 && engine->n_slots < max_slots &&
		       engine->gathered < NET_MAX_PACKET_BYTES) {
			rx_make_room(engine);
			got = rx_pop_slot(engine);
		}
		if (got < 0)
			return got;
	} while (engine->n_slots == 0 && virtqueue_enable_kick(engine->config.rx));
	engine->is_rx_starved = engine->n_slots == 0;
	return 0;
}

/* Hand the first len gathered bytes to the driver as one packet. */
static void rx_deliver(struct net_engine *engine, uint32_t len)
{
	struct virtqueue *vq = engine->config.rx;
	const struct iovec *iov = engine->iov + engine->first_iov;
	uint32_t n_iov = engine->n_iov;
	uint16_t num_buffers = 0;
	uint32_t left = len;

	while (left > 0) {
		struct rx_slot *slot = &engine->slots[engine->first_slot];
		uint32_t here = left < slot->len ? left : slot->len;

		virtqueue_add_used(vq, slot->head, here);
		num_buffers++;
		left -= here;
		engine->gathered -= slot->len;
		engine->first_iov += slot->n_iov;
		engine->n_iov -= slot->n_iov;
		engine->first_slot++;
		engine->n_slots--;
	}
	/* The one field of the header that the tap does not know. It lies in the first chain,
	 * since no chain is shorter than a header. */
	iov_copy_in(iov, n_iov, offsetof(struct virtio_net_hdr_v1, num_buffers), &num_buffers,
		    sizeof(num_buffers));
	engine_count(&engine->stats.rx_packets, 1);
	engine_count(&engine->stats.rx_bytes, len - NET_HEADER_BYTES);
}

/* Receive one packet: 1 there may be more, 0 not now, -EPROTO. */
static int rx_packet(struct net_engine *engine)
{
	struct rate_limiter *limiter = engine->config.rx_limiter;
	uint32_t end;
	ssize_t got;
	int ret = rx_gather(engine);

	if (ret < 0 || engine->n_slots == 0)
		return ret;
	if (is_limited(limiter)) {
		uint64_t now_ns = clock_ns();

		if (hold(rate_limiter_wait(limiter, 1, now_ns), now_ns, &engine->rx_held_ns,
			 &engine->stats.rx_throttled))
			return 0;
	}
	/* A tap cuts a packet to fit and does not say so. One byte in the spare does. */
	end = engine->first_iov + engine->n_iov;
	engine->iov[end].iov_base = &engine->spare;
	engine->iov[end].iov_len = sizeof(engine->spare);
	got = readv(engine->config.tap_fd, engine->iov + engine->first_iov, (int)engine->n_iov + 1);
	if (got > 0) {
		if (is_limited(limiter) && got > (ssize_t)NET_HEADER_BYTES)
			rate_limiter_charge(limiter, (uint32_t)got - NET_HEADER_BYTES);
		if (got < (ssize_t)NET_HEADER_BYTES || got > (ssize_t)engine->gathered)
			engine_count(&engine->stats.rx_dropped, 1);
		else
			rx_deliver(engine, (uint32_t)got);
		return 1;
	}
	if (got < 0 && errno == EINTR)
		return 1;
	engine->is_tap_ready = false;
	/* EFAULT and ENOMEM lose a packet, not the tap; poll(2) tells when the next one is
	 * there. 0 is a peer that hung up, any other errno a tap that was deleted. */
	if (got < 0 && (errno == EFAULT || errno == ENOMEM))
		engine_count(&engine->stats.rx_dropped, 1);
	else if (got == 0 || errno != EAGAIN)
		lose_tap(engine);
	return 0;
}

/* Receive a burst: 1 there may be more, 0 not now, -EPROTO. */
static int serve_rx(struct net_engine *engine)
{
	/* Guest-controlled: the receive ring. */
	int ret = 1;

	if (!engine->is_tap_ready || engine->is_rx_starved || is_held(&engine->rx_held_ns))
		return 0;
	virtqueue_disable_kick(engine->config.rx);
	for (int i = 0; i < BURST_PACKETS && ret > 0; i++)
		ret = rx_packet(engine);
	/* Nothing stays popped between bursts: a quiesce finds the ring as the driver
	 * knows it. */
	virtqueue_unpop(engine->config.rx, (uint16_t)engine->n_slots);
	engine->first_slot = engine->n_slots = 0;
	engine->first_iov = engine->n_iov = 0;
	engine->gathered = 0;
	publish(engine->config.rx, engine->config.rx_irq_fd, &engine->stats.rx_interrupts,
		&engine->stats.rx_suppressed);
	return ret;
}

static void tx_packet(struct net_engine *engine, const struct desc_chain *chain)
{
	/* Guest-controlled: the packet, header included. The kernel copies the header once and
	 * checks it, as it does for every writer of a tap. */
	ssize_t wrote;

	if (chain->readable_len < NET_HEADER_BYTES || chain->n_writable > 0 ||
	    chain->readable_len > NET_MAX_PACKET_BYTES) {
		engine_count(&engine->stats.tx_malformed, 1);
		return;
	}
	if (engine->is_tap_dead) {
		engine_count(&engine->stats.tx_dropped, 1);
		return;
	}
	do
		wrote = writev(engine->config.tap_fd, chain->iov, (int)chain->n_readable);
	while (wrote < 0 && errno == EINTR);
	if (wrote >= 0) {
		engine_count(&engine->stats.tx_packets, 1);
		engine_count(&engine->stats.tx_bytes, chain->readable_len - NET_HEADER_BYTES);
		return;
	}
	/* Dropped, as a wire drops. EAGAIN too: a tap says it only under TUNSETSNDBUF, and
	 * waiting would let a slow reader on the host hold the guest's buffers and a quiesce.
	 * EIO is an interface that is down: it may come up again. */
	engine_count(&engine->stats.tx_dropped, 1);
	if (errno == EBADFD || errno == ENXIO || errno == ENODEV || errno == EPIPE ||
	    errno == ECONNRESET)
		lose_tap(engine);
}

/* Pop one packet that may go: 1, 0 the ring is empty or a limit holds it, -EPROTO. */
static int tx_pop(struct net_engine *engine, struct desc_chain *chain)
{
	/* Guest-controlled: the transmit ring, and how long the packet is. */
	struct rate_limiter *limiter = engine->config.tx_limiter;
	int got = virtqueue_pop(engine->config.tx, chain);
	uint64_t now_ns;
	uint32_t bytes;

	if (got <= 0 || !is_limited(limiter))
		return got;
	bytes =
	    chain->readable_len < NET_MAX_PACKET_BYTES ? chain->readable_len : NET_MAX_PACKET_BYTES;
	bytes -= bytes < NET_HEADER_BYTES ? bytes : NET_HEADER_BYTES;
	now_ns = clock_ns();
	if (!hold(rate_limiter_take(limiter, bytes, now_ns), now_ns, &engine->tx_held_ns,
		  &engine->stats.tx_throttled))
		return 1;
	virtqueue_unpop(engine->config.tx, 1);
	return 0;
}

/* Transmit a burst: 1 there may be more, 0 the ring is empty, -EPROTO. */
static int serve_tx(struct net_engine *engine)
{
	/* Guest-controlled: the transmit ring. */
	struct virtqueue *vq = engine->config.tx;
	struct desc_chain chain = {.iov = engine->tx_iov, .max_iov = VIRTQUEUE_MAX_SIZE};
	int n = 0;
	int ret;

	if (is_held(&engine->tx_held_ns))
		return 0;
	virtqueue_disable_kick(vq);
	do {
		while ((ret = n < BURST_PACKETS ? tx_pop(engine, &chain) : 0) > 0) {
			tx_packet(engine, &chain);
			virtqueue_add_used(vq, chain.head, 0);
			n++;
		}
	} while (ret == 0 && n < BURST_PACKETS && engine->tx_held_ns == 0 &&
		 virtqueue_enable_kick(vq));
	publish(vq, engine->config.tx_irq_fd, &engine->stats.tx_interrupts,
		&engine->stats.tx_suppressed);
	return ret < 0 ? ret : n == BURST_PACKETS;
}

int net_engine_serve(struct net_engine *engine)
{
	/* Guest-controlled: both rings. */
	int tx = serve_tx(engine);
	int rx = tx < 0 ? 0 : serve_rx(engine);

	if (tx >= 0 && rx >= 0)
		return tx || rx;
	engine->config.rx->is_broken = engine->config.tx->is_broken = true;
	return -EPROTO;
}

static void handle_tap_events(struct net_engine *engine, short events)
{
	if (events & POLLIN)
		engine->is_tap_ready = true;
	else if (events)
		lose_tap(engine); /* POLLERR or POLLHUP alone would end every later wait at once */
}

/* How long to wait at most: for what the caller says, or for the first limit to end. NULL: for
 * as long as it takes. */
static struct timespec *wait_limit(const struct net_engine *engine, int timeout_ms,
				   struct timespec *ret)
{
	uint64_t held_ns = engine->rx_held_ns;
	uint64_t left_ns = (uint64_t)timeout_ms * 1000000;

	if (held_ns == 0 || (engine->tx_held_ns != 0 && engine->tx_held_ns < held_ns))
		held_ns = engine->tx_held_ns;
	if (timeout_ms < 0) {
		uint64_t now_ns = held_ns != 0 ? clock_ns() : 0;

		if (held_ns == 0)
			return NULL;
		left_ns = held_ns > now_ns ? held_ns - now_ns : 0;
	}
	ret->tv_sec = (time_t)(left_ns / NS_PER_SEC);
	ret->tv_nsec = (long)(left_ns % NS_PER_SEC);
	return ret;
}

int net_engine_wait(struct net_engine *engine, int timeout_ms)
{
	/* The tap is left out while nothing can be done about a packet: poll(2) would return
	 * at once, for ever. A negative fd is skipped. */
	bool is_listening = !engine->is_tap_dead && !engine->is_tap_ready;
	struct pollfd fds[4] = {
	    {.fd = engine->gate.wake_fd, .events = POLLIN},
	    {.fd = engine->config.rx_kick_fd, .events = POLLIN},
	    {.fd = engine->config.tx_kick_fd, .events = POLLIN},
	    {.fd = is_listening ? engine->config.tap_fd : -1, .events = POLLIN},
	};
	struct timespec limit;

	if (ppoll(fds, 4, wait_limit(engine, timeout_ms, &limit), NULL) < 0)
		return errno == EINTR ? 0 : -errno;
	if ((fds[0].revents | fds[1].revents | fds[2].revents) & POLLNVAL)
		return -EBADF; /* an fd was closed under us: waiting on would spin */
	if (fds[0].revents) {
		engine_drain_fd(fds[0].fd);
		/* Perhaps for a new limit: ask it. */
		engine->rx_held_ns = engine->tx_held_ns = 0;
	}
	if (fds[1].revents) {
		engine_drain_fd(fds[1].fd);
		engine_count(&engine->stats.rx_kicks, 1);
		engine->is_rx_starved = false;
	}
	if (fds[2].revents) {
		engine_drain_fd(fds[2].fd);
		engine_count(&engine->stats.tx_kicks, 1);
	}
	handle_tap_events(engine, fds[3].revents);
	return 0;
}

int net_engine_run(struct net_engine *engine)
{
	int ret = engine_gate_enter(&engine->gate);

	if (ret < 0)
		return ret;
	/* The rings are looked at first: they may hold chains whose kick was drained before a
	 * quiesce, or came before the engine existed. */
	while (ret >= 0 && !engine_gate_checkpoint(&engine->gate)) {
		ret = net_engine_serve(engine);
		if (ret >= 0)
			ret = net_engine_wait(engine, ret > 0 ? 0 : -1);
	}
	if (ret == -EPROTO)
		signal_fault(engine, ENGINE_FAULT_RING);
	engine_gate_leave(&engine->gate);
	return ret < 0 ? ret : 0;
}

struct engine_gate *net_engine_gate(struct net_engine *engine)
{
	return &engine->gate;
}

int net_engine_fault(const struct net_engine *engine)
{
	return (int)__atomic_load_n(&engine->fault, __ATOMIC_ACQUIRE);
}

void net_engine_stats(const struct net_engine *engine, struct net_stats *ret)
{
	engine_copy_counters(ret, &engine->stats, sizeof(*ret));
}
