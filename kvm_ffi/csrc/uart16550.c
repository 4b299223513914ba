/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#include "uart16550.h"

#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

/* Registers, and the bits that have an effect here (PC16550D data sheet, table II). */
enum {
	REG_DATA, /* RBR, THR; DLL when LCR_DLAB */
	REG_IER, /* DLM when LCR_DLAB */
	REG_IIR_FCR,
	REG_LCR,
	REG_MCR,
	REG_LSR,
	REG_MSR,
	REG_SCR
};
enum { IER_RX = 0x01, IER_THRE = 0x02, IER_LINE = 0x04, IER_MODEM = 0x08, IER_MASK = 0x0f };
enum {
	IIR_MODEM = 0x00,
	IIR_NONE = 0x01,
	IIR_THRE = 0x02,
	IIR_RX = 0x04,
	IIR_LINE = 0x06,
	IIR_RX_TIMEOUT = 0x0c,
	IIR_FIFO = 0xc0
};
enum { FCR_ENABLE = 0x01, FCR_RESET_RX = 0x02, FIFO_DEPTH = 16 };
enum { LCR_DLAB = 0x80 };
enum {
	MCR_DTR = 0x01,
	MCR_RTS = 0x02,
	MCR_OUT1 = 0x04,
	MCR_OUT2 = 0x08,
	MCR_LOOP = 0x10,
	MCR_MASK = 0x1f
};
enum { LSR_DATA_READY = 0x01, LSR_OVERRUN = 0x02, LSR_THRE = 0x20, LSR_IDLE = 0x40 };
enum { MSR_TERI = 0x04, MSR_CTS = 0x10, MSR_DSR = 0x20, MSR_RI = 0x40, MSR_DCD = 0x80 };

struct uart16550 {
	pthread_mutex_t lock;
	int irq_fd;
	int output_fd;

	uint8_t ier, fcr, lcr, mcr, scr, dll, dlm;
	uint8_t msr_delta;
	bool is_overrun;
	bool thre_pending;
	bool irq_raised;

	uint8_t fifo[FIFO_DEPTH];
	uint32_t fifo_head, fifo_count;

	uint64_t dropped;
	uint32_t input_head, input_count;
	uint32_t output_head, output_count;
	/* Last, and from a fresh mapping: a page that was never used costs nothing. */
	uint8_t input[UART16550_INPUT_SIZE];
	uint8_t output[UART16550_OUTPUT_SIZE];
};

struct uart16550 *uart16550_create(int irq_fd, int output_fd)
{
	struct uart16550 *uart =
	    mmap(NULL, sizeof(*uart), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (uart == MAP_FAILED)
		return NULL;
	pthread_mutex_init(&uart->lock, NULL);
	uart->irq_fd = irq_fd;
	uart->output_fd = output_fd;
	uart->dll = 1; /* 115200 baud, what firmware would leave */
	uart->lcr = 3; /* 8n1 */
	return uart;
}

void uart16550_destroy(struct uart16550 *uart)
{
	pthread_mutex_destroy(&uart->lock);
	munmap(uart, sizeof(*uart));
}

void uart16550_disconnect(struct uart16550 *uart)
{
	pthread_mutex_lock(&uart->lock);
	uart->irq_fd = -1;
	uart->output_fd = -1;
	pthread_mutex_unlock(&uart->lock);
}

static void signal_fd(int fd)
{
	/* It can fail only with EAGAIN on a full counter, and then the reader has been woken
	 * already. */
	if (fd >= 0)
		(void)eventfd_write(fd, 1);
}

static uint32_t rx_depth(const struct uart16550 *uart)
{
	return (uart->fcr & FCR_ENABLE) ? FIFO_DEPTH : 1;
}

static uint32_t rx_trigger(const struct uart16550 *uart)
{
	static const uint8_t levels[] = {1, 4, 8, 14};

	return (uart->fcr & FCR_ENABLE) ? levels[uart->fcr >> 6] : 1;
}

static void rx_push(struct uart16550 *uart, uint8_t byte)
{
	if (uart->fifo_count == rx_depth(uart)) {
		uart->is_overrun = true;
		return;
	}
	uart->fifo[(uart->fifo_head + uart->fifo_count) % FIFO_DEPTH] = byte;
	uart->fifo_count++;
}

static uint8_t rx_pop(struct uart16550 *uart)
{
	uint8_t byte;

	if (!uart->fifo_count)
		return 0;
	byte = uart->fifo[uart->fifo_head];
	uart->fifo_head = (uart->fifo_head + 1) % FIFO_DEPTH;
	uart->fifo_count--;
	return byte;
}

/* Input reaches the FIFO as room appears, so it never overruns. In loopback the line is cut off. */
static void rx_refill(struct uart16550 *uart)
{
	if (uart->mcr & MCR_LOOP)
		return;
	while (uart->input_count && uart->fifo_count < rx_depth(uart)) {
		rx_push(uart, uart->input[uart->input_head]);
		uart->input_head = (uart->input_head + 1) % UART16550_INPUT_SIZE;
		uart->input_count--;
	}
}

/* The highest pending interrupt (data sheet, table IV). */
static uint8_t iir_id(const struct uart16550 *uart)
{
	if ((uart->ier & IER_LINE) && uart->is_overrun)
		return IIR_LINE;
	if ((uart->ier & IER_RX) && uart->fifo_count)
		/* The line is idle once the FIFO has what there is, so the four-character timeout
		 * is now. */
		return uart->fifo_count >= rx_trigger(uart) ? IIR_RX : IIR_RX_TIMEOUT;
	if ((uart->ier & IER_THRE) && uart->thre_pending)
		return IIR_THRE;
	if ((uart->ier & IER_MODEM) && uart->msr_delta)
		return IIR_MODEM;
	return IIR_NONE;
}

/* After any change: ISA interrupts are edges, so only a rising condition is worth an injection. */
static void update_irq(struct uart16550 *uart)
{
	bool is_pending = iir_id(uart) != IIR_NONE;

	if (is_pending && !uart->irq_raised)
		signal_fd(uart->irq_fd);
	uart->irq_raised = is_pending;
}

static uint8_t msr_lines(const struct uart16550 *uart)
{
	uint8_t lines = 0;

	if (!(uart->mcr & MCR_LOOP))
		return MSR_CTS | MSR_DSR | MSR_DCD; /* a peer that is always there */
	if (uart->mcr & MCR_RTS)
		lines |= MSR_CTS;
	if (uart->mcr & MCR_DTR)
		lines |= MSR_DSR;
	if (uart->mcr & MCR_OUT1)
		lines |= MSR_RI;
	if (uart->mcr & MCR_OUT2)
		lines |= MSR_DCD;
	return lines;
}

static void write_mcr(struct uart16550 *uart, uint8_t value)
{
	uint8_t before = msr_lines(uart);
	uint8_t changed;

	uart->mcr = value & MCR_MASK;
	changed = (uint8_t)((before ^ msr_lines(uart)) >> 4);
	if (!(before & MSR_RI))
		changed &=
		    (uint8_t)~MSR_TERI; /* only the trailing edge of the ring indicator counts */
	uart->msr_delta |= changed;
}

static void write_fcr(struct uart16550 *uart, uint8_t value)
{
	if (((value ^ uart->fcr) & FCR_ENABLE) || (value & FCR_RESET_RX))
		uart->fifo_count = 0;
	/* With the FIFOs off, the other bits are not programmed. */
	uart->fcr = (value & FCR_ENABLE) ? value : 0;
}

static void write_ier(struct uart16550 *uart, uint8_t value)
{
	/* The transmitter is always empty, so enabling its interrupt raises it at once. */
	if (!(uart->ier & IER_THRE) && (value & IER_THRE))
		uart->thre_pending = true;
	uart->ier = value & IER_MASK;
}

static void write_thr(struct uart16550 *uart, uint8_t byte)
{
	uart->thre_pending = true; /* sent as soon as it is written */
	if (uart->mcr & MCR_LOOP) {
		rx_push(uart, byte);
		return;
	}
	if (uart->output_count == UART16550_OUTPUT_SIZE) {
		uart->dropped++;
		return;
	}
	uart->output[(uart->output_head + uart->output_count) % UART16550_OUTPUT_SIZE] = byte;
	if (uart->output_count++ == 0)
		signal_fd(uart->output_fd);
}

static uint8_t read_iir(struct uart16550 *uart)
{
	uint8_t id = iir_id(uart);

	if (id == IIR_THRE)
		uart->thre_pending = false;
	return id | ((uart->fcr & FCR_ENABLE) ? IIR_FIFO : 0);
}

static uint8_t read_lsr(struct uart16550 *uart)
{
	uint8_t value = LSR_THRE | LSR_IDLE;

	if (uart->fifo_count)
		value |= LSR_DATA_READY;
	if (uart->is_overrun)
		value |= LSR_OVERRUN;
	uart->is_overrun = false;
	return value;
}

static uint8_t read_register(struct uart16550 *uart, uint32_t offset)
{
	bool dlab = uart->lcr & LCR_DLAB;
	uint8_t value;

	switch (offset) {
	case REG_DATA:
		return dlab ? uart->dll : rx_pop(uart);
	case REG_IER:
		return dlab ? uart->dlm : uart->ier;
	case REG_IIR_FCR:
		return read_iir(uart);
	case REG_LCR:
		return uart->lcr;
	case REG_MCR:
		return uart->mcr;
	case REG_LSR:
		return read_lsr(uart);
	case REG_MSR:
		value = msr_lines(uart) | uart->msr_delta;
		uart->msr_delta = 0;
		return value;
	case REG_SCR:
		return uart->scr;
	default:
		return 0xff;
	}
}

static void write_register(struct uart16550 *uart, uint32_t offset, uint8_t value)
{
	bool dlab = uart->lcr & LCR_DLAB;

	switch (offset) {
	case REG_DATA:
		if (dlab)
			uart->dll = value;
		else
			write_thr(uart, value);
		break;
	case REG_IER:
		if (dlab)
			uart->dlm = value;
		else
			write_ier(uart, value);
		break;
	case REG_IIR_FCR:
		write_fcr(uart, value);
		break;
	case REG_LCR:
		uart->lcr = value;
		break;
	case REG_MCR:
		write_mcr(uart, value);
		break;
	case REG_SCR:
		uart->scr = value;
		break;
	default:
		break; /* LSR and MSR are read-only */
	}
}

uint8_t uart16550_read(struct uart16550 *uart, uint32_t offset)
{
	/* Guest-controlled: offset. */
	uint8_t value;

	pthread_mutex_lock(&uart->lock);
	value = read_register(uart, offset);
	rx_refill(uart);
	update_irq(uart);
	pthread_mutex_unlock(&uart->lock);
	return value;
}

void uart16550_write(struct uart16550 *uart, uint32_t offset, uint8_t value)
{
	/* Guest-controlled: offset, value. */
	pthread_mutex_lock(&uart->lock);
	write_register(uart, offset, value);
	rx_refill(uart);
	update_irq(uart);
	pthread_mutex_unlock(&uart->lock);
}

uint32_t uart16550_take_output(struct uart16550 *uart, void *buf, uint32_t size)
{
	uint32_t n, first;

	pthread_mutex_lock(&uart->lock);
	n = size < uart->output_count ? size : uart->output_count;
	first = UART16550_OUTPUT_SIZE - uart->output_head;
	if (first > n)
		first = n;
	memcpy(buf, uart->output + uart->output_head, first);
	memcpy((uint8_t *)buf + first, uart->output, n - first);
	uart->output_count -= n;
	/* An empty ring starts over at its first page: a console that is drained never touches the
	 * rest. */
	uart->output_head =
	    uart->output_count ? (uart->output_head + n) % UART16550_OUTPUT_SIZE : 0;
	if (n && uart->output_count)
		signal_fd(uart->output_fd);
	pthread_mutex_unlock(&uart->lock);
	return n;
}

uint32_t uart16550_output_size(struct uart16550 *uart)
{
	uint32_t size;

	pthread_mutex_lock(&uart->lock);
	size = uart->output_count;
	pthread_mutex_unlock(&uart->lock);
	return size;
}

uint32_t uart16550_put_input(struct uart16550 *uart, const void *buf, uint32_t size)
{
	const uint8_t *bytes = buf;
	uint32_t n, i;

	pthread_mutex_lock(&uart->lock);
	if (!uart->input_count)
		uart->input_head = 0;
	n = UART16550_INPUT_SIZE - uart->input_count;
	if (n > size)
		n = size;
	for (i = 0; i < n; i++)
		uart->input[(uart->input_head + uart->input_count + i) % UART16550_INPUT_SIZE] =
		    bytes[i];
	uart->input_count += n;
	rx_refill(uart);
	update_irq(uart);
	pthread_mutex_unlock(&uart->lock);
	return n;
}

uint64_t uart16550_dropped(struct uart16550 *uart)
{
	uint64_t dropped;

	pthread_mutex_lock(&uart->lock);
	dropped = uart->dropped;
	pthread_mutex_unlock(&uart->lock);
	return dropped;
}
