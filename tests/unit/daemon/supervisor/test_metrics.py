# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a scrape tells of VMs, in the types that Prometheus has for it."""

from __future__ import annotations

from collections import Counter

from prometheus_client.core import Metric

from api.models.vms import DiskDetails, VmState, VmStats
from daemon.supervisor.host import families


def scrape() -> dict[str, Metric]:
    """Of one VM with a disk of two queues."""
    queues = [{"reads": 7, "in_flight": 3}, {"reads": 2, "in_flight": 0}]
    details = DiskDetails(
        io_engine="io_uring", queues=queues, latency_limits_ns=[1024], latency=[[6, 1], [0, 2]]
    )
    stats = VmStats(
        vcpu_exits={},
        disks={"root": {"reads": 9, "in_flight": 3}},
        disk_details={"root": details},
        nics={},
        memory_rss_bytes=1,
        console_dropped_bytes=0,
    )
    found = families(Counter({VmState.RUNNING: 1}), [("a", stats)], 0)
    return {family.name: family for family in found}


def test_queue_depth_is_a_gauge_of_each_queue_and_no_counter() -> None:
    told = scrape()
    depth = told["hostel_vm_disk_in_flight"]
    assert depth.type == "gauge"
    assert [(sample.labels["queue"], sample.value) for sample in depth.samples] == [
        ("0", 3),
        ("1", 0),
    ]
    counters = [family for family in told.values() if family.type == "counter"]
    labels = [sample.labels for family in counters for sample in family.samples]
    assert {"vm": "a", "disk": "root", "queue": "0", "counter": "reads"} in labels
    assert "in_flight" not in {label.get("counter") for label in labels}


def test_latency_is_cumulative_and_of_all_queues() -> None:
    samples = scrape()["hostel_vm_disk_latency_seconds"].samples
    assert [(sample.labels["le"], sample.value) for sample in samples] == [
        ("0.000001024", 6),
        ("+Inf", 9),
    ]
