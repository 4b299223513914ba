/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "vsock_host.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* Buffers of one write; a chain of more goes out in several. */
#define MAX_WRITE_IOV 64u

static const char greeting[] = "CONNECT ";

int vsock_host_connect(const char *name, uint32_t port)
{
	/* Guest-controlled: port, which becomes digits of a file name. */
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	int err;

	if (fd < 0)
		return -errno;
	snprintf(address.sun_path, sizeof(address.sun_path), "%s_%u", name, port);
	/* A Unix socket connects at once, or says EAGAIN when its backlog is full. */
	if (connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0)
		return fd;
	err = -errno;
	close(fd);
	return err;
}

int vsock_parse_greeting(const char *text, size_t len, uint32_t *port, size_t *used)
{
	size_t prefix = sizeof(greeting) - 1;
	uint64_t value = 0;
	size_t at = prefix;

	if (memcmp(text, greeting, len < prefix ? len : prefix) != 0)
		return -EPROTO;
	for (; at < len && text[at] >= '0' && text[at] <= '9'; at++) {
		value = 10 * value + (uint64_t)(text[at] - '0');
		if (value > UINT32_MAX)
			return -EPROTO;
	}
	if (at >= len)
		return len < VSOCK_MAX_GREETING_BYTES ? 0 : -EPROTO;
	if (text[at] != '\n' || at == prefix)
		return -EPROTO;
	*port = (uint32_t)value;
	*used = at + 1;
	return 1;
}

int vsock_host_greeting(int fd, uint32_t *port)
{
	char text[VSOCK_MAX_GREETING_BYTES];
	size_t used;
	/* What follows the line is the stream's. */
	ssize_t got = recv(fd, text, sizeof(text), MSG_PEEK);
	int ret;

	if (got < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	if (got == 0)
		return -ECONNRESET;
	ret = vsock_parse_greeting(text, (size_t)got, port, &used);
	if (ret > 0 && recv(fd, text, used, 0) != (ssize_t)used)
		return -EIO;
	return ret;
}

int vsock_host_welcome(int fd, uint32_t port)
{
	char text[16];
	int len = snprintf(text, sizeof(text), "OK %u\n", port);

	/* The first bytes of this direction: they fit. */
	return send(fd, text, (size_t)len, MSG_NOSIGNAL) == len ? 0 : -EPIPE;
}

int64_t vsock_host_write(int fd, const struct iovec *iov, uint32_t n_iov, size_t offset,
			 uint32_t len)
{
	/* Guest-controlled: the bytes. The iovecs are checked copies. */
	struct iovec piece[MAX_WRITE_IOV];
	uint32_t done = 0;

	while (done < len) {
		struct msghdr message = {.msg_iov = piece};
		uint32_t want = 0;
		size_t skip = offset + done;
		ssize_t wrote;

		for (uint32_t i = 0; i < n_iov && message.msg_iovlen < MAX_WRITE_IOV; i++) {
			size_t here = iov[i].iov_len;

			if (skip >= here) {
				skip -= here;
				continue;
			}
			here -= skip;
			if (here > len - done - want)
				here = len - done - want;
			if (here == 0)
				break;
			piece[message.msg_iovlen].iov_base = (uint8_t *)iov[i].iov_base + skip;
			piece[message.msg_iovlen++].iov_len = here;
			want += (uint32_t)here;
			skip = 0;
		}
		wrote = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (wrote < 0 && errno == EINTR)
			continue;
		if (wrote < 0)
			return done > 0 || errno == EAGAIN ? (int64_t)done : -errno;
		done += (uint32_t)wrote;
		if ((uint32_t)wrote < want)
			break;
	}
	return done;
}
