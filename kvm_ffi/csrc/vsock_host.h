/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* The Unix sockets behind a vsock device: no rings, no waiting. */
#ifndef HOSTEL_VSOCK_HOST_H
#define HOSTEL_VSOCK_HOST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* The longest is "CONNECT 4294967295\n". */
#define VSOCK_MAX_GREETING_BYTES 19u

/* Connect to "<name>_<port>" in the working directory: a non-blocking fd, or -errno. */
int vsock_host_connect(const char *name, uint32_t port);
/* Take "CONNECT <port>\n" and not a byte more: 1 *port is set, 0 not whole yet, -errno. */
int vsock_host_greeting(int fd, uint32_t *port);
/* Answer "OK <port>\n": 0, or -errno. */
int vsock_host_welcome(int fd, uint32_t port);
/* Read the line without the socket: as vsock_host_greeting(), which says how long it is. */
int vsock_parse_greeting(const char *text, size_t len, uint32_t *port, size_t *used);
/* Write what the socket takes, from an offset, at most len bytes: how many, or -errno. */
int64_t vsock_host_write(int fd, const struct iovec *iov, uint32_t n_iov, size_t offset,
			 uint32_t len);

#endif
