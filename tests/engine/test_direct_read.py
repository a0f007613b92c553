"""Byte ranges through O_DIRECT and around it: exact bytes, short reads continued, errors that say where."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from moegen.errors import StorageError
from moegen.memory import direct_read
from moegen.memory.direct_read import ALIGNMENT, DirectFile, DirectFiles, ReadBuffer

SIZE = 5 * ALIGNMENT + 1234


@pytest.fixture
def data() -> bytes:
    return random.Random(3).randbytes(SIZE)


@pytest.fixture
def path(tmp_path: Path, data: bytes) -> Path:
    file = tmp_path / "weights.bin"
    file.write_bytes(data)
    return file


@pytest.fixture(params=["direct", "refused by open", "refused by read"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """File systems without O_DIRECT, by what the kernel would answer."""
    refused = OSError(errno.EINVAL, "Invalid argument")
    real_open, real_read = os.open, os.preadv
    direct: set[int] = set()

    def open_(name: str, flags: int) -> int:
        if flags & os.O_DIRECT and request.param == "refused by open":
            raise refused
        fd = real_open(name, flags)
        direct.discard(fd)
        if flags & os.O_DIRECT:
            direct.add(fd)
        return fd

    def preadv(fd: int, into: list[memoryview], offset: int) -> int:
        if fd in direct and request.param == "refused by read":
            raise refused
        return real_read(fd, into, offset)

    monkeypatch.setattr(direct_read.os, "open", open_)
    monkeypatch.setattr(direct_read.os, "preadv", preadv)
    return request.param


def ranges(size: int) -> list[tuple[int, int]]:
    dice = random.Random(5)
    edges = (0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, size - ALIGNMENT, size - 1)
    starts = [*edges, *(dice.randrange(size) for _ in range(40))]
    return [(start, dice.randint(1, size - start)) for start in starts] + [(0, size), (size - 1, 1), (7, 0)]


def test_any_range_is_exact(path: Path, data: bytes, way: str) -> None:
    buffer = ReadBuffer()
    with DirectFile(path) as file:
        assert file.direct == (way == "direct")
        for start, nbytes in ranges(SIZE):
            assert bytes(file.read(start, nbytes, buffer).numpy()) == data[start : start + nbytes], (start, nbytes)


def test_short_reads_are_continued(path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    real, dice = os.preadv, random.Random(9)

    def short(fd: int, into: list[memoryview], offset: int) -> int:
        whole = real(fd, into, offset)
        if whole <= ALIGNMENT:
            return whole
        kept = dice.randint(ALIGNMENT, whole)
        into[0][kept:whole] = bytes(whole - kept)  # what was not delivered is not there
        return kept

    monkeypatch.setattr(direct_read.os, "preadv", short)
    with DirectFile(path) as file:
        for start, nbytes in ranges(SIZE):
            assert bytes(file.read(start, nbytes, ReadBuffer()).numpy()) == data[start : start + nbytes]


@pytest.mark.parametrize("kept", [0, 1, ALIGNMENT, 2 * ALIGNMENT + 5])
def test_a_file_cut_after_it_was_opened_is_named(path: Path, way: str, kept: int) -> None:
    with DirectFile(path) as file:
        os.truncate(path, kept)
        with pytest.raises(StorageError, match=rf"weights\.bin: ends at byte {kept} where {SIZE} .* run the job again"):
            file.read(100, SIZE - 100, ReadBuffer())


def test_a_failing_disk_is_named_with_its_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DirectFile(path) as file:

        def broken(fd: int, into: list[memoryview], offset: int) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(direct_read.os, "preadv", broken)
        with pytest.raises(
            StorageError, match=r"weights\.bin: cannot be read at byte 4096: Input/output error.*resumes"
        ):
            file.read(5000, 10, ReadBuffer())


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone\.bin: cannot be opened: No such file"):
        DirectFile(tmp_path / "gone.bin")


def test_threads_share_a_file(path: Path, data: bytes) -> None:
    def read(item: tuple[int, int]) -> bool:
        start, nbytes = item
        return bytes(files.read(str(path), start, nbytes, ReadBuffer()).numpy()) == data[start : start + nbytes]

    with DirectFiles() as files, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, ranges(SIZE) * 5))


def test_the_page_cache_is_left_alone(tmp_path: Path, resident_bytes: Callable[[Path], int]) -> None:
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.write(bytes(16 << 20))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = resident_bytes(path)
    assert before < 1 << 20, "nothing to tell from: the file stays cached by itself"
    with DirectFile(path) as file:
        file.read(0, 16 << 20, ReadBuffer())
    assert resident_bytes(path) <= before + ALIGNMENT


@pytest.fixture
def resident_bytes() -> Callable[[Path], int]:
    """How much of a file is in the page cache, as the kernel says."""
    import ctypes
    import mmap

    libc = ctypes.CDLL(None, use_errno=True)

    def count(path: Path) -> int:
        size = path.stat().st_size
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as memory,
        ):
            address = ctypes.addressof(ctypes.c_ubyte.from_buffer(memory))
            assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0, ctypes.get_errno()
        return sum(page & 1 for page in pages) * mmap.PAGESIZE

    return count
