/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * A 16550A UART (PC16550D data sheet). Registers are served on vCPU threads, the byte streams on
 * the control thread; one mutex covers all of it and is held for no longer than a copy and an
 * eventfd write.
 *
 * A vCPU never waits: output that finds the ring full is dropped and counted, input waits in a
 * host-side buffer.
 */
#ifndef HOSTEL_UART16550_H
#define HOSTEL_UART16550_H

#include <stdint.h>

enum {
	UART16550_PORTS = 8,
	UART16550_INPUT_SIZE = 64 * 1024,
	UART16550_OUTPUT_SIZE = 256 * 1024,
};

struct uart16550;

/*
 * irq_fd: eventfd written on each rising edge of the interrupt condition, or -1.
 * output_fd: eventfd written when the output ring turns non-empty, or -1.
 * Both stay the caller's and stay open until uart16550_disconnect(). Returns NULL when out of
 * memory.
 */
struct uart16550 *uart16550_create(int irq_fd, int output_fd);
void uart16550_destroy(struct uart16550 *uart);
/* Forgets both eventfds: returns when no thread will write to them again. */
void uart16550_disconnect(struct uart16550 *uart);

uint8_t uart16550_read(struct uart16550 *uart, uint32_t offset);
void uart16550_write(struct uart16550 *uart, uint32_t offset, uint8_t value);

/* Bytes taken from the output ring; output_fd is written again if more remain. */
uint32_t uart16550_take_output(struct uart16550 *uart, void *buf, uint32_t size);
uint32_t uart16550_output_size(struct uart16550 *uart);
/* Bytes accepted into the input buffer; fewer than size when it is full. */
uint32_t uart16550_put_input(struct uart16550 *uart, const void *buf, uint32_t size);
uint64_t uart16550_dropped(struct uart16550 *uart);

#endif
