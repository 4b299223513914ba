/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* Input: setup byte, image length, image, then operations: programs of the host that connect,
 * greet, write, read and hang up, packets in which only some fields are wild, and mutations of the
 * rings, with a look at everything between. Real sockets in a directory of the fuzzer's own. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "guest.h"
#include "vsock_engine.h"

#define CID 9u
#define PORT 5u
#define MAX_PEERS 8
#define PACKET_GPA 0x700u
#define PAYLOAD_GPA 0x1000u
/* Buffers of a payload, all of them the same memory: long enough to fill a socket. */
#define PAYLOAD_BUFFERS 7u

/* "<directory>/v"; a name with slashes is as good to the engine, and the fuzzer's own working
 * directory stays, by which corpus and findings are named. */
static char socket_name[VSOCK_MAX_NAME_BYTES] = "/tmp/fuzz-vsock-XXXXXX";
static char target_name[VSOCK_MAX_NAME_BYTES + 16];
static int event_fd = -1;
static int listener = -1; /* for programs of the host */
static int target = -1; /* for the guest's connections to PORT */
static int peers[MAX_PEERS]; /* the host's ends; -1 is none */

static int listen_at(const char *name)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	strncpy(address.sun_path, name, sizeof(address.sun_path) - 1);
	REQUIRE(bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0);
	REQUIRE(listen(fd, 4) == 0);
	return fd;
}

static void dial(int *peer)
{
	struct sockaddr_un address = {
	    .sun_family = AF_UNIX,
	};

	strncpy(address.sun_path, socket_name, sizeof(address.sun_path) - 1);
	*peer = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (connect(*peer, (struct sockaddr *)&address, sizeof(address)) < 0) {
		close(*peer);
		*peer = -1;
	}
}

static void hang_up(int *peer)
{
	if (*peer >= 0)
		close(*peer);
	*peer = -1;
}

/* One thing that a program of the host does. */
static void act_on_host(struct input *input)
{
	static uint8_t bytes[70000];
	uint8_t what = next_byte(input);
	int *peer = &peers[what % MAX_PEERS];
	char line[32];
	int len;

	if (*peer < 0) {
		*peer = what & 8 ? accept4(target, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC) : -1;
		if (*peer < 0)
			dial(peer);
		return;
	}
	switch (what >> 4) {
	case 0:
	case 1:
		len = snprintf(line, sizeof(line), "CONNECT %u\n", next_byte(input));
		send(*peer, line, (size_t)len, MSG_NOSIGNAL);
		break;
	case 2:
		len = (int)next_bytes(input, (uint8_t *)line, next_byte(input) % sizeof(line));
		send(*peer, line, (size_t)len, MSG_NOSIGNAL);
		break;
	case 3:
	case 4:
		send(*peer, bytes, next_u16(input), MSG_NOSIGNAL);
		break;
	case 5:
	case 6:
	case 7:
		while (recv(*peer, bytes, sizeof(bytes), 0) > 0)
			;
		break;
	case 8:
		recv(*peer, bytes, next_u16(input), 0);
		break;
	case 9:
		shutdown(*peer, (int)(next_byte(input) % 3));
		break;
	default:
		hang_up(peer);
	}
}

/* A packet of which the ports are likely, in the first free place of the transmit ring. */
static void send_packet(struct guest_mem *mem, struct virtqueue *tx, struct input *input)
{
	struct vring_desc *desc =
	    (struct vring_desc *)(void *)(mem->regions[0].hva + SECOND_RING + DESC_GPA);
	uint16_t *avail = (uint16_t *)(void *)(mem->regions[0].hva + SECOND_RING + AVAIL_GPA);
	uint8_t op = next_byte(input);
	uint32_t len = op & 0x80 ? next_u16(input) % 0xf00u : 0;
	struct virtio_vsock_hdr hdr = {
	    .src_cid = CID,
	    .dst_cid = VSOCK_HOST_CID,
	    .src_port = next_byte(input),
	    .dst_port = PORT,
	    .len = len * PAYLOAD_BUFFERS,
	    .type = VIRTIO_VSOCK_TYPE_STREAM,
	    .op = op & 15,
	    .flags = op >> 4 & 3,
	    .buf_alloc = 0x10000,
	};

	if (op & 0x40)
		hdr.dst_port = VSOCK_FIRST_HOST_PORT + next_byte(input) % 4u;
	if (op & 0x20)
		next_bytes(input, (uint8_t *)&hdr.buf_alloc, 8);
	memcpy(mem->regions[0].hva + PACKET_GPA, &hdr, sizeof(hdr));
	desc[0] = (struct vring_desc){PACKET_GPA, sizeof(hdr), VRING_DESC_F_NEXT, 1};
	for (uint16_t i = 1; i <= PAYLOAD_BUFFERS; i++)
		desc[i] =
		    (struct vring_desc){PAYLOAD_GPA, len, VRING_DESC_F_NEXT, (uint16_t)(i + 1)};
	desc[PAYLOAD_BUFFERS].flags = 0;
	avail[2 + avail[1] % 8] = 0;
	if ((uint16_t)(avail[1] - tx->next_avail) < 8)
		avail[1]++;
}

/* Offer the receive chains of the image again. */
static void offer_rx(struct guest_mem *mem, struct virtqueue *rx)
{
	uint16_t *avail = (uint16_t *)(void *)(mem->regions[0].hva + AVAIL_GPA);

	avail[1] = (uint16_t)(rx->next_avail + 8);
}

static void run(struct virtqueue *vqs, struct guest_mem *mem, struct input *input)
{
	struct vsock_config config = {
	    .rx = &vqs[0],
	    .tx = &vqs[1],
	    .guest_cid = CID,
	    .peer_timeout_ns = 1,
	    .listener_fd = listener,
	    .directory_fd = -1,
	    .rx_kick_fd = event_fd,
	    .tx_kick_fd = -1,
	    .rx_irq_fd = event_fd,
	    .tx_irq_fd = event_fd,
	    .fault_fd = event_fd,
	};
	struct vsock_engine *engine;
	struct vsock_stats stats;
	int served = 0;

	memcpy(config.name, socket_name, sizeof(config.name));
	config.tx_kick_fd = dup(event_fd);
	if (next_byte(input) & 7)
		config.peer_timeout_ns = (uint64_t)1 << 60;
	REQUIRE(vsock_engine_create(&config, &engine) == 0);
	for (int round = 0; round < 200 && served >= 0 && input->left > 0; round++) {
		uint8_t op = next_byte(input);

		if (op & 3)
			send_packet(mem, &vqs[1], input);
		else if (op & 4)
			act_on_host(input);
		else if (op & 8)
			guest_mutate(mem, input);
		if (op & 16)
			act_on_host(input);
		if (op & 32)
			offer_rx(mem, &vqs[0]);
		engine_signal_fd(event_fd);
		for (int turn = 0; turn < 2 && served >= 0; turn++) {
			REQUIRE(vsock_engine_wait(engine, 0) == 0);
			served = vsock_engine_serve(engine);
		}
		REQUIRE(served >= 0 || served == -EPROTO);
		for (int i = 0; i < 2 && served >= 0; i++)
			REQUIRE(vqs[i].next_avail == vqs[i].next_used);
	}
	vsock_engine_stats(engine, &stats);
	REQUIRE(stats.closed <= stats.host_connections + stats.guest_connections);
	REQUIRE(vsock_engine_destroy(engine) == 0);
	close(config.tx_kick_fd);
}

static void remove_directory(void)
{
	unlink(target_name);
	unlink(socket_name);
	*strrchr(socket_name, '/') = '\0';
	rmdir(socket_name);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	REQUIRE(mkdtemp(socket_name) != NULL);
	strcat(socket_name, "/v");
	snprintf(target_name, sizeof(target_name), "%s_%u", socket_name, PORT);
	atexit(remove_directory);
	listener = listen_at(socket_name);
	target = listen_at(target_name);
	for (int i = 0; i < MAX_PEERS; i++)
		peers[i] = -1;
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {data, size};
	uint8_t setup = next_byte(&input);
	uint16_t image = next_u16(&input) % 0x800;
	uint64_t features = (uint64_t)1 << VIRTIO_RING_F_INDIRECT_DESC |
			    (uint64_t)(setup & 1) << VIRTIO_RING_F_EVENT_IDX;
	struct virtqueue vqs[2];
	struct guest_mem mem;
	int fd;

	guest_init(&mem);
	next_bytes(&input, mem.regions[0].hva, image);
	for (uint64_t i = 0; i < 2; i++)
		REQUIRE(virtqueue_init(&vqs[i], &mem, 8, DESC_GPA + i * SECOND_RING,
				       AVAIL_GPA + i * SECOND_RING, USED_GPA + i * SECOND_RING,
				       features) == 0);
	run(vqs, &mem, &input);
	for (int i = 0; i < MAX_PEERS; i++)
		hang_up(&peers[i]);
	/* Both backlogs, for the next input. */
	while ((fd = accept(listener, NULL, NULL)) >= 0 || (fd = accept(target, NULL, NULL)) >= 0)
		close(fd);
	guest_deinit(&mem);
	return 0;
}
