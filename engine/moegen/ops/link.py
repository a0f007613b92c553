"""Copies between the host and a device, in bulk: few and large, through memory that the device reaches by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moegen.schedule.step import Ints

_ALIGNMENT = 64  # bytes, of each tensor in a buffer


class _Staging:
    """Page-locked memory of the host (plain memory where the device is the host), which grows as it is asked for more.

    On a GPU a copy from here is still under way when the call that asked for it has returned: `reserve` waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._copied: Any = None  # the event after the last copy

    def reserve(self, like: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[torch.Tensor]:
        """A tensor of each shape and dtype, none initialised; those of the call before are lost."""
        if self._copied is not None:
            self._copied.synchronize()
        sizes = [int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in like]
        places = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]).tolist()
        if places[-1] > len(self._memory):
            locked = self._device.type == "cuda"
            # Page-locked memory is handed out in powers of two: so is all of what is paid for used.
            self._memory = torch.empty(1 << (places[-1] - 1).bit_length(), dtype=torch.uint8, pin_memory=locked)
        return [
            self._memory[place : place + size].view(dtype).view(*shape)
            for place, size, (shape, dtype) in zip(places, sizes, like, strict=False)
        ]

    def copying(self) -> None:
        """What was reserved is being copied from, by work that the device's current stream has been given."""
        if self._device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._device))


class Link:
    """Between the host and `device`. For one thread, on the device's current stream.

    Where `device` is the host itself, the same copies are made: nothing of what is handed over shares memory.

    Attributes:
        bytes_to_device: copied so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes_to_device = 0
        self._down = _Staging(device)
        self._up = [_Staging(device), _Staging(device)]  # one is filled while the other is copied from

    def to_host(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The tensors on the host, contiguous; lent until the next call."""
        there = self._down.reserve([(tensor.shape, tensor.dtype) for tensor in tensors])
        for mine, tensor in zip(there, tensors, strict=True):
            mine.copy_(tensor, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return there

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device."""
        staging = self._next_up()
        (mine,) = staging.reserve([(tensor.shape, tensor.dtype)])
        mine.copy_(tensor)
        return self._sent(staging, [mine])[0]

    def rows_to_device(self, tables: Sequence[torch.Tensor], ids_N: Ints) -> list[torch.Tensor]:
        """Rows `ids` of each table (`[rows, ...]`, on the host), gathered by the host's cores: `[N, ...]` each."""
        staging, ids = self._next_up(), torch.from_numpy(ids_N)
        mine = staging.reserve([((len(ids_N), *table.shape[1:]), table.dtype) for table in tables])
        for rows, table in zip(mine, tables, strict=True):
            torch.index_select(table, 0, ids, out=rows)
        return self._sent(staging, mine)

    def _next_up(self) -> _Staging:
        self._up.reverse()
        return self._up[0]

    def _sent(self, staging: _Staging, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        there = [torch.empty_like(tensor, device=self.device) for tensor in tensors]
        for theirs, tensor in zip(there, tensors, strict=True):
            theirs.copy_(tensor, non_blocking=True)
            self.bytes_to_device += tensor.nbytes
        staging.copying()
        return there
