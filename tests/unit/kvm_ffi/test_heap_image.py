# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A fork shares memory again that it did not change, and keeps all that it did."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[3]
# Each test is a process of its own: it gives up its memory for an image of it.
PRELUDE = """
import gc, os, sys, threading
from pathlib import Path
from kvm_ffi.heap_image import HeapImage

def own_kib():
    text = Path("/proc/self/smaps_rollup").read_text()
    lines = [line.split() for line in text.splitlines()]
    return sum(int(words[1]) for words in lines if words[0] == "Private_Dirty:")

def give_back():
    image.attach()
    # A busy machine may not let every thread answer in time.
    for _ in range(100):
        try:
            return image.give_back()
        except (TimeoutError, BlockingIOError):
            pass
    raise AssertionError("the threads never stood still")

def fork(main):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            main()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0

data = [{"number": i, "text": str(i) * 20} for i in range(20_000)]
gc.collect()
gc.freeze()
"""


def run(script: str) -> str:
    """Run a script behind the prelude; return its last words when it failed."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.stderr if done.returncode else ""


def test_what_a_fork_only_looked_at_is_shared_again() -> None:
    assert not run("""
        image = HeapImage()
        sibling_waits, release = os.pipe()
        if os.fork() == 0:  # with a second process every page has somebody to share it with
            os.close(release)
            sum(len(entry["text"]) for entry in data)
            os.read(sibling_waits, 1)
            os._exit(0)

        def look():
            before = own_kib()
            sum(len(entry["text"]) for entry in data)
            looked = own_kib()
            assert looked > before + 2000, (before, looked)
            give_back()
            assert own_kib() < before + 500, (before, looked, own_kib())

        fork(look)
    """)


def test_what_a_fork_changed_stays_changed() -> None:
    assert not run("""
        image = HeapImage()

        def change():
            for entry in data[::7]:
                entry["text"] = "changed"
            kept = give_back()
            assert kept > 0
            assert all(
                entry["text"] == ("changed" if i % 7 == 0 else str(i) * 20)
                for i, entry in enumerate(data)
            )

        fork(change)
    """)


def test_what_was_freed_and_used_anew_is_not_touched() -> None:
    assert not run("""
        image = HeapImage()

        def replace():
            data.clear()
            gc.collect()
            fresh = [bytes(3000) for _ in range(4000)]
            give_back()
            assert all(piece == bytes(3000) for piece in fresh)

        fork(replace)
    """)


# Most of the time each page is as it is in the image, so that it may be dropped at any moment.
FLIPPING_THREADS = """
memory = bytearray(4096 * 400)
image = HeapImage()

def flip(part, go_on, lost):
    while go_on.is_set():
        for at in part:
            memory[at] = 1
            if memory[at] != 1:
                lost.append(at)
            memory[at] = 0

def race(attempt):
    go_on, lost = threading.Event(), []
    go_on.set()
    pages = range(2000, len(memory), 4096)
    threads = [
        threading.Thread(target=flip, args=(pages[i::3], go_on, lost)) for i in range(3)
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(60):
            attempt()
    finally:
        go_on.clear()
        for thread in threads:
            thread.join()
    assert not lost, f"{len(lost)} writes were lost"

sys.setswitchinterval(1e-5)
"""


def test_threads_lose_nothing_that_they_write_meanwhile() -> None:
    assert not run(FLIPPING_THREADS + "fork(lambda: race(give_back))")


def test_nothing_is_dropped_when_a_thread_cannot_be_told() -> None:
    assert not run(
        FLIPPING_THREADS
        + """
import resource

def refused():
    try:
        image.give_back()
    except OSError as err:
        assert err.errno == 11, err
    else:
        raise AssertionError("it gave memory back beside running threads")

def starve():
    # The kernel queues no signal then: tgkill(2) fails with EAGAIN.
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, 0))
    image.attach()
    race(refused)

fork(starve)
"""
    )


def test_a_pass_goes_on_where_the_last_one_ran_out_of_time() -> None:
    assert not run("""
        pages = 60_000  # several times what 10 ms are enough for
        memory = bytearray(4096 * pages)
        image = HeapImage()

        def change_all():
            memory[::4096] = b"x" * pages
            assert give_back() >= pages
            assert memory.count(b"x") == pages

        fork(change_all)
    """)


def test_a_thread_that_waits_for_input_goes_on_waiting() -> None:
    assert not run("""
        image = HeapImage()

        def wait():
            readable, writable = os.pipe()
            got = []
            thread = threading.Thread(target=lambda: got.append(os.read(readable, 16)))
            thread.start()
            for _ in range(20):
                give_back()
            assert got == []
            os.write(writable, b"late")
            thread.join(10)
            assert got == [b"late"]

        fork(wait)
    """)


def test_what_one_fork_learned_another_has_before_it_writes() -> None:
    assert not run("""
        import resource
        from kvm_ffi.heap_image import unshare
        image = HeapImage()

        def work():
            for entry in data[::3]:
                entry["text"] = "changed"
            assert all(
                entry["text"] == ("changed" if i % 3 == 0 else str(i) * 20)
                for i, entry in enumerate(data)
            )

        def faults_of_work():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            work()
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        def told_by(main):
            readable, writable = os.pipe()
            fork(lambda: os.write(writable, main()))
            os.close(writable)
            with open(readable, "rb") as pipe:
                return pipe.read()

        def scout():
            image.attach()
            work()
            return image.learn()

        def prepared():
            unshare(learned)
            return b"%d" % faults_of_work()

        learned = told_by(scout)
        assert len(learned) % 16 == 0
        with_it = int(told_by(prepared))
        without = int(told_by(lambda: b"%d" % faults_of_work()))
        assert with_it < without / 5, (with_it, without)
    """)


def test_nobody_can_change_the_image() -> None:
    assert not run("""
        image = HeapImage()

        def tamper():
            for name in os.listdir("/proc/self/fd"):
                try:
                    target = os.readlink(f"/proc/self/fd/{name}")
                except FileNotFoundError:
                    continue
                if "hostel-heap" in target:
                    break
            else:
                raise AssertionError("no image")
            try:
                os.pwrite(int(name), b"x", 0)
            except PermissionError:
                return
            raise AssertionError("written")

        fork(tamper)
    """)


def test_a_process_with_threads_makes_none() -> None:
    assert "Device or resource busy" in run("""
        done = threading.Event()
        thread = threading.Thread(target=done.wait)
        thread.start()
        try:
            HeapImage()
        finally:
            done.set()
            thread.join()
    """)
