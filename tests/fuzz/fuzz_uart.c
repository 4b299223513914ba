/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/* Input: operations; register accesses as a guest makes them, streams as the host does. */
#include <sys/eventfd.h>
#include <unistd.h>

#include "guest.h"
#include "uart16550.h"

/* One operation on the host's side. */
static void stream(struct uart16550 *uart, struct input *input)
{
	static uint8_t buf[UART16550_OUTPUT_SIZE];
	uint32_t size = next_u16(input) * 5u;
	uint32_t ready = uart16550_output_size(uart);
	uint32_t done;

	REQUIRE(ready <= UART16550_OUTPUT_SIZE);
	if (size > sizeof(buf))
		size = sizeof(buf);
	if (next_byte(input) & 1) {
		done = uart16550_take_output(uart, buf, size);
		REQUIRE(done <= size && done <= ready);
		REQUIRE(uart16550_output_size(uart) == ready - done);
	} else {
		if (size > UART16550_INPUT_SIZE + 1)
			size = UART16550_INPUT_SIZE + 1;
		REQUIRE(uart16550_put_input(uart, buf, size) <= size);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {data, size};
	int irq_fd = eventfd(0, EFD_NONBLOCK);
	int output_fd = eventfd(0, EFD_NONBLOCK);
	struct uart16550 *uart = uart16550_create(irq_fd, output_fd);

	REQUIRE(uart != NULL);
	while (input.left > 0) {
		uint8_t op = next_byte(&input);
		/* Mostly the eight registers, sometimes an offset that no guest can give. */
		uint32_t offset = op & 0x80 ? next_u16(&input) : op & 7u;
		uint32_t times = op & 0x40 ? next_u16(&input) : 1;

		switch (op >> 3 & 3) {
		case 0:
		case 1:
			for (uint8_t value = next_byte(&input); times > 0; times--)
				uart16550_write(uart, offset, value);
			break;
		case 2:
			for (; times > 0; times--)
				uart16550_read(uart, offset);
			break;
		case 3:
			stream(uart, &input);
			break;
		}
	}
	uart16550_disconnect(uart);
	uart16550_destroy(uart);
	close(irq_fd);
	close(output_fd);
	return 0;
}
