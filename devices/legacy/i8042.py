# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""i8042 keyboard controller with a keyboard: reset, Ctrl-Alt-Del, and a quick answer to probes.

No auxiliary (mouse) port. Everything that Linux asks while it looks for a keyboard is answered
at once: each unanswered command would cost its guest a timeout of half a second.

Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device
Controller"; Linux drivers/input/serio/i8042.c and drivers/input/keyboard/atkbd.c.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from devices.bus import Bus
from devices.platform import Irq

DATA_PORT: Final = 0x60
COMMAND_PORT: Final = 0x64

STATUS_OUTPUT_FULL: Final = 0x01
STATUS_SYSTEM: Final = 0x04
STATUS_COMMAND: Final = 0x08
STATUS_KEYLOCK: Final = 0x10  # set: not locked; Linux warns about a locked keyboard

CTR_KBD_IRQ: Final = 0x01
CTR_SYSTEM: Final = 0x04
CTR_KBD_DISABLED: Final = 0x10
CTR_AUX_DISABLED: Final = 0x20
CTR_TRANSLATE: Final = 0x40

CMD_READ_CTR: Final = 0x20
CMD_WRITE_CTR: Final = 0x60
CMD_AUX_DISABLE: Final = 0xA7
CMD_AUX_ENABLE: Final = 0xA8
CMD_SELF_TEST: Final = 0xAA
CMD_KBD_TEST: Final = 0xAB
CMD_KBD_DISABLE: Final = 0xAD
CMD_KBD_ENABLE: Final = 0xAE
CMD_READ_OUTPUT_PORT: Final = 0xD0
CMD_WRITE_OUTPUT_PORT: Final = 0xD1
CMD_WRITE_KBD_OUTPUT: Final = 0xD2
CMD_PULSE_FIRST: Final = 0xF0  # 0xf0..0xff pulse output lines; a zero in bit 0 resets the CPU

KBD_ACK: Final = b"\xfa"
KBD_RESEND: Final = b"\xfe"
# Keyboard command -> answer, and the commands that are followed by one more byte.
KBD_ANSWERS: Final = {
    0xEE: b"\xee",  # echo
    0xF2: b"\xfa\xab\x83",  # identify: an MF2 keyboard
    0xF4: KBD_ACK,  # enable scanning
    0xF5: KBD_ACK,  # disable scanning
    0xF6: KBD_ACK,  # set defaults
    0xFF: b"\xfa\xaa",  # reset: acknowledged, self-test passed
}
KBD_TAKES_ARGUMENT: Final = frozenset({0xED, 0xF0, 0xF3})  # LEDs, scan code set, repeat rate

# Set 1 scan codes (what translation yields): Ctrl, Alt, Del down, then up again.
CTRL_ALT_DEL: Final = b"\x1d\x38\xe0\x53\xe0\xd3\xb8\x9d"

# A guest that sends commands and never reads must not make the host store the answers.
MAX_PENDING_BYTES: Final = 64


class I8042:
    """Keyboard controller at ports 0x60 and 0x64.

    Args:
        irq: GSI 1, raised when a byte waits for the guest.
        on_reset: called when the guest asks for a CPU reset, on the vCPU's thread.

    Threads: registers from any vCPU thread, ctrl_alt_del() from any; one lock inside.
    """

    def __init__(self, irq: Irq, on_reset: Callable[[], None]) -> None:
        self._irq = irq
        self._on_reset = on_reset
        self._lock = threading.Lock()
        self._output: deque[int] = deque()
        self._ctr = CTR_KBD_IRQ | CTR_SYSTEM | CTR_AUX_DISABLED | CTR_TRANSLATE
        self._controller_argument_of: int | None = None
        self._keyboard_wants_argument = False
        self._last_was_command = False

    def attach(self, bus: Bus) -> None:
        """Claim the two ports on the PIO bus."""
        bus.add(DATA_PORT, 1, _DataPort(self))
        bus.add(COMMAND_PORT, 1, _CommandPort(self))

    def ctrl_alt_del(self) -> bool:
        """Press and release Ctrl-Alt-Del.

        Returns:
            False when it was lost: the guest disabled the keyboard, or does not read it.
        """
        with self._lock:
            return not self._ctr & CTR_KBD_DISABLED and self._put(CTRL_ALT_DEL)

    def read_status(self) -> int:
        """Return the status register (port 0x64)."""
        with self._lock:
            status = STATUS_KEYLOCK | (self._ctr & STATUS_SYSTEM)
            if self._output:
                status |= STATUS_OUTPUT_FULL
            if self._last_was_command:
                status |= STATUS_COMMAND
            return status

    def read_data(self) -> int:
        """Take the next byte for the guest (port 0x60); 0 when none waits."""
        with self._lock:
            if not self._output:
                return 0
            value = self._output.popleft()
            if self._output:
                self._interrupt()
            return value

    def write_command(self, command: int) -> None:
        """Take a controller command (port 0x64); ``command`` is guest-controlled, 0..255."""
        if command >= CMD_PULSE_FIRST:
            if not command & 1:
                self._on_reset()
            return
        with self._lock:
            self._last_was_command = True
            self._controller_argument_of = None
            self._command(command)

    def write_data(self, value: int) -> None:
        """Take a command's argument or a keyboard byte (port 0x60); guest-controlled, 0..255."""
        with self._lock:
            self._last_was_command = False
            command, self._controller_argument_of = self._controller_argument_of, None
            if command is None:
                self._keyboard(value)
                return
        if command == CMD_WRITE_OUTPUT_PORT and not value & 1:
            self._on_reset()  # output line 0 is the CPU's reset line, active low
            return
        with self._lock:
            if command == CMD_WRITE_CTR:
                self._ctr = value | CTR_AUX_DISABLED
                if self._output:
                    self._interrupt()
            elif command == CMD_WRITE_KBD_OUTPUT:
                self._put(bytes((value,)))

    def _command(self, command: int) -> None:
        if command in (CMD_WRITE_CTR, CMD_WRITE_OUTPUT_PORT, CMD_WRITE_KBD_OUTPUT):
            self._controller_argument_of = command
        elif command == CMD_READ_CTR:
            self._put(bytes((self._ctr,)))
        elif command == CMD_SELF_TEST:
            self._output.clear()
            self._put(b"\x55")
        elif command == CMD_KBD_TEST:
            self._put(b"\x00")
        elif command == CMD_READ_OUTPUT_PORT:
            self._put(b"\x03")  # reset line high, A20 on
        elif command == CMD_KBD_DISABLE:
            self._ctr |= CTR_KBD_DISABLED
        elif command == CMD_KBD_ENABLE:
            self._ctr &= ~CTR_KBD_DISABLED

    def _keyboard(self, value: int) -> None:
        self._ctr &= ~CTR_KBD_DISABLED  # a byte for the keyboard enables its interface
        if self._keyboard_wants_argument:
            self._keyboard_wants_argument = False
            self._put(KBD_ACK)
        elif value in KBD_TAKES_ARGUMENT:
            self._keyboard_wants_argument = True
            self._put(KBD_ACK)
        else:
            self._put(KBD_ANSWERS.get(value, KBD_RESEND))

    def _put(self, data: bytes) -> bool:
        if len(self._output) + len(data) > MAX_PENDING_BYTES:
            return False
        was_empty = not self._output
        self._output.extend(data)
        if was_empty:
            self._interrupt()
        return True

    def _interrupt(self) -> None:
        if self._ctr & CTR_KBD_IRQ:
            self._irq.signal()


class _DataPort:
    def __init__(self, owner: I8042) -> None:
        self._owner = owner

    def read(self, offset: int, length: int) -> int:
        return self._owner.read_data()

    def write(self, offset: int, length: int, value: int) -> None:
        self._owner.write_data(value & 0xFF)


class _CommandPort:
    def __init__(self, owner: I8042) -> None:
        self._owner = owner

    def read(self, offset: int, length: int) -> int:
        return self._owner.read_status()

    def write(self, offset: int, length: int, value: int) -> None:
        self._owner.write_command(value & 0xFF)
