/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
/*
 * Load on /dev/vda, as process 1 of an initramfs: Debian's fio brings forty libraries, and this
 * does what is needed of it with two system calls. The kernel's command line has what to do, in
 * order; each line of the result is printed, then the guest powers off.
 *
 *   hostel.load=KIND,BYTES,DEPTH,JOBS,MS
 *       KIND is randread, randwrite, read or write; DEPTH requests of BYTES in flight in each of
 *       JOBS processes, one a CPU, past the page cache, for MS milliseconds.
 *       Prints: load KIND,BYTES,DEPTH,JOBS,MS: N requests in NS ns
 *   hostel.stamp=FIRST
 *       For ever: writes batches of 8 blocks of 4 KiB in the second and third quarter of the disk,
 *       syncs, and prints: stamped LAST. Write n, from FIRST on, goes to block n * 31 modulo their
 *       number, and has in every sector its block and n, as 64-bit numbers, over and over.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_DEPTH = 64, MAX_JOBS = 16, STAMP_BYTES = 4096, STAMP_BATCH = 8, DISK_WAIT_MS = 20000 };

static const char disk[] = "/dev/vda";

struct load {
	char kind[16];
	uint64_t bytes;
	unsigned depth;
	unsigned jobs;
	uint64_t ms;
};

static void check(int is_well, const char *what)
{
	if (is_well)
		return;
	printf("blkload: %s: %s\n", what, strerror(errno));
	fflush(stdout);
	reboot(RB_POWER_OFF);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t random_u64(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static int open_disk(uint64_t *ret_bytes)
{
	int fd = open(disk, O_RDWR | O_DIRECT);

	check(fd >= 0, disk);
	*ret_bytes = (uint64_t)lseek(fd, 0, SEEK_END);
	return fd;
}

static void submit(aio_context_t context, struct iocb *iocb)
{
	check(syscall(__NR_io_submit, context, 1L, &iocb) == 1, "io_submit");
}

/* How many requests one job has done in its time. */
static uint64_t run_job(const struct load *load, unsigned job, uint64_t *ret_ns)
{
	static struct iocb iocbs[MAX_DEPTH];
	static struct io_event events[MAX_DEPTH];
	uint64_t disk_bytes, began, n = 0, place, random = 0x9e3779b97f4a7c15u * (job + 1);
	int is_write = strstr(load->kind, "write") != NULL, is_random = load->kind[1] == 'a';
	int fd = open_disk(&disk_bytes);
	aio_context_t context = 0;
	uint64_t n_places = disk_bytes / load->bytes;
	uint8_t *buffers = mmap(NULL, load->bytes * load->depth, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(job, &cpus);
	check(buffers != MAP_FAILED && n_places > 0, "buffers");
	check(sched_setaffinity(0, sizeof(cpus), &cpus) == 0, "sched_setaffinity");
	check(syscall(__NR_io_setup, load->depth, &context) == 0, "io_setup");
	place = n_places / load->jobs * job;
	began = now_ns();
	for (unsigned i = 0; i < load->depth; i++) {
		iocbs[i].aio_fildes = (uint32_t)fd;
		iocbs[i].aio_lio_opcode = is_write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
		iocbs[i].aio_buf = (uintptr_t)(buffers + load->bytes * i);
		iocbs[i].aio_nbytes = load->bytes;
		iocbs[i].aio_data = i;
		events[i].data = i;
	}
	for (long got = load->depth; now_ns() - began < load->ms * 1000000u;) {
		for (long i = 0; i < got; i++) {
			struct iocb *iocb = &iocbs[events[i].data];

			place = is_random ? random_u64(&random) : place + 1;
			iocb->aio_offset = (int64_t)(place % n_places * load->bytes);
			submit(context, iocb);
		}
		got = syscall(__NR_io_getevents, context, 1L, (long)load->depth, events, NULL);
		check(got > 0, "io_getevents");
		for (long i = 0; i < got; i++)
			check(events[i].res == (int64_t)load->bytes, "request");
		n += (uint64_t)got;
	}
	*ret_ns = now_ns() - began;
	return n;
}

static void run_load(const char *text)
{
	struct result {
		uint64_t n, ns;
	} *results = mmap(NULL, MAX_JOBS * sizeof(*results), PROT_READ | PROT_WRITE,
			  MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct load load;
	uint64_t n = 0, ns = 1;

	errno = EINVAL;
	check(sscanf(text, "%15[a-z],%lu,%u,%u,%lu", load.kind, &load.bytes, &load.depth,
		     &load.jobs, &load.ms) == 5 &&
		  load.depth >= 1 && load.depth <= MAX_DEPTH && load.jobs >= 1 &&
		  load.jobs <= MAX_JOBS && load.bytes >= 512,
	      text);
	printf("begin %s\n", text);
	fflush(stdout);
	for (unsigned job = 0; job < load.jobs; job++) {
		if (fork() == 0) {
			results[job].n = run_job(&load, job, &results[job].ns);
			_exit(0);
		}
	}
	while (wait(NULL) > 0)
		continue;
	for (unsigned job = 0; job < load.jobs; job++) {
		n += results[job].n;
		ns = results[job].ns > ns ? results[job].ns : ns;
	}
	printf("load %s: %lu requests in %lu ns\n", text, n, ns);
	fflush(stdout);
}

static void fill(uint8_t *buffer, uint64_t block, uint64_t number)
{
	uint64_t *words = (void *)buffer;

	for (size_t i = 0; i < STAMP_BYTES / sizeof(*words); i += 2) {
		words[i] = block;
		words[i + 1] = number;
	}
}

static void stamp(uint64_t number)
{
	static uint8_t buffers[STAMP_BATCH][STAMP_BYTES] __attribute__((aligned(4096)));
	static struct iocb iocbs[STAMP_BATCH];
	static struct io_event events[STAMP_BATCH];
	aio_context_t context = 0;
	uint64_t disk_bytes, first, n_blocks;
	int fd = open_disk(&disk_bytes);

	n_blocks = disk_bytes / STAMP_BYTES / 2;
	first = n_blocks / 2;
	check(syscall(__NR_io_setup, STAMP_BATCH, &context) == 0, "io_setup");
	for (;;) {
		for (unsigned i = 0; i < STAMP_BATCH; i++, number++) {
			uint64_t block = first + number * 31 % n_blocks;

			fill(buffers[i], block, number);
			iocbs[i].aio_fildes = (uint32_t)fd;
			iocbs[i].aio_lio_opcode = IOCB_CMD_PWRITE;
			iocbs[i].aio_buf = (uintptr_t)buffers[i];
			iocbs[i].aio_nbytes = STAMP_BYTES;
			iocbs[i].aio_offset = (int64_t)(block * STAMP_BYTES);
			submit(context, &iocbs[i]);
		}
		check(syscall(__NR_io_getevents, context, (long)STAMP_BATCH, (long)STAMP_BATCH,
			      events, NULL) == STAMP_BATCH,
		      "io_getevents");
		for (unsigned i = 0; i < STAMP_BATCH; i++)
			check(events[i].res == STAMP_BYTES, "write");
		check(fdatasync(fd) == 0, "fdatasync");
		printf("stamped %lu\n", number - 1);
		fflush(stdout);
	}
}

static void load_modules(void)
{
	FILE *order = fopen("/modules/order", "r");
	char name[128], path[160];

	check(order != NULL, "/modules/order");
	while (fscanf(order, "%127s", name) == 1) {
		int fd;

		snprintf(path, sizeof(path), "/modules/%s", name);
		fd = open(path, O_RDONLY);
		check(fd >= 0, path);
		check(syscall(__NR_finit_module, fd, "", 0) == 0 || errno == EEXIST, path);
		close(fd);
	}
	fclose(order);
}

int main(void)
{
	static char cmdline[4096];
	FILE *file;

	mkdir("/proc", 0555);
	mkdir("/dev", 0755);
	check(mount("proc", "/proc", "proc", 0, NULL) == 0, "/proc");
	check(mount("dev", "/dev", "devtmpfs", 0, NULL) == 0, "/dev");
	file = fopen("/proc/cmdline", "r");
	check(file && fgets(cmdline, sizeof(cmdline), file), "/proc/cmdline");
	load_modules();
	for (int waited_ms = 0; access(disk, F_OK) != 0 && waited_ms < DISK_WAIT_MS;
	     waited_ms += 10)
		usleep(10000);
	for (char *word = strtok(cmdline, " \n"); word; word = strtok(NULL, " \n")) {
		if (strncmp(word, "hostel.load=", 12) == 0)
			run_load(word + 12);
		else if (strncmp(word, "hostel.stamp=", 13) == 0)
			stamp(strtoull(word + 13, NULL, 10));
	}
	printf("load over\n");
	fflush(stdout);
	reboot(RB_POWER_OFF);
	return 0;
}
