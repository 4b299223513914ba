/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * Programs for the guest's end of vsock streams.
 *
 *   vsock echo PORT             accept for ever; send back what comes, and end when the peer does
 *   vsock discard PORT          accept for ever; read to the end, and answer how many bytes came
 *   vsock flood PORT            accept for ever; send until the peer ends
 *   vsock sink PORT             accept once; read to the end, print bytes and checksum, answer them
 *   vsock source PORT BYTES     accept once; send that many, then print bytes and checksum
 *   vsock send CID PORT BYTES   the same towards a listener, and print what that answers
 *   vsock talk CID PORT         standard input to the stream, the stream to standard output
 *   vsock many CID PORT COUNT   hold that many connections at once, each says its number
 *   vsock pings CID PORT COUNT  send a byte, wait for one, so many times
 *
 * Bytes are a fixed pattern; the checksum is FNV-1a of 64 bits.
 */
#include <errno.h>
#include <linux/vm_sockets.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHUNK (64u << 10)

static uint8_t chunk[CHUNK];

static void die(const char *what)
{
	fprintf(stderr, "vsock: %s: %s\n", what, strerror(errno));
	exit(1);
}

static unsigned long number(const char *text)
{
	char *end;
	unsigned long value = strtoul(text, &end, 10);

	if (*text == '\0' || *end != '\0') {
		fprintf(stderr, "vsock: %s: not a number\n", text);
		exit(2);
	}
	return value;
}

static int make_socket(void)
{
	int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		die("socket");
	return fd;
}

static int dial(const char *cid, const char *port)
{
	struct sockaddr_vm address = {.svm_family = AF_VSOCK,
				      .svm_cid = (unsigned int)number(cid),
				      .svm_port = (unsigned int)number(port)};
	int fd = make_socket();

	if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
		die("connect");
	return fd;
}

static int serve(const char *port)
{
	struct sockaddr_vm address = {.svm_family = AF_VSOCK,
				      .svm_cid = VMADDR_CID_ANY,
				      .svm_port = (unsigned int)number(port)};
	int fd = make_socket();

	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
		die("bind");
	if (listen(fd, 1024) < 0)
		die("listen");
	printf("listening\n");
	fflush(stdout);
	return fd;
}

static int await(int listener)
{
	int fd = accept(listener, NULL, NULL);

	if (fd < 0)
		die("accept");
	return fd;
}

/* 0 when the peer has gone. */
static int write_all(int fd, const uint8_t *data, size_t len)
{
	while (len > 0) {
		ssize_t wrote = write(fd, data, len);

		if (wrote < 0)
			return 0;
		data += wrote;
		len -= (size_t)wrote;
	}
	return 1;
}

static uint64_t fold(uint64_t sum, const uint8_t *data, size_t len)
{
	for (size_t i = 0; i < len; i++)
		sum = (sum ^ data[i]) * 0x100000001b3u;
	return sum;
}

/* The pattern: bytes of a counter, mixed so that a lost or doubled piece shows. */
static void fill(uint64_t offset, size_t len)
{
	for (size_t i = 0; i < len; i++)
		chunk[i] = (uint8_t)((offset + i) * 2654435761u >> 11);
}

static void report(int fd, uint64_t count, uint64_t sum)
{
	dprintf(fd, "%llu %016llx\n", (unsigned long long)count, (unsigned long long)sum);
}

static void send_pattern(int fd, uint64_t count)
{
	uint64_t sum = 0xcbf29ce484222325u;
	uint64_t done = 0;

	while (done < count) {
		size_t len = count - done < CHUNK ? (size_t)(count - done) : CHUNK;

		fill(done, len);
		if (!write_all(fd, chunk, len))
			die("write");
		sum = fold(sum, chunk, len);
		done += len;
	}
	shutdown(fd, SHUT_WR);
	report(STDOUT_FILENO, count, sum);
}

static void read_pattern(int fd)
{
	uint64_t sum = 0xcbf29ce484222325u;
	uint64_t count = 0;
	ssize_t got;

	while ((got = read(fd, chunk, sizeof(chunk))) > 0) {
		sum = fold(sum, chunk, (size_t)got);
		count += (uint64_t)got;
	}
	if (got < 0)
		die("read");
	report(fd, count, sum);
	report(STDOUT_FILENO, count, sum);
}

static void copy_to_end(int from, int to)
{
	ssize_t got;

	while ((got = read(from, chunk, sizeof(chunk))) > 0)
		if (!write_all(to, chunk, (size_t)got))
			return;
}

static void echo(int fd)
{
	copy_to_end(fd, fd);
}

static void discard(int fd)
{
	uint64_t count = 0;
	ssize_t got;

	while ((got = read(fd, chunk, sizeof(chunk))) > 0)
		count += (uint64_t)got;
	dprintf(fd, "%llu\n", (unsigned long long)count);
}

static void flood(int fd)
{
	while (write_all(fd, chunk, sizeof(chunk)))
		;
}

/* A process for each connection: a test may hold many, and none may wait for another. */
static void serve_all(int listener, void (*handle)(int fd))
{
	for (;;) {
		int fd = await(listener);

		if (fork() == 0) {
			handle(fd);
			_exit(0);
		}
		close(fd);
	}
}

static void talk(int fd)
{
	copy_to_end(STDIN_FILENO, fd);
	shutdown(fd, SHUT_WR);
	copy_to_end(fd, STDOUT_FILENO);
}

static void many(const char *cid, const char *port, unsigned long count)
{
	struct rlimit limit = {count + 16, count + 16};
	unsigned long right = 0;
	int *fds = calloc(count, sizeof(*fds));

	if (!fds || setrlimit(RLIMIT_NOFILE, &limit) < 0)
		die("many");
	for (unsigned long i = 0; i < count; i++)
		fds[i] = dial(cid, port);
	for (unsigned long i = 0; i < count; i++)
		dprintf(fds[i], "%08lu", i);
	for (unsigned long i = 0; i < count; i++) {
		char text[16] = "";

		if (recv(fds[i], text, 8, MSG_WAITALL) == 8 && number(text) == i)
			right++;
	}
	printf("%lu of %lu\n", right, count);
}

static void pings(int fd, unsigned long count)
{
	uint8_t byte = 0;

	for (unsigned long i = 0; i < count; i++)
		if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1)
			die("ping");
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	signal(SIGPIPE, SIG_IGN);
	signal(SIGCHLD, SIG_IGN);
	if (!strcmp(what, "echo") && argc == 3) {
		serve_all(serve(argv[2]), echo);
	} else if (!strcmp(what, "discard") && argc == 3) {
		serve_all(serve(argv[2]), discard);
	} else if (!strcmp(what, "flood") && argc == 3) {
		serve_all(serve(argv[2]), flood);
	} else if (!strcmp(what, "sink") && argc == 3) {
		read_pattern(await(serve(argv[2])));
	} else if (!strcmp(what, "source") && argc == 4) {
		send_pattern(await(serve(argv[2])), number(argv[3]));
	} else if (!strcmp(what, "send") && argc == 5) {
		int fd = dial(argv[2], argv[3]);

		send_pattern(fd, number(argv[4]));
		copy_to_end(fd, STDOUT_FILENO);
	} else if (!strcmp(what, "talk") && argc == 4) {
		talk(dial(argv[2], argv[3]));
	} else if (!strcmp(what, "many") && argc == 5) {
		many(argv[2], argv[3], number(argv[4]));
	} else if (!strcmp(what, "pings") && argc == 5) {
		pings(dial(argv[2], argv[3]), number(argv[4]));
	} else {
		fprintf(stderr, "vsock: see the head of guest/vsock.c\n");
		return 2;
	}
	return 0;
}
