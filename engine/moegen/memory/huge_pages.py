"""Large pieces of memory, on a Linux host in huge pages of the operating system, where it has them."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch


def empty_in_huge_pages(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Not zeroed: only what was written is ever read, and untouched pages cost the host no memory.

    With small ones, attention over pages that lie anywhere waits for address translation at each of them, and a driver
    that is to lock the memory for its device has 512 times as many to visit.
    """
    elements = math.prod(shape)
    if device.type != "cpu" or not elements or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(*shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=elements).view(*shape)
