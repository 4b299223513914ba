# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
import gzip
import lzma
import struct

import pytest

from lab import bzimage
from lab.cpio import BLOCK_BYTES, Archive


def test_archive_holds_a_file_with_its_parents_and_data() -> None:
    archive = Archive()
    archive.file("a/b", b"xyz", 0o755)

    data = archive.to_bytes()

    assert data.startswith(b"070701")
    assert data.index(b"a\0") < data.index(b"a/b\0") < data.index(b"xyz")
    assert b"TRAILER!!!\0" in data


def test_archive_is_padded_to_whole_blocks() -> None:
    archive = Archive()
    archive.symlink("link", "target")

    assert len(archive.to_bytes()) % BLOCK_BYTES == 0


def test_entries_start_at_multiples_of_four() -> None:
    archive = Archive()
    archive.file("f", b"12345")
    archive.file("g", b"")

    assert archive.to_bytes().index(b"070701", 6) % 4 == 0


def test_same_input_gives_the_same_archive() -> None:
    one, two = Archive(), Archive()
    one.char_device("dev/console", 5, 1)
    two.char_device("dev/console", 5, 1)

    assert one.to_bytes() == two.to_bytes()


def test_char_device_carries_its_numbers() -> None:
    archive = Archive()
    archive.char_device("c", 5, 1)

    fields = archive.to_bytes()[6 : 6 + 13 * 8]

    assert int(fields[9 * 8 : 10 * 8], 16) == 5
    assert int(fields[10 * 8 : 11 * 8], 16) == 1


def test_a_path_added_twice_is_refused() -> None:
    archive = Archive()
    archive.file("f", b"")

    with pytest.raises(ValueError, match="f: added twice"):
        archive.file("f", b"")


def test_a_directory_may_be_named_again() -> None:
    archive = Archive()
    archive.directory("d")
    archive.directory("d")

    assert archive.to_bytes().count(b"d\0") == 1


def bz_image(payload: bytes) -> bytes:
    """A boot sector, one setup sector, and a protected-mode part that begins with the payload."""
    image = bytearray(1024)
    image[bzimage.SETUP_SECTS_AT] = 1
    image[bzimage.HEADER_MAGIC_AT : bzimage.HEADER_MAGIC_AT + 4] = b"HdrS"
    struct.pack_into("<II", image, bzimage.PAYLOAD_AT, 0, len(payload))
    return bytes(image) + payload


def test_xz_payload_is_unpacked() -> None:
    elf = b"\x7fELF" + b"k" * 100
    assert bzimage.unpack(bz_image(lzma.compress(elf) + b"size")) == elf


def test_gzip_payload_is_unpacked() -> None:
    elf = b"\x7fELF" + b"k" * 100
    assert bzimage.unpack(bz_image(gzip.compress(elf) + b"size")) == elf


def test_payload_of_another_kind_is_left_packed() -> None:
    assert bzimage.unpack(bz_image(b"\x02\x21\x4c\x18 lz4 size")) is None


def test_file_that_is_no_bzimage_is_left_alone() -> None:
    assert bzimage.unpack(bytes(2048)) is None


def test_payload_that_is_no_elf_is_left_packed() -> None:
    assert bzimage.unpack(bz_image(gzip.compress(b"data") + b"size")) is None
