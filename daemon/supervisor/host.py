# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The host as clients see it, and its metrics."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from pydantic import ValidationError

from api.errors import ApiError, HostFailure
from api.models.resources import Host
from api.models.vms import DiskDetails, VmState, VmStats
from api.version import API_EXTENSIONS

from . import doctor, procfs, taps
from .config import Config
from .records import VmRecord
from .vm_run import VmRunner
from .vm_table import VmEntry, VmTable

# A scrape asks every worker, this many at once, and does not wait longer for any of them.
log = logging.getLogger(__name__)

STATS_AT_ONCE: Final = 32
STATS_TIMEOUT_S: Final = 2.0


class HostView:
    """Describes the host; measures once.

    Threads: the event loop's.
    """

    def __init__(self, config: Config, table: VmTable, version: str) -> None:
        self._config = config
        self._table = table
        self._version = version
        self._probe: doctor.Probe | None = None
        self._probing = asyncio.Lock()

    async def describe(self) -> Host:
        """Return the host with all checks; the first call measures."""
        probe = await self._measured()
        findings = await asyncio.to_thread(
            doctor.examine, self._config.kvm_device, Path(self._config.state_dir), probe
        )
        total, available = procfs.memory()
        states = Counter(entry.record.state for entry in self._table)
        return Host(
            hostname=platform.node(),
            version=self._version,
            tier=findings.tier,
            kernel=platform.release(),
            cpu_count=len(os.sched_getaffinity(0)),
            memory_bytes=total,
            memory_available_bytes=available,
            vm_count=len(self._table),
            vm_running_count=states[VmState.RUNNING],
            api_extensions=list(API_EXTENSIONS),
            checks=findings.checks,
        )

    async def _measured(self) -> doctor.Probe | None:
        device = self._config.kvm_device
        async with self._probing:
            if self._probe is None and doctor.check_kvm(device).status == "ok":
                probe = await asyncio.to_thread(doctor.run_probe, device)
                if probe.measured is None:
                    return probe  # asked again next time: the host may have been busy
                self._probe = probe
            return self._probe


async def vm_stats(runner: VmRunner, entry: VmEntry) -> VmStats:
    """Read a live VM's counters.

    Raises:
        ApiError: its worker does not answer.
    """
    told = await runner.ask(entry, "stats")
    pid = 0 if entry.worker is None else entry.worker.pid
    known: dict[str, Any] = {
        name: value for name, value in told.items() if name in VmStats.model_fields
    }
    try:
        # The worker counts what its ring had no room for, and what the log could not take.
        lost = told.get("console_lost_bytes", 0)
        _add_tap_counters(known, entry.record)
        known["disk_details"] = {
            disk: _name_counters(details) for disk, details in known.get("disk_details", {}).items()
        }
        known["console_dropped_bytes"] = known.get("console_dropped_bytes", 0) + lost
        return VmStats.model_validate({**known, "memory_rss_bytes": procfs.rss_bytes(pid)})
    except (AttributeError, KeyError, TypeError, ValidationError) as err:
        log.warning("counters not understood vm=%s error=%s", entry.record.name, err)
        raise HostFailure(
            "worker_protocol", f"VM {entry.record.name}: its worker tells no such counters"
        ) from err


def _add_tap_counters(told: dict[str, Any], record: VmRecord) -> None:
    """Tell of interfaces that vhost serves, which counts nothing, what their taps have counted."""
    for nic in record.nics:
        if told.get("nic_details", {}).get(nic.id, {}).get("backend") == "vhost":
            told["nics"][nic.id] = taps.counters(nic.tap)


def _name_counters(details: dict[str, Any]) -> dict[str, Any]:
    """Give the counters of each queue their names, which a worker sends once."""
    names = details["counters"]
    return {
        **details,
        "queues": [dict(zip(names, queue, strict=False)) for queue in details["queues"]],
    }


class Metrics:
    """The Prometheus exposition.

    Threads: the event loop's.
    """

    def __init__(self, table: VmTable, runner: VmRunner) -> None:
        self._table = table
        self._runner = runner

    async def expose(self) -> bytes:
        """Ask every live worker, and return the text; who does not answer in time is counted."""
        slots = asyncio.Semaphore(STATS_AT_ONCE)
        live = [entry for entry in self._table if entry.worker is not None]

        async def ask(entry: VmEntry) -> tuple[str, VmStats] | None:
            async with slots:
                try:
                    async with asyncio.timeout(STATS_TIMEOUT_S):
                        return entry.record.name, await vm_stats(self._runner, entry)
                except (ApiError, TimeoutError):
                    return None

        answers = await asyncio.gather(*(ask(entry) for entry in live))
        stats = [answer for answer in answers if answer is not None]
        states = Counter(entry.record.state for entry in self._table)
        registry = CollectorRegistry()
        registry.register(_Snapshot(list(families(states, stats, len(live) - len(stats)))))
        return generate_latest(registry)


class _Snapshot(Collector):
    """Metrics that were gathered before; the library's way in."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


# Label, and the beginning of the help text.
_DEVICE_KINDS: Final = {
    "disk": "Disk",
    "nic": "Interface",
    "vsock": "vsock",
    "port": "Console port",
    "pmem": "Persistent memory",
}

# Among a disk's counters, and none: they go up and down.
_LEVELS: Final = frozenset({"in_flight"})


def families(
    states: Counter[VmState], stats: list[tuple[str, VmStats]], silent: int
) -> Iterator[Metric]:
    """Return what a scrape tells.

    Args:
        states: how many VMs are in each state.
        stats: name and counters of each live VM that answered.
        silent: how many live VMs did not.
    """
    by_state = GaugeMetricFamily("hostel_vms", "VMs by state.", labels=["state"])
    for state in VmState:
        by_state.add_metric([state.value], states[state])
    yield by_state
    yield GaugeMetricFamily(
        "hostel_scrape_failures", "Live VMs that did not tell their counters.", value=silent
    )
    rss = GaugeMetricFamily(
        "hostel_vm_memory_rss_bytes", "Resident memory, guest RAM included.", labels=["vm"]
    )
    exits = CounterMetricFamily("hostel_vm_exits", "vCPU exits.", labels=["vm", "kind"])
    dropped = CounterMetricFamily(
        "hostel_vm_console_dropped_bytes", "Console output that was lost.", labels=["vm"]
    )
    queues = CounterMetricFamily(
        "hostel_vm_disk_queue",
        "Disk counters of one queue by name.",
        labels=["vm", "disk", "queue", "counter"],
    )
    in_flight = GaugeMetricFamily(
        "hostel_vm_disk_in_flight",
        "Requests that a queue's disk has under way.",
        labels=["vm", "disk", "queue"],
    )
    latency = HistogramMetricFamily(
        "hostel_vm_disk_latency_seconds",
        "How long requests took, from ring to answer, in all queues.",
        labels=["vm", "disk"],
    )
    for name, one in stats:
        for disk, details in one.disk_details.items():
            latency.add_metric([name, disk], _buckets(details), sum_value=None)
            for index, queue in enumerate(details.queues):
                labels = [name, disk, str(index)]
                for counter, count in queue.items():
                    if counter not in _LEVELS:
                        queues.add_metric([*labels, counter], count)
                in_flight.add_metric(labels, queue.get("in_flight", 0))
        rss.add_metric([name], one.memory_rss_bytes)
        dropped.add_metric([name], one.console_dropped_bytes)
        for kind, count in one.vcpu_exits.items():
            exits.add_metric([name, kind], count)
    yield from (rss, exits, dropped, queues, in_flight, latency, _nic_queues(stats))
    for kind, text in _DEVICE_KINDS.items():
        yield _devices(kind, text, stats)


def _devices(kind: str, text: str, stats: list[tuple[str, VmStats]]) -> Metric:
    """Return the counters of all devices of a kind."""
    family = CounterMetricFamily(
        f"hostel_vm_{kind}", f"{text} counters by name.", labels=["vm", kind, "counter"]
    )
    for name, one in stats:
        devices = {
            "disk": one.disks,
            "nic": one.nics,
            "vsock": {"vsock0": one.vsock},
            "port": one.ports,
            "pmem": one.pmem,
        }[kind]
        for device, counters in devices.items():
            for counter, count in counters.items():
                if counter not in _LEVELS:
                    family.add_metric([name, device, counter], count)
    return family


def _buckets(details: DiskDetails) -> list[tuple[str, float]]:
    """Return a disk's histogram as Prometheus has them: cumulative, in seconds."""
    limits = [*(f"{limit / 1e9:.9f}" for limit in details.latency_limits_ns), "+Inf"]
    counts = [sum(column) for column in zip(*details.latency, strict=True)] or [0] * len(limits)
    return list(zip(limits, itertools.accumulate(counts), strict=True))


def _nic_queues(stats: list[tuple[str, VmStats]]) -> Metric:
    family = CounterMetricFamily(
        "hostel_vm_nic_queue",
        "Interface counters of one queue by name.",
        labels=["vm", "nic", "queue", "counter"],
    )
    for name, one in stats:
        for nic, details in one.nic_details.items():
            for queue, counters in details.queues.items():
                for counter, count in counters.items():
                    family.add_metric([name, nic, queue, counter], count)
    return family
