/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "vsock_host.h"
#include "vsock_priv.h"

_Static_assert(sizeof(struct virtio_vsock_hdr) == VSOCK_HEADER_BYTES, "VIRTIO 1.2, 5.10.6");

#define MAX_EVENTS 64
#define READABLE (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)
#define NS_PER_MS 1000000u
#define NS_PER_S 1000000000u

/* What epoll tells of anything that is not a connection. */
enum tag { TAG_WAKE, TAG_RX_KICK, TAG_TX_KICK, TAG_LISTENER, N_TAGS };

static int watch(struct vsock_engine *engine, int fd, uint32_t events, uint64_t what)
{
	struct epoll_event event = {.events = events, .data.u64 = what};

	return epoll_ctl(engine->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

static int watch_all(struct vsock_engine *engine)
{
	int err = watch(engine, engine->gate.wake_fd, EPOLLIN, TAG_WAKE);

	if (err == 0)
		err = watch(engine, engine->config.rx_kick_fd, EPOLLIN, TAG_RX_KICK);
	if (err == 0)
		err = watch(engine, engine->config.tx_kick_fd, EPOLLIN, TAG_TX_KICK);
	if (err == 0)
		err = watch(engine, engine->config.listener_fd, EPOLLIN | EPOLLET, TAG_LISTENER);
	return err;
}

int vsock_engine_create(const struct vsock_config *config, struct vsock_engine **ret)
{
	struct vsock_engine *engine = calloc(1, sizeof(*engine));
	int err;

	if (!engine)
		return -ENOMEM;
	engine->config = *config;
	engine->config.name[VSOCK_MAX_NAME_BYTES - 1] = '\0';
	vsock_table_init(&engine->table);
	err = engine_gate_init(&engine->gate);
	if (err < 0) {
		free(engine);
		return err;
	}
	engine->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	err = engine->epoll_fd < 0 ? -errno : watch_all(engine);
	if (err < 0) {
		vsock_engine_destroy(engine);
		return err;
	}
	*ret = engine;
	return 0;
}

int vsock_engine_destroy(struct vsock_engine *engine)
{
	int err = engine_gate_deinit(&engine->gate);

	if (err < 0)
		return err;
	for (uint32_t i = 0; i < engine->table.n_ever; i++)
		if (engine->table.conns[i].state != VSOCK_FREE)
			vsock_conn_free(&engine->table, &engine->table.conns[i]);
	if (engine->epoll_fd >= 0)
		close(engine->epoll_fd);
	free(engine);
	return 0;
}

int vsock_watch_conn(struct vsock_engine *engine, struct vsock_conn *conn)
{
	/* Edges: what a socket is ready for is remembered in the connection, and no packet
	 * costs a system call to ask again. */
	return watch(engine, conn->fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, (uintptr_t)conn);
}

void vsock_publish(struct virtqueue *vq, int irq_fd, uint64_t *interrupts)
{
	if (!virtqueue_publish(vq) || irq_fd < 0)
		return;
	engine_count(interrupts, 1);
	engine_signal_fd(irq_fd);
}

static uint64_t clock_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

/* Time as deadlines know it: it stands still while the engine does. */
static uint64_t engine_ns(const struct vsock_engine *engine)
{
	return clock_ns() - engine->parked_ns;
}

void vsock_start_timer(struct vsock_engine *engine, struct vsock_conn *conn)
{
	vsock_conn_set_timer(&engine->table, conn,
			     engine_ns(engine) + engine->config.peer_timeout_ns);
}

/* --- ends of connections */

static void count_end(struct vsock_engine *engine, const struct vsock_conn *conn)
{
	bool was_open = conn->state == VSOCK_OPEN;

	engine_count(was_open ? &engine->stats.closed : &engine->stats.refused, 1);
}

void vsock_end(struct vsock_engine *engine, struct vsock_conn *conn, uint8_t due)
{
	count_end(engine, conn);
	close(conn->fd);
	conn->fd = -1;
	conn->state = VSOCK_ENDING;
	conn->due = 0;
	conn->is_readable = false;
	vsock_conn_clear_timer(&engine->table, conn);
	vsock_conn_run(&engine->table, conn, due);
}

void vsock_drop(struct vsock_engine *engine, struct vsock_conn *conn)
{
	count_end(engine, conn);
	vsock_conn_free(&engine->table, conn);
}

void vsock_shut_host(struct vsock_engine *engine, struct vsock_conn *conn, uint8_t flags)
{
	if ((conn->host_shutdown | flags) == conn->host_shutdown)
		return;
	conn->host_shutdown |= flags;
	if (conn->host_shutdown == VSOCK_SHUTDOWN_BOTH)
		vsock_end(engine, conn, VSOCK_DUE_SHUTDOWN);
	else
		vsock_conn_run(&engine->table, conn, VSOCK_DUE_SHUTDOWN);
}

static void expire(struct vsock_engine *engine)
{
	struct vsock_conn *conn = TAILQ_FIRST(&engine->table.timers);
	uint64_t now = conn ? engine_ns(engine) : 0;

	for (; conn && conn->deadline_ns <= now; conn = TAILQ_FIRST(&engine->table.timers)) {
		vsock_conn_clear_timer(&engine->table, conn);
		if (conn->state == VSOCK_GREETING)
			vsock_drop(engine, conn);
		else if (conn->state == VSOCK_REQUESTED)
			vsock_end(engine, conn, VSOCK_DUE_RST);
		else /* ENDING: the guest's last word did not come */
			vsock_conn_run(&engine->table, conn, VSOCK_DUE_RST);
	}
}

/* --- connections from the host */

static void accept_all(struct vsock_engine *engine)
{
	while (engine->is_listener_ready && engine->table.n_used < VSOCK_MAX_CONNS) {
		int fd =
		    accept4(engine->config.listener_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
		struct vsock_conn *conn;

		if (fd < 0) {
			/* Out of descriptors or memory, who waits goes on waiting: until something
			 * happens here, most likely the end of another connection. */
			if (errno == EAGAIN)
				engine->is_listener_ready = false;
			if (errno != EINTR && errno != ECONNABORTED)
				return;
			continue;
		}
		conn = vsock_conn_new(&engine->table, fd);
		vsock_start_timer(engine, conn);
		if (vsock_watch_conn(engine, conn) < 0)
			vsock_drop(engine, conn);
	}
}

static void greet(struct vsock_engine *engine, struct vsock_conn *conn)
{
	uint32_t port;
	int ret = vsock_host_greeting(conn->fd, &port);

	if (ret == 0 && !conn->has_half_closed)
		return;
	if (ret <= 0) {
		vsock_drop(engine, conn);
		return;
	}
	conn->state = VSOCK_REQUESTED;
	vsock_conn_bind(&engine->table, conn, port, vsock_pick_host_port(&engine->table, port));
	vsock_start_timer(engine, conn);
	vsock_conn_run(&engine->table, conn, VSOCK_DUE_REQUEST);
}

static void handle_socket(struct vsock_engine *engine, struct vsock_conn *conn, uint32_t events)
{
	conn->is_readable |= (events & READABLE) != 0;
	conn->has_half_closed |= (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
	conn->is_hung_up |= (events & (EPOLLHUP | EPOLLERR)) != 0;
	switch (conn->state) {
	case VSOCK_GREETING:
		greet(engine, conn);
		return;
	case VSOCK_REQUESTED:
		if (conn->is_hung_up)
			vsock_end(engine, conn, VSOCK_DUE_RST);
		return;
	default:
		vsock_flush(engine, conn);
	}
	if (conn->state != VSOCK_OPEN)
		return;
	if (!(conn->guest_shutdown & VIRTIO_VSOCK_SHUTDOWN_RCV))
		vsock_conn_run(&engine->table, conn, 0);
	else if (conn->is_hung_up) /* its end of file would never be read */
		vsock_shut_host(engine, conn, VSOCK_SHUTDOWN_BOTH);
}

/* --- the loop */

int vsock_engine_serve(struct vsock_engine *engine)
{
	/* Guest-controlled: both rings. */
	int tx, rx;

	/* Answers first: what the guest has said in time is not too late. */
	tx = vsock_serve_tx(engine);
	expire(engine);
	accept_all(engine);
	rx = tx < 0 ? 0 : vsock_serve_rx(engine);
	if (tx >= 0 && rx >= 0)
		return tx || rx;
	engine->config.rx->is_broken = engine->config.tx->is_broken = true;
	return -EPROTO;
}

static void handle_event(struct vsock_engine *engine, const struct epoll_event *event)
{
	switch (event->data.u64) {
	case TAG_WAKE:
		engine_drain_fd(engine->gate.wake_fd);
		break;
	case TAG_RX_KICK:
		engine_drain_fd(engine->config.rx_kick_fd);
		engine_count(&engine->stats.rx_kicks, 1);
		engine->is_rx_starved = false;
		break;
	case TAG_TX_KICK:
		engine_drain_fd(engine->config.tx_kick_fd);
		engine_count(&engine->stats.tx_kicks, 1);
		break;
	case TAG_LISTENER:
		engine->is_listener_ready = true;
		break;
	default:
		handle_socket(engine, (struct vsock_conn *)(uintptr_t)event->data.u64,
			      event->events);
	}
}

/* The shorter of timeout_ms and the time to the next deadline, rounded up. */
static int next_timeout(const struct vsock_engine *engine, int timeout_ms)
{
	const struct vsock_conn *conn = TAILQ_FIRST(&engine->table.timers);
	uint64_t now, left_ms;

	if (!conn || timeout_ms == 0)
		return timeout_ms;
	now = engine_ns(engine);
	left_ms = conn->deadline_ns <= now ? 0 : (conn->deadline_ns - now) / NS_PER_MS + 1;
	return timeout_ms < 0 || left_ms < (uint64_t)timeout_ms ? (int)left_ms : timeout_ms;
}

int vsock_engine_wait(struct vsock_engine *engine, int timeout_ms)
{
	struct epoll_event events[MAX_EVENTS];
	int n = epoll_wait(engine->epoll_fd, events, MAX_EVENTS, next_timeout(engine, timeout_ms));

	if (n < 0)
		return errno == EINTR ? 0 : -errno;
	/* An event is its own connection's alone, so handling one invalidates no other. */
	for (int i = 0; i < n; i++)
		handle_event(engine, &events[i]);
	return 0;
}

/* Relative names of sockets are found in the directory. The thread gets a working directory of
 * its own where the host allows that; where not, the process has no other use for its own. */
static int enter_directory(const struct vsock_engine *engine)
{
	if (engine->config.directory_fd < 0)
		return 0;
	if (unshare(CLONE_FS) < 0 && errno != EPERM && errno != ENOSYS)
		return -errno;
	return fchdir(engine->config.directory_fd) < 0 ? -errno : 0;
}

static bool checkpoint(struct vsock_engine *engine)
{
	uint64_t began;
	bool must_stop;

	if (!engine_gate_is_wanted(&engine->gate))
		return false;
	began = clock_ns();
	must_stop = engine_gate_checkpoint(&engine->gate);
	engine->parked_ns += clock_ns() - began;
	return must_stop;
}

int vsock_engine_run(struct vsock_engine *engine)
{
	int ret = engine_gate_enter(&engine->gate);

	if (ret < 0)
		return ret;
	ret = enter_directory(engine);
	/* The rings are looked at first: they may hold chains whose kick was drained before a
	 * quiesce, or came before the engine existed. */
	while (ret >= 0 && !checkpoint(engine)) {
		ret = vsock_engine_serve(engine);
		if (ret >= 0)
			ret = vsock_engine_wait(engine, ret > 0 ? 0 : -1);
	}
	if (ret == -EPROTO) {
		__atomic_store_n(&engine->fault, (uint32_t)ENGINE_FAULT_RING, __ATOMIC_RELEASE);
		engine_signal_fd(engine->config.fault_fd);
	}
	engine_gate_leave(&engine->gate);
	return ret < 0 ? ret : 0;
}

struct engine_gate *vsock_engine_gate(struct vsock_engine *engine)
{
	return &engine->gate;
}

int vsock_engine_fault(const struct vsock_engine *engine)
{
	return (int)__atomic_load_n(&engine->fault, __ATOMIC_ACQUIRE);
}

void vsock_engine_stats(const struct vsock_engine *engine, struct vsock_stats *ret)
{
	engine_copy_counters(ret, &engine->stats, sizeof(*ret));
}
