# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""bzImages: every packer is undone, and no corruption passes for a kernel."""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.images.bzimage import read_setup_header, unpack
from daemon.images.errors import Cancelled, KernelFormatError
from tests.support.kernels import (
    PACKERS,
    bzimage,
    elf,
    lz4_legacy,
    open_bytes,
    payload_offset,
    sized,
)

# How fast the machine is decides nothing.
UNHURRIED = settings(suppress_health_check=[HealthCheck.too_slow])
KERNEL = elf() + b"relocations" * 100
SMALL = elf(body=b"\xf4" * 512)


def unpack_bytes(image: bytes, progress: list[tuple[int, int | None]] | None = None) -> bytes:
    output: list[bytes] = []
    seen = [] if progress is None else progress
    with open_bytes(image) as fd:
        header = read_setup_header(fd)
        assert header is not None
        unpack(
            fd,
            header,
            output.append,
            progress=lambda done, total: seen.append((done, total)),
            cancelled=lambda: False,
        )
    return b"".join(output)


def refusal(image: bytes) -> KernelFormatError:
    with pytest.raises(KernelFormatError) as caught:
        unpack_bytes(image)
    return caught.value


@pytest.mark.parametrize("name", PACKERS)
def test_every_compression_is_unpacked_to_the_same_bytes(name: str) -> None:
    assert unpack_bytes(bzimage(PACKERS[name](KERNEL))) == KERNEL


@pytest.mark.parametrize("name", PACKERS)
def test_the_compression_is_named(name: str) -> None:
    with open_bytes(bzimage(PACKERS[name](KERNEL))) as fd:
        header = read_setup_header(fd)
        assert header is not None
        found = unpack(
            fd, header, lambda piece: None, progress=lambda *_: None, cancelled=lambda: False
        )
    assert found == name


@pytest.mark.parametrize("name", [name for name in PACKERS if name != "none"])
def test_a_payload_cut_short_is_refused(name: str) -> None:
    packed = PACKERS[name](KERNEL)
    cut = packed[: len(packed) // 2]
    error = refusal(bzimage(sized(cut, KERNEL)))
    assert error.offset is not None
    assert "copy" in error.detail


@pytest.mark.parametrize("name", [name for name in PACKERS if name not in ("none", "lz4")])
def test_a_damaged_byte_is_noticed(name: str) -> None:
    # lz4's legacy frame has no checksum: a changed literal cannot be seen, and no kernel sees it.
    packed = bytearray(PACKERS[name](KERNEL))
    packed[40_000] ^= 0x55
    assert "payload" in refusal(bzimage(bytes(packed))).detail


def test_a_size_trailer_that_disagrees_is_refused() -> None:
    packed = PACKERS["xz"](KERNEL)[:-4] + struct.pack("<I", len(KERNEL) + 1)
    assert f"its trailer says {len(KERNEL) + 1}" in refusal(bzimage(packed)).detail


def test_more_output_than_the_trailer_says_is_refused() -> None:
    packed = PACKERS["zstd"](KERNEL)[:-4] + struct.pack("<I", 4096)
    assert "unpacks to more than 4096 bytes" in refusal(bzimage(packed)).detail


def test_a_bomb_is_refused_by_its_declared_size() -> None:
    packed = PACKERS["zstd"](KERNEL)[:-4] + struct.pack("<I", 0xFFFF_FFFF)
    assert "must be 1..536870912" in refusal(bzimage(packed)).detail


def test_a_gzip_bomb_is_stopped_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.images.bzimage.MAX_UNPACKED_BYTES", 100_000)
    assert "more than 100000 bytes" in refusal(bzimage(PACKERS["gzip"](KERNEL))).detail


def test_a_payload_that_is_no_elf_is_refused() -> None:
    assert "unpacks to no ELF file" in refusal(bzimage(PACKERS["xz"](b"hello" * 100))).detail


def test_lzo_is_named_in_its_refusal() -> None:
    error = refusal(bzimage(b"\x89LZO\x00\x0d\x0a\x1a" + bytes(64)))
    assert "lzo" in error.detail
    assert error.offset == payload_offset()


def test_an_unknown_packer_is_refused_with_its_first_bytes() -> None:
    assert "starts with de ad be ef" in refusal(bzimage(b"\xde\xad\xbe\xef" + bytes(64))).detail


def test_lz4_blocks_and_repeated_magics_are_joined() -> None:
    packed = lz4_legacy(KERNEL[:200_000], 65_536) + lz4_legacy(KERNEL[200_000:])
    assert unpack_bytes(bzimage(sized(packed, KERNEL))) == KERNEL


def test_an_lz4_block_size_from_nowhere_is_refused() -> None:
    packed = struct.pack("<II", 0x184C2102, 0x7FFF_FFFF) + bytes(64)
    assert "a block of 2147483647 bytes" in refusal(bzimage(sized(packed, KERNEL))).detail


def test_a_zero_setup_sects_means_four() -> None:
    assert unpack_bytes(bzimage(PACKERS["gzip"](KERNEL), setup_sects=0)) == KERNEL


def test_a_truncated_file_is_refused_before_unpacking() -> None:
    image = bzimage(PACKERS["gzip"](KERNEL))[:-2000]
    error = refusal(image)
    assert "truncated" in error.detail
    assert error.offset == len(image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (bzimage(b"x" * 99, version=0x0207), "boot protocol 2.07, must be at least 2.08"),
        (bzimage(b"x" * 99, loadflags=0), "a zImage"),
        (bzimage(b"x" * 99, jump=0x10), "the setup header ends at 0x212"),
        (bzimage(b"x" * 99, jump=0xFF), "the setup header ends at 0x301"),
        (bzimage(b"", payload_bytes=4), "a payload of 4 bytes holds no kernel"),
        (bzimage(b"", payload_bytes=0xFFFF_FFFF), "truncated"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(image: bytes, message: str) -> None:
    assert message in refusal(image).detail


@pytest.mark.parametrize("data", [b"", b"MZ", bytes(4096), elf()])
def test_another_file_has_no_setup_header(data: bytes) -> None:
    with open_bytes(data) as fd:
        assert read_setup_header(fd) is None


def test_progress_ends_at_the_payload_size() -> None:
    seen: list[tuple[int, int | None]] = []
    packed = PACKERS["gzip"](KERNEL)
    unpack_bytes(bzimage(packed), seen)
    assert seen[-1] == (len(packed), len(packed))


def test_unpacking_stops_when_cancelled() -> None:
    with open_bytes(bzimage(PACKERS["gzip"](KERNEL))) as fd:
        header = read_setup_header(fd)
        assert header is not None
        with pytest.raises(Cancelled):
            unpack(fd, header, lambda piece: None, progress=lambda *_: None, cancelled=lambda: True)


def unpacks_or_refuses(image: bytes) -> None:
    try:
        with open_bytes(image) as fd:
            header = read_setup_header(fd)
            if header is not None:
                unpack(
                    fd,
                    header,
                    lambda piece: None,
                    progress=lambda *_: None,
                    cancelled=lambda: False,
                )
    except KernelFormatError:
        pass


@pytest.mark.parametrize("name", PACKERS)
@UNHURRIED
@given(data=st.data())
def test_mutated_images_raise_nothing_but_a_format_error(name: str, data: st.DataObject) -> None:
    image = bytearray(bzimage(PACKERS[name](SMALL)))
    spots = st.integers(0x1F1, len(image) - 1)
    for at in data.draw(st.lists(spots, min_size=1, max_size=8)):
        image[at] = data.draw(st.integers(0, 255))
    unpacks_or_refuses(bytes(image))


@UNHURRIED
@given(st.sampled_from([PACKERS[name](SMALL)[:6] for name in PACKERS]), st.binary(max_size=400))
def test_random_payloads_raise_nothing_but_a_format_error(magic: bytes, rest: bytes) -> None:
    unpacks_or_refuses(bzimage(magic + rest))
