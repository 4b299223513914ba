/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * Says that user space runs: the byte 123 to the boot-timer port, which Hostel stamps, and a
 * line on the console, by which any other hypervisor can be measured with the same binary.
 *
 * As a command it does that and returns. As process 1 it is the whole user space of initrd-min,
 * and goes on as the kernel's command line says: hostel.end=poweroff, hostel.end=reboot, or
 * (without either) waits for ever.
 */
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <unistd.h>

enum { BOOT_TIMER_PORT = 0x5b0, BOOT_TIMER_BYTE = 123 };

static const char marker[] = "hostel: boot-timer\n";

static sigjmp_buf refused;

static void on_refused(int signal)
{
	(void)signal;
	siglongjmp(refused, 1);
}

/*
 * User space may write to a port only as the bitmap in its task's TSS says. An emulated CPU
 * (QEMU 7.2) takes a TSS that is marked busy for a wrong one and faults the write; that is how
 * KVM leaves a task register which a VMM has read and set again. Then there is only the line.
 */
static void write_port(void)
{
	if (ioperm(BOOT_TIMER_PORT, 1, 1) != 0)
		return;
	signal(SIGSEGV, on_refused);
	if (sigsetjmp(refused, 0) == 0)
		outb(BOOT_TIMER_BYTE, BOOT_TIMER_PORT);
	signal(SIGSEGV, SIG_DFL);
}

static int end_of(const char *cmdline)
{
	if (strstr(cmdline, "hostel.end=poweroff"))
		return RB_POWER_OFF;
	if (strstr(cmdline, "hostel.end=reboot"))
		return RB_AUTOBOOT;
	return 0;
}

int main(void)
{
	char cmdline[4096];
	ssize_t len = 0;
	int fd, end;

	/* The port first: writing a console costs more exits than all that came before. */
	write_port();
	if (write(STDOUT_FILENO, marker, sizeof(marker) - 1) < 0 && getpid() != 1)
		return 1;
	if (getpid() != 1)
		return 0;

	/* Process 1 must not return, whatever fails: without a command line it waits. */
	mount("proc", "/proc", "proc", 0, NULL);
	fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
	if (fd >= 0)
		len = read(fd, cmdline, sizeof(cmdline) - 1);
	cmdline[len > 0 ? len : 0] = '\0';
	end = end_of(cmdline);
	if (end)
		reboot(end);
	for (;;)
		pause();
}
