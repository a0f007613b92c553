"""Host memory without waiting for the operating system: large tensors on its huge pages, freed ones kept for the next,
memory found before it is needed.

With small pages a kernel that reads weights or KV pages from all over the memory waits for address translation, and a
driver that is to lock memory for its device has 512 times as many to visit. And a pass makes and frees gigabytes of
activations, which are faulted in anew, page by page, if they went back in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch


def host_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that cost no memory until they are touched."""
    elements = math.prod(shape)
    if not elements or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=elements).view(shape)


_MADV_POPULATE_WRITE = 23  # Linux 5.14
_AT_ONCE = 32 << 20


def make_present(tensors: Iterable[torch.Tensor], threads: int) -> None:
    """Has the operating system find memory for them now, where it can be asked to; what is in them stays.

    Else it is found where they are first touched. On a virtual machine, whose host has to find it too, that has been
    seen to take fifty times as long.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # no Linux
        return
    blocks = [
        (address, min(_AT_ONCE, end - address))
        for tensor in tensors
        for end in [tensor.data_ptr() + tensor.nbytes]
        for address in range(tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, end, _AT_ONCE)
    ]
    with contextlib.suppress(OSError, AttributeError), ThreadPoolExecutor(threads) as pool:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        for _ in pool.map(lambda block: madvise(*block, _MADV_POPULATE_WRITE), blocks):
            pass  # where it refuses, it has done nothing


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_KEPT = 32 << 20  # the most that glibc allows
_KEPT = 1 << 30


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed, tensors of up to 32 MiB each and a GiB of them, if it is one that can."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
