"""Where keys and values live: per layer, one tensor of pages for keys and one for values."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moegen.ops.kv_pages import LayerPages


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one layer keeps per token."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def elements_per_token(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


class KVPool:
    """Pages of every layer, under whatever names the layer. A page id means the same tokens in each of them."""

    def __init__(
        self, shapes: Mapping[Any, KVShape], pages: int, page_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layers = {
            layer: LayerPages(
                _pages((pages, shape.kv_heads, page_tokens, shape.key_dim), dtype, device),
                _pages((pages, shape.kv_heads, page_tokens, shape.value_dim), dtype, device),
            )
            for layer, shape in shapes.items()
        }
        self.bytes_per_token = sum(shape.elements_per_token for shape in shapes.values()) * dtype.itemsize


def _pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Not zeroed: only what was written is ever read, and untouched pages cost the host no memory.

    On a Linux host in huge pages of the operating system, where it has them: a sequence's pages lie anywhere, and with
    small ones attention waits for address translation at each of them.
    """
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    elements = math.prod(shape)
    memory = mmap.mmap(-1, max(elements * dtype.itemsize, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=elements).view(shape)
