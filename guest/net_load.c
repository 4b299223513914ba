/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * Network load between a guest and its host, for bench/net.py: `net-load serve` in the guest,
 * `net-load CASE ADDRESS MS` on the host, which prints one number. A connection carries the
 * case's letter and its milliseconds, then the load itself.
 *
 *   in, out          TCP stream to and from the guest, bytes per second
 *   udp-in, udp-out  datagrams of 64 bytes that arrive, per second
 *   rtt              median microseconds of one byte there and back
 */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { PORT = 7000, DATAGRAM = 64, BLOCK = 1 << 16, MAX_TRIPS = 1 << 16, GRACE_MS = 200 };

static char block[BLOCK];

struct request {
	uint32_t ms;
	char letter;
};

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static void check(bool is_sound, const char *what)
{
	if (is_sound)
		return;
	perror(what);
	exit(1);
}

static struct sockaddr_in address_of(const char *text)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(PORT)};

	check(inet_pton(AF_INET, text, &address.sin_addr) == 1, text);
	return address;
}

/* A bound UDP socket that gives up waiting after the grace. */
static int datagrams(void)
{
	struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(PORT)};
	struct timeval grace = {.tv_usec = GRACE_MS * 1000};
	int room = 4 << 20;
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof(room));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &grace, sizeof(grace));
	check(bind(fd, (struct sockaddr *)&any, sizeof(any)) == 0, "bind");
	return fd;
}

static void stream_out(int fd, double until)
{
	while (seconds() < until && write(fd, block, BLOCK) > 0)
		;
	shutdown(fd, SHUT_WR);
}

static uint64_t stream_in(int fd)
{
	uint64_t total = 0;
	ssize_t got;

	while ((got = read(fd, block, BLOCK)) > 0)
		total += (uint64_t)got;
	return total;
}

static void datagrams_out(struct sockaddr_in to, double until)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	check(connect(fd, (struct sockaddr *)&to, sizeof(to)) == 0, "connect");
	while (seconds() < until)
		for (int i = 0; i < 64; i++)
			(void)!send(fd, block, DATAGRAM, 0);
	close(fd);
}

static uint64_t datagrams_in(int fd, double until)
{
	uint64_t count = 0;

	while (seconds() < until || recv(fd, block, BLOCK, MSG_DONTWAIT) > 0)
		count += recv(fd, block, BLOCK, 0) > 0;
	close(fd);
	return count;
}

static void serve_one(int fd, struct sockaddr_in peer)
{
	struct request request;
	double until;
	uint64_t count = 0;
	int udp;

	if (read(fd, &request, sizeof(request)) != sizeof(request))
		return;
	until = seconds() + request.ms / 1e3;
	peer.sin_port = htons(PORT);
	switch (request.letter) {
	case 'i':
		count = stream_in(fd);
		break;
	case 'o':
		stream_out(fd, until);
		return;
	case 'I':
		udp = datagrams();
		(void)!write(fd, &count, sizeof(count)); /* ready */
		count = datagrams_in(udp, until);
		break;
	case 'O':
		datagrams_out(peer, until);
		break;
	case 'r':
		while (read(fd, block, 1) == 1)
			(void)!write(fd, block, 1);
		return;
	}
	(void)!write(fd, &count, sizeof(count));
}

static int serve(void)
{
	struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(PORT)};
	int listener = socket(AF_INET, SOCK_STREAM, 0);
	int one = 1;

	signal(SIGCHLD, SIG_IGN);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	check(bind(listener, (struct sockaddr *)&any, sizeof(any)) == 0, "bind");
	check(listen(listener, 16) == 0, "listen");
	puts("net-load: ready");
	fflush(stdout);
	for (;;) {
		struct sockaddr_in peer;
		socklen_t size = sizeof(peer);
		int fd = accept(listener, (struct sockaddr *)&peer, &size);

		if (fd >= 0 && fork() == 0) {
			setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
			serve_one(fd, peer);
			_exit(0);
		}
		close(fd);
	}
}

static uint64_t reply(int fd)
{
	uint64_t count;

	check(recv(fd, &count, sizeof(count), MSG_WAITALL) == sizeof(count), "reply");
	return count;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double round_trip(int fd, double until)
{
	static double trips[MAX_TRIPS];
	size_t n = 0;

	while (n < MAX_TRIPS && (n == 0 || seconds() < until)) {
		double began = seconds();

		check(write(fd, block, 1) == 1 && read(fd, block, 1) == 1, "round trip");
		trips[n++] = (seconds() - began) * 1e6;
	}
	qsort(trips, n, sizeof(trips[0]), compare);
	return trips[n / 2];
}

static double measure(const char *name, struct sockaddr_in to, uint32_t ms)
{
	static const char *const names[] = {"in", "out", "udp-in", "udp-out", "rtt"};
	struct request request = {.ms = ms};
	double began, until;
	uint64_t count = 0;
	int one = 1;
	int udp = -1;
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		if (strcmp(name, names[i]) == 0)
			request.letter = "ioIOr"[i];
	check(connect(fd, (struct sockaddr *)&to, sizeof(to)) == 0, "connect");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	if (request.letter == 'O')
		udp = datagrams();
	check(write(fd, &request, sizeof(request)) == sizeof(request), "write");
	if (request.letter == 'I')
		reply(fd);
	began = seconds();
	until = began + ms / 1e3;
	switch (request.letter) {
	case 'i':
		stream_out(fd, until);
		count = reply(fd);
		break;
	case 'o':
		count = stream_in(fd);
		break;
	case 'I':
		datagrams_out(to, until);
		count = reply(fd);
		return (double)count / (ms / 1e3);
	case 'O':
		count = datagrams_in(udp, until);
		return (double)count / (ms / 1e3);
	case 'r':
		return round_trip(fd, until);
	default:
		check(false, name);
	}
	return (double)count / (seconds() - began);
}

int main(int argc, char **argv)
{
	signal(SIGPIPE, SIG_IGN);
	if (argc == 2 && strcmp(argv[1], "serve") == 0)
		return serve();
	if (argc != 4) {
		fprintf(stderr, "usage: net-load serve | CASE ADDRESS MS\n");
		return 2;
	}
	printf("%.9g\n", measure(argv[1], address_of(argv[2]), (uint32_t)atoi(argv[3])));
	return 0;
}
