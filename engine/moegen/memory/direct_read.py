"""Byte ranges of local files, read around the page cache.

What is streamed is read once a pass, in a cycle longer than memory: caching it would only push out what is needed. So
files are read with O_DIRECT into aligned buffers; where a file system has no O_DIRECT, they are read through the cache
and dropped from it at once. Reading releases the interpreter's lock.
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import torch

from moegen.errors import StorageError
from moegen.units import MIB

ALIGNMENT = 4096  # bytes; of offsets, lengths and memory in direct reads: what any block device is content with
READ_BYTES = 8 * MIB  # of one request: large enough for the rate of any disk
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only


class ReadBuffer:
    """Aligned memory that one thread reads into: room for `nbytes` from any place of a file, or it grows."""

    def __init__(self, nbytes: int = 0) -> None:
        self._grow(nbytes + 2 * ALIGNMENT)  # what is read begins and ends with whole blocks

    def _grow(self, nbytes: int) -> None:
        self.memory = mmap.mmap(-1, nbytes)  # whole pages, so aligned
        self.view = memoryview(self.memory)
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)

    def reserve(self, nbytes: int) -> None:
        """Makes room for `nbytes`; what was in the buffer is lost when it has to grow."""
        if nbytes > len(self.memory):
            self._grow(nbytes)


class DirectFile:
    """One open file. Several threads may read at once, each into its own buffer.

    Attributes:
        direct: whether the page cache is left out; else it is used, and what was read is dropped from it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            self._fd, self.direct = _open(self.path)
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be opened: {error.strerror}; check that the checkpoint is still there"
            ) from error

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)

    def read(self, start: int, nbytes: int, buffer: ReadBuffer) -> torch.Tensor:
        """Bytes `start .. start + nbytes` of the file, `[nbytes]` uint8, lent until the buffer's next read.

        Raises:
            StorageError: the device reports an error, or the file ends before.
        """
        skip = start % ALIGNMENT
        begin, needed = start - skip, skip + nbytes
        length = -(-needed // ALIGNMENT) * ALIGNMENT
        buffer.reserve(length)
        done = 0
        while done < needed:
            got = self._read_some(begin + done, buffer.view[done:length])
            reached = done + got
            if reached < needed:
                reached -= reached % ALIGNMENT  # a direct read can go on from whole blocks only
                if reached == done:
                    raise self._too_short(start + nbytes)
            done = reached
        if not self.direct:
            self._forget(begin, length)
        return buffer.bytes[skip:needed]

    def _read_some(self, offset: int, into: memoryview) -> int:
        try:
            return os.preadv(self._fd, [into], offset)
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be read at byte {offset}: {error.strerror}; once the disk is in order, run the "
                "job again: it resumes"
            ) from error

    def _too_short(self, wanted: int) -> StorageError:
        end = os.fstat(self._fd).st_size
        return StorageError(
            f"{self.path}: ends at byte {end} where {wanted} were promised when the job began; restore the file and "
            "run the job again: it resumes"
        )

    def _forget(self, start: int, nbytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, start, nbytes, os.POSIX_FADV_DONTNEED)


def _open(path: str) -> tuple[int, bool]:
    """A descriptor, and whether it reads directly: some file systems refuse to open so, others only to read."""
    if _DIRECT:
        try:
            fd = os.open(path, os.O_RDONLY | _DIRECT)
        except OSError:
            return os.open(path, os.O_RDONLY), False
        try:
            os.preadv(fd, [ReadBuffer().view], 0)
            return fd, True
        except OSError:
            os.close(fd)
    return os.open(path, os.O_RDONLY), False


class DirectFiles:
    """Files by path, each opened when it is first read and closed with the others."""

    def __init__(self) -> None:
        self._files: dict[str, DirectFile] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> DirectFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, path: str, start: int, nbytes: int, buffer: ReadBuffer) -> torch.Tensor:
        """See `DirectFile.read`."""
        return self._open(path).read(start, nbytes, buffer)

    def _open(self, path: str) -> DirectFile:
        with self._lock:
            if path not in self._files:
                self._files[path] = DirectFile(path)
            return self._files[path]
