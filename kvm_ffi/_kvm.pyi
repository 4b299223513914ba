# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The typed face of the C module that build_kvm.py makes of the *.cdef files.

Nothing outside kvm_ffi imports it. A C function returns >= 0, or -errno, if its header does not say
otherwise.
"""

from typing import Any, Final, TypeAlias

# A C value: has the fields or elements of its C type, which the compiler knows and mypy does not.
CData: TypeAlias = Any

class _Ffi:
    NULL: Final[CData]
    def new(self, c_type: str, init: object = ..., /) -> CData: ...
    def cast(self, c_type: str, value: object, /) -> CData: ...
    def sizeof(self, c_type: str | CData, /) -> int: ...
    def buffer(self, c_data: CData, size: int = ..., /) -> CData: ...
    def gc(self, c_data: CData, destructor: object, size: int = ..., /) -> CData: ...
    def addressof(self, c_data: CData, /, *fields: str | int) -> CData: ...
    def string(self, c_data: CData, max_length: int = ..., /) -> bytes: ...
    def memmove(self, dest: object, src: object, n: int, /) -> None: ...
    def from_buffer(
        self, c_type: str | object, buffer: object = ..., /, require_writable: bool = ...
    ) -> CData: ...
    def release(self, c_data: CData, /) -> None: ...

class _Lib:
    # CORE: <linux/kvm.h>, csrc/kvm_ioctl.h
    KVM_GET_API_VERSION: Final[int]
    KVM_CHECK_EXTENSION: Final[int]
    KVM_CREATE_VM: Final[int]
    KVM_GET_VCPU_MMAP_SIZE: Final[int]
    KVM_GET_SUPPORTED_CPUID: Final[int]
    KVM_GET_EMULATED_CPUID: Final[int]
    KVM_GET_MSR_INDEX_LIST: Final[int]
    KVM_GET_MSR_FEATURE_INDEX_LIST: Final[int]
    KVM_CREATE_VCPU: Final[int]
    KVM_SET_USER_MEMORY_REGION: Final[int]
    KVM_SET_TSS_ADDR: Final[int]
    KVM_SET_IDENTITY_MAP_ADDR: Final[int]
    KVM_CREATE_IRQCHIP: Final[int]
    KVM_CREATE_PIT2: Final[int]
    KVM_GET_IRQCHIP: Final[int]
    KVM_SET_IRQCHIP: Final[int]
    KVM_GET_PIT2: Final[int]
    KVM_SET_PIT2: Final[int]
    KVM_IRQFD: Final[int]
    KVM_IOEVENTFD: Final[int]
    KVM_SET_GSI_ROUTING: Final[int]
    KVM_SIGNAL_MSI: Final[int]
    KVM_GET_CLOCK: Final[int]
    KVM_SET_CLOCK: Final[int]
    KVM_REGISTER_COALESCED_MMIO: Final[int]
    KVM_UNREGISTER_COALESCED_MMIO: Final[int]
    KVM_ENABLE_CAP: Final[int]
    KVM_RUN: Final[int]
    KVM_GET_REGS: Final[int]
    KVM_SET_REGS: Final[int]
    KVM_GET_SREGS: Final[int]
    KVM_SET_SREGS: Final[int]
    KVM_GET_FPU: Final[int]
    KVM_SET_FPU: Final[int]
    KVM_GET_LAPIC: Final[int]
    KVM_SET_LAPIC: Final[int]
    KVM_GET_VCPU_EVENTS: Final[int]
    KVM_SET_VCPU_EVENTS: Final[int]
    KVM_GET_XSAVE: Final[int]
    KVM_GET_XSAVE2: Final[int]
    KVM_SET_XSAVE: Final[int]
    KVM_GET_XCRS: Final[int]
    KVM_SET_XCRS: Final[int]
    KVM_GET_DEBUGREGS: Final[int]
    KVM_SET_DEBUGREGS: Final[int]
    KVM_GET_MP_STATE: Final[int]
    KVM_SET_MP_STATE: Final[int]
    KVM_GET_MSRS: Final[int]
    KVM_SET_MSRS: Final[int]
    KVM_SET_CPUID2: Final[int]
    KVM_GET_CPUID2: Final[int]
    KVM_GET_TSC_KHZ: Final[int]
    KVM_SET_TSC_KHZ: Final[int]
    KVM_KVMCLOCK_CTRL: Final[int]
    KVM_TRANSLATE: Final[int]
    KVM_NMI: Final[int]
    KVM_API_VERSION: Final[int]
    KVM_MEM_LOG_DIRTY_PAGES: Final[int]
    KVM_MEM_READONLY: Final[int]
    KVM_IOEVENTFD_FLAG_DATAMATCH: Final[int]
    KVM_IOEVENTFD_FLAG_PIO: Final[int]
    KVM_IOEVENTFD_FLAG_DEASSIGN: Final[int]
    KVM_IRQFD_FLAG_DEASSIGN: Final[int]
    KVM_IRQCHIP_PIC_MASTER: Final[int]
    KVM_IRQCHIP_PIC_SLAVE: Final[int]
    KVM_IRQCHIP_IOAPIC: Final[int]
    KVM_PIT_SPEAKER_DUMMY: Final[int]
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX: Final[int]
    KVM_CLOCK_REALTIME: Final[int]
    KVM_CLOCK_HOST_TSC: Final[int]
    KVM_CLOCK_TSC_STABLE: Final[int]
    KVM_MP_STATE_RUNNABLE: Final[int]
    KVM_MP_STATE_UNINITIALIZED: Final[int]
    KVM_MP_STATE_INIT_RECEIVED: Final[int]
    KVM_MP_STATE_HALTED: Final[int]
    KVM_MP_STATE_SIPI_RECEIVED: Final[int]
    KVM_INTERNAL_ERROR_EMULATION: Final[int]
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: Final[int]
    KVM_SYSTEM_EVENT_SHUTDOWN: Final[int]
    KVM_SYSTEM_EVENT_RESET: Final[int]
    KVM_SYSTEM_EVENT_CRASH: Final[int]
    KVM_CAP_IRQCHIP: Final[int]
    KVM_CAP_USER_MEMORY: Final[int]
    KVM_CAP_SET_TSS_ADDR: Final[int]
    KVM_CAP_EXT_CPUID: Final[int]
    KVM_CAP_NR_VCPUS: Final[int]
    KVM_CAP_MAX_VCPUS: Final[int]
    KVM_CAP_MAX_VCPU_ID: Final[int]
    KVM_CAP_NR_MEMSLOTS: Final[int]
    KVM_CAP_MP_STATE: Final[int]
    KVM_CAP_COALESCED_MMIO: Final[int]
    KVM_CAP_COALESCED_PIO: Final[int]
    KVM_CAP_SYNC_MMU: Final[int]
    KVM_CAP_USER_NMI: Final[int]
    KVM_CAP_IRQ_ROUTING: Final[int]
    KVM_CAP_IRQFD: Final[int]
    KVM_CAP_PIT2: Final[int]
    KVM_CAP_PIT_STATE2: Final[int]
    KVM_CAP_IOEVENTFD: Final[int]
    KVM_CAP_IOEVENTFD_ANY_LENGTH: Final[int]
    KVM_CAP_SET_IDENTITY_MAP_ADDR: Final[int]
    KVM_CAP_ADJUST_CLOCK: Final[int]
    KVM_CAP_INTERNAL_ERROR_DATA: Final[int]
    KVM_CAP_VCPU_EVENTS: Final[int]
    KVM_CAP_DEBUGREGS: Final[int]
    KVM_CAP_ENABLE_CAP: Final[int]
    KVM_CAP_ENABLE_CAP_VM: Final[int]
    KVM_CAP_XSAVE: Final[int]
    KVM_CAP_XSAVE2: Final[int]
    KVM_CAP_XCRS: Final[int]
    KVM_CAP_ASYNC_PF: Final[int]
    KVM_CAP_ASYNC_PF_INT: Final[int]
    KVM_CAP_TSC_CONTROL: Final[int]
    KVM_CAP_GET_TSC_KHZ: Final[int]
    KVM_CAP_TSC_DEADLINE_TIMER: Final[int]
    KVM_CAP_SYNC_REGS: Final[int]
    KVM_CAP_KVMCLOCK_CTRL: Final[int]
    KVM_CAP_SIGNAL_MSI: Final[int]
    KVM_CAP_READONLY_MEM: Final[int]
    KVM_CAP_SPLIT_IRQCHIP: Final[int]
    KVM_CAP_X2APIC_API: Final[int]
    KVM_CAP_IMMEDIATE_EXIT: Final[int]
    KVM_CAP_GET_MSR_FEATURES: Final[int]
    KVM_CAP_NESTED_STATE: Final[int]
    KVM_CAP_X86_DISABLE_EXITS: Final[int]
    KVM_CAP_X86_SMM: Final[int]
    KVM_CAP_HALT_POLL: Final[int]
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: Final[int]
    KVM_CAP_DIRTY_LOG_RING: Final[int]
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL: Final[int]
    KVM_CAP_EXIT_ON_EMULATION_FAILURE: Final[int]
    KVM_CAP_EXCEPTION_PAYLOAD: Final[int]
    KVM_CAP_STEAL_TIME: Final[int]
    KVM_CAP_X86_USER_SPACE_MSR: Final[int]
    KVM_CAP_X86_MSR_FILTER: Final[int]
    KVM_CAP_X86_TRIPLE_FAULT_EVENT: Final[int]
    KVM_CAP_X86_NOTIFY_VMEXIT: Final[int]
    KVM_CAP_BINARY_STATS_FD: Final[int]
    KVM_CAP_VM_GPA_BITS: Final[int]
    KVM_CAP_PTP_KVM: Final[int]
    KVM_CAP_MEMORY_FAULT_INFO: Final[int]
    KVM_CAP_USER_MEMORY2: Final[int]
    KVM_CAP_DISABLE_QUIRKS2: Final[int]
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID: Final[int]
    def kvm_ioctl_int(self, fd: int, request: int, arg: int, /) -> int: ...
    def kvm_ioctl_ptr(self, fd: int, request: int, arg: CData, /) -> int: ...
    def kvm_get_dirty_log(self, vm_fd: int, slot: int, bitmap: CData, /) -> int: ...
    def kvm_set_irq_line(self, vm_fd: int, gsi: int, level: int, /) -> int: ...
    def kvm_coalesced_zone(
        self, vm_fd: int, request: int, addr: int, size: int, is_pio: int, /
    ) -> int: ...
    def kvm_route_to_irqchip(self, entry: CData, gsi: int, irqchip: int, pin: int, /) -> None: ...
    def kvm_route_to_msi(self, entry: CData, gsi: int, address: int, data: int, /) -> None: ...

    # CORE: csrc/uart16550.h, csrc/exit_table.h, csrc/vcpu_loop.h
    UART16550_PORTS: Final[int]
    UART16550_INPUT_SIZE: Final[int]
    UART16550_OUTPUT_SIZE: Final[int]
    EXIT_TABLE_MAX_MMIO: Final[int]
    EXIT_TABLE_MAX_UARTS: Final[int]
    EXIT_TABLE_PCI_SLOTS: Final[int]
    EXIT_TABLE_PCI_SLOT_SIZE: Final[int]
    EXIT_KICKED: Final[int]
    EXIT_PIO_READ: Final[int]
    EXIT_PIO_WRITE: Final[int]
    EXIT_MMIO_READ: Final[int]
    EXIT_MMIO_WRITE: Final[int]
    EXIT_PCI_CONFIG_WRITE: Final[int]
    EXIT_HLT: Final[int]
    EXIT_SHUTDOWN: Final[int]
    EXIT_SYSTEM_EVENT: Final[int]
    EXIT_FAIL_ENTRY: Final[int]
    EXIT_INTERNAL_ERROR: Final[int]
    EXIT_UNKNOWN: Final[int]
    EXIT_PCI_CONFIG_READ: Final[int]
    EXIT_KINDS: Final[int]
    COUNT_UART: Final[int]
    COUNT_PCI: Final[int]
    COUNT_PIO_UNCLAIMED: Final[int]
    COUNT_MMIO_UNCLAIMED: Final[int]
    VCPU_COUNTERS: Final[int]
    VCPU_EXIT_DATA: Final[int]
    def uart16550_create(self, irq_fd: int, output_fd: int, /) -> CData: ...
    def uart16550_destroy(self, uart: CData, /) -> None: ...
    def uart16550_disconnect(self, uart: CData, /) -> None: ...
    def uart16550_read(self, uart: CData, offset: int, /) -> int: ...
    def uart16550_write(self, uart: CData, offset: int, value: int, /) -> None: ...
    def uart16550_take_output(self, uart: CData, buf: CData, size: int, /) -> int: ...
    def uart16550_output_size(self, uart: CData, /) -> int: ...
    def uart16550_put_input(self, uart: CData, buf: bytes, size: int, /) -> int: ...
    def uart16550_dropped(self, uart: CData, /) -> int: ...
    def exit_table_create(self, pci_config: CData, /) -> CData: ...
    def exit_table_destroy(self, table: CData, /) -> None: ...
    def exit_table_set_pio(
        self, table: CData, port: int, length: int, is_claimed: bool, /
    ) -> int: ...
    def exit_table_claim_mmio(self, table: CData, gpa: int, length: int, /) -> int: ...
    def exit_table_unclaim_mmio(self, table: CData, gpa: int, length: int, /) -> int: ...
    def exit_table_attach_uart(self, table: CData, uart: CData, port: int, /) -> int: ...
    def exit_table_set_ecam(self, table: CData, gpa: int, length: int, /) -> None: ...
    def exit_table_set_pci_present(self, table: CData, slot: int, is_present: bool, /) -> None: ...
    def exit_table_trap_pci_reads(
        self, table: CData, slot: int, start: int, end: int, /
    ) -> None: ...
    ACCESS_UNCLAIMED: Final[int]
    ACCESS_UART: Final[int]
    ACCESS_PCI: Final[int]
    ACCESS_PYTHON: Final[int]
    ACCESS_PCI_PYTHON: Final[int]
    def exit_table_pio(
        self, table: CData, port: int, size: int, is_write: bool, data: CData, pci_addr: CData, /
    ) -> int: ...
    def exit_table_mmio(
        self, table: CData, gpa: int, size: int, is_write: bool, data: CData, pci_addr: CData, /
    ) -> int: ...
    def exit_table_pci_address(self, table: CData, /) -> int: ...
    def exit_table_set_pci_address(self, table: CData, address: int, /) -> None: ...
    def vcpu_init(self, vcpu: CData, fd: int, run_size: int, /) -> int: ...
    def vcpu_deinit(self, vcpu: CData, /) -> int: ...
    def vcpu_run(self, vcpu: CData, /) -> int: ...
    def vcpu_kick(self, vcpu: CData, /) -> None: ...
    def vcpu_clear_kick(self, vcpu: CData, /) -> None: ...
    def vcpu_install_kick_signal(self) -> int: ...
    def vcpu_take_coalesced(self, vcpu: CData, ring_page: int, ret: CData, /) -> int: ...

    # RING: csrc/guest_mem.h, csrc/virtqueue.h, csrc/engine.h, csrc/blk_engine.h, csrc/net_engine.h
    GUEST_MEM_MAX_REGIONS: Final[int]
    VIRTQUEUE_MAX_SIZE: Final[int]
    VIRTIO_RING_F_INDIRECT_DESC: Final[int]
    VIRTIO_RING_F_EVENT_IDX: Final[int]
    VRING_DESC_F_NEXT: Final[int]
    VRING_DESC_F_WRITE: Final[int]
    VRING_DESC_F_INDIRECT: Final[int]
    ENGINE_FAULT_NONE: Final[int]
    ENGINE_FAULT_RING: Final[int]
    ENGINE_FAULT_BACKEND: Final[int]
    BLK_MAX_DISCARD_SEGMENTS: Final[int]
    BLK_MAX_DISCARD_SECTORS: Final[int]
    BLK_MAX_WRITE_ZEROES_SEGMENTS: Final[int]
    BLK_MAX_WRITE_ZEROES_SECTORS: Final[int]
    BLK_MAX_REQUEST_BYTES: Final[int]
    BLK_SECTOR_BYTES: Final[int]
    BLK_SERIAL_BYTES: Final[int]
    BLK_MAX_SECTORS: Final[int]
    BLK_MAX_QUEUES: Final[int]
    BLK_LATENCY_SHIFT: Final[int]
    BLK_LATENCY_BUCKETS: Final[int]
    BLK_IO_AUTO: Final[int]
    BLK_IO_URING: Final[int]
    BLK_IO_THREADS: Final[int]
    NET_HEADER_BYTES: Final[int]
    NET_MAX_PACKET_BYTES: Final[int]
    def guest_mem_ptr(self, mem: CData, gpa: int, length: int, /) -> CData: ...
    def guest_mem_read(self, mem: CData, gpa: int, buf: CData, length: int, /) -> int: ...
    def guest_mem_write(self, mem: CData, gpa: int, buf: CData, length: int, /) -> int: ...
    def guest_mem_zero(self, mem: CData, gpa: int, length: int, /) -> int: ...
    def guest_mem_map(
        self, mem: CData, memfd: int, file_offset: int, gpa: int, size: int, /
    ) -> int: ...
    def guest_mem_unmap_all(self, mem: CData, /) -> None: ...
    def virtqueue_init(
        self, vq: CData, mem: CData, size: int, desc_gpa: int, avail_gpa: int, used_gpa: int,
        features: int, /,
    ) -> int: ...  # fmt: skip
    def virtqueue_pop(self, vq: CData, chain: CData, /) -> int: ...
    def virtqueue_unpop(self, vq: CData, n: int, /) -> None: ...
    def virtqueue_add_used(self, vq: CData, head: int, written: int, /) -> None: ...
    def virtqueue_publish(self, vq: CData, /) -> int: ...
    def virtqueue_enable_kick(self, vq: CData, /) -> int: ...
    def virtqueue_disable_kick(self, vq: CData, /) -> None: ...
    def virtqueue_set_state(self, vq: CData, next_avail: int, next_used: int, /) -> int: ...
    def iov_copy_out(
        self, iov: CData, n_iov: int, offset: int, buf: CData, length: int, /
    ) -> int: ...
    def iov_copy_in(
        self, iov: CData, n_iov: int, offset: int, buf: CData, length: int, /
    ) -> int: ...
    def engine_gate_quiesce(self, gate: CData, timeout_ns: int, /) -> int: ...
    def engine_gate_resume(self, gate: CData, /) -> None: ...
    def engine_gate_stop(self, gate: CData, /) -> None: ...
    def engine_gate_wake(self, gate: CData, /) -> None: ...
    def engine_gate_is_running(self, gate: CData, /) -> bool: ...
    def blk_engine_create(self, config: CData, ret: CData, /) -> int: ...
    def blk_engine_destroy(self, engine: CData, /) -> int: ...
    def blk_engine_run(self, engine: CData, /) -> int: ...
    def blk_engine_serve(self, engine: CData, /) -> int: ...
    def blk_engine_gate(self, engine: CData, /) -> CData: ...
    def blk_engine_set_size(self, engine: CData, size_sectors: int, /) -> int: ...
    def blk_engine_fault(self, engine: CData, /) -> int: ...
    def blk_engine_io(self, engine: CData, /) -> int: ...
    def blk_engine_syncs(self, engine: CData, /) -> int: ...
    def blk_engine_queue_stats(self, engine: CData, queue: int, ret: CData, /) -> None: ...
    def blk_io_uring_probe(self) -> int: ...
    def blk_file_init(self, file: CData, fd: int, /) -> int: ...
    def net_engine_create(self, config: CData, ret: CData, /) -> int: ...
    def net_engine_destroy(self, engine: CData, /) -> int: ...
    def net_engine_run(self, engine: CData, /) -> int: ...
    def net_engine_serve(self, engine: CData, /) -> int: ...
    def net_engine_wait(self, engine: CData, timeout_ms: int, /) -> int: ...
    def net_engine_gate(self, engine: CData, /) -> CData: ...
    def net_engine_fault(self, engine: CData, /) -> int: ...
    def net_engine_stats(self, engine: CData, ret: CData, /) -> None: ...

    # csrc/net_tap.h
    def net_tap_configure(self, tap_fd: int, features: int, /) -> int: ...
    def net_tap_set_queue(self, tap_fd: int, is_attached: bool, /) -> int: ...
    def net_tap_set_carrier(self, tap_fd: int, is_up: bool, /) -> int: ...

    # csrc/timer.h
    def timer_create_fd(self) -> int: ...
    def timer_set(self, fd: int, delay_ns: int, /) -> int: ...

    # csrc/token_bucket.h
    TOKEN_BUCKET_MAX_BURST: Final[int]
    TOKEN_BUCKET_MAX_RATE: Final[int]
    def rate_limiter_init(self, limiter: CData, /) -> None: ...
    def rate_limiter_deinit(self, limiter: CData, /) -> None: ...
    def rate_limiter_set(self, limiter: CData, limit: CData, now_ns: int, /) -> int: ...
    def rate_limiter_take(self, limiter: CData, length: int, now_ns: int, /) -> int: ...
    # csrc/heap_image.h
    def heap_image_create(self, image: CData, /) -> int: ...
    def heap_image_attach(self, image: CData, /) -> int: ...
    def heap_image_learn(self, image: CData, ranges: CData, max: int, /) -> int: ...
    def heap_image_unshare(self, ranges: CData, n: int, /) -> int: ...
    def heap_image_give_back(self, image: CData, /) -> int: ...

    # csrc/host_process.h
    def host_punch_hole(self, fd: int, offset: int, length: int, /) -> int: ...
    def host_keep_heap_small(self) -> int: ...
    def host_drop_privileges(self) -> int: ...
    def host_name_thread(self, name: bytes, /) -> int: ...

    # VSOCK: csrc/vsock_engine.h, csrc/vsock_host.h
    VSOCK_MAX_CONNS: Final[int]
    VSOCK_LARGE_BUFFER: Final[int]
    VSOCK_SMALL_BUFFER: Final[int]
    VSOCK_BUFFER_BUDGET: Final[int]
    VSOCK_MAX_NAME_BYTES: Final[int]
    def vsock_engine_create(self, config: CData, ret: CData, /) -> int: ...
    def vsock_engine_destroy(self, engine: CData, /) -> int: ...
    def vsock_engine_run(self, engine: CData, /) -> int: ...
    def vsock_engine_serve(self, engine: CData, /) -> int: ...
    def vsock_engine_wait(self, engine: CData, timeout_ms: int, /) -> int: ...
    def vsock_engine_gate(self, engine: CData, /) -> CData: ...
    def vsock_engine_fault(self, engine: CData, /) -> int: ...
    def vsock_engine_stats(self, engine: CData, ret: CData, /) -> None: ...
    def vsock_parse_greeting(
        self, text: CData, length: int, port: CData, used: CData, /
    ) -> int: ...

ffi: Final[_Ffi]
lib: Final[_Lib]
