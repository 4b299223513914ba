/* SPDX-License-Identifier: Apache-2.0 */
/* Copyright the Hostel authors */
#ifndef HOST_PROCESS_H
#define HOST_PROCESS_H

#include <stdint.h>

/* Free the blocks of a file's range; its size and the offsets after it stay. 0 or -errno. */
int host_punch_hole(int fd, uint64_t offset, uint64_t length);

/* One malloc arena for all threads, and freed memory back to the kernel early. 0 or -EINVAL. */
int host_keep_heap_small(void);

/* No new privileges by exec, no capabilities, no ptrace by peers. 0 or -errno. */
int host_drop_privileges(void);

/* Ask the kernel to name the calling thread (15 bytes at most). 0 or -errno. */
int host_name_thread(const char *name);

#endif
