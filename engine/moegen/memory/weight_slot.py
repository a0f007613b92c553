"""Room for one piece of weights on the device, and the means of filling it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from moegen.memory.direct_read import DirectFiles, ReadBuffer
from moegen.memory.weight_home import Piece, pinned
from moegen.ops.coded_matrix import CodedMatrix
from moegen.ops.expert_weights import Counts, ExpertGroup, ExpertMatrix, PlainMatrix
from moegen.units import MIB

_COPY_BYTES = 64 * MIB  # of one copy from the host's slab, about: a millisecond, so that asking for it costs nothing


class Work(Protocol):
    """A part of bringing a piece into a slot."""

    @property
    def nbytes(self) -> int:
        """What it moves."""
        ...

    @property
    def experts(self) -> frozenset[int]:
        """Whose weights, by their numbers in the layer."""
        ...

    def read_into(self, group: ExpertGroup, files: DirectFiles, buffer: ReadBuffer) -> None:
        """Moves them."""
        ...


@dataclass(frozen=True, slots=True)
class HostCopy:
    """Some experts of a piece, from the host's slab."""

    home: ExpertGroup
    part: slice  # of the home's experts

    @classmethod
    def all_of(cls, home: ExpertGroup) -> Iterator[HostCopy]:
        step = max(1, _COPY_BYTES * home.experts // home.nbytes)
        return (cls(home, slice(at, min(at + step, home.experts))) for at in range(0, home.experts, step))

    @property
    def nbytes(self) -> int:
        return self.home.nbytes * (self.part.stop - self.part.start) // self.home.experts

    @property
    def experts(self) -> frozenset[int]:
        return frozenset(range(self.home.first + self.part.start, self.home.first + self.part.stop))

    def read_into(self, group: ExpertGroup, files: DirectFiles, buffer: ReadBuffer) -> None:
        for slot, home in ((group.up, self.home.up), (group.down, self.home.down)):
            assert isinstance(slot, PlainMatrix | CodedMatrix)
            assert isinstance(home, PlainMatrix | CodedMatrix)
            for own, other in zip(slot.tensors, home.tensors, strict=True):
                own[self.part].copy_(other[self.part], non_blocking=True)


class Slot:
    """Matrices on the device, as many as the largest piece has."""

    def __init__(self, group: ExpertGroup) -> None:
        self._group = group
        self._free_since: Any = None  # on a GPU: the event after the last kernel that read from here

    @property
    def nbytes(self) -> int:
        return self._group.nbytes

    def group(self, piece: Piece) -> ExpertGroup:
        """The matrices under the numbers of the piece's experts."""
        return ExpertGroup(
            piece.first, first_of(self._group.up, piece.experts), first_of(self._group.down, piece.experts)
        )

    def whole(self, piece: Piece) -> ExpertGroup:
        """As `group`, to be filled."""
        return ExpertGroup(piece.first, self._group.up, self._group.down)

    def release(self, device: torch.device) -> None:
        """What was asked of the device so far may still read from here; what comes later does not."""
        if device.type == "cuda":
            self._free_since = torch.cuda.Event()
            self._free_since.record(torch.cuda.current_stream(device))

    def wait(self, stream: Any) -> None:
        """Lets `stream` go on only when nothing on the device reads from here."""
        if self._free_since is not None:
            stream.wait_event(self._free_since)


class SlotReader:
    """One thread's means of filling slots: a buffer to read into, and on a GPU a stream to copy on."""

    def __init__(self, files: DirectFiles, buffer_bytes: int, device: torch.device) -> None:
        self._files, self._buffer = files, ReadBuffer(buffer_bytes)
        self._pins = ExitStack()
        self._stream = None
        if device.type == "cuda":
            self._pins.enter_context(pinned(self._buffer.bytes))
            self._stream = torch.cuda.Stream(device)

    def close(self) -> None:
        self._pins.close()

    def do(self, work: Work, slot: Slot, piece: Piece) -> None:
        """Returns when the slot has what `work` brings. Raises `StorageError` when the disk or the file fails."""
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            slot.wait(self._stream)
            work.read_into(slot.whole(piece), self._files, self._buffer)
        if self._stream is not None:
            self._stream.synchronize()


@dataclass(eq=False)
class Fill:
    """What a slot holds, or will hold."""

    piece: Piece
    slot: Slot
    works: deque[Work]  # not begun
    running: int = 0  # works that have begun and not ended
    lent: bool = False
    partial: bool = False  # experts were left out: good for one use only
    error: BaseException | None = None

    @property
    def settled(self) -> bool:
        """There, or failed."""
        return not self.works and not self.running

    def leave_out_unused(self, used: Collection[int]) -> None:
        """Gives up works, of those that have not begun, that bring none of these experts."""
        needed = deque(work for work in self.works if not work.experts.isdisjoint(used))
        self.partial |= len(needed) < len(self.works)
        self.works = needed

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self.works.clear()


class _First:
    """The first experts of a larger matrix."""

    def __init__(self, matrix: ExpertMatrix, experts: int) -> None:
        self.experts, self.out_features, self.in_features = experts, matrix.out_features, matrix.in_features
        self._matrix, self.row_dtype = matrix, matrix.row_dtype
        self.place, self.place_transposed, self.lay_out = matrix.place, matrix.place_transposed, matrix.lay_out

    @property
    def nbytes(self) -> int:
        return self._matrix.nbytes * self.experts // self._matrix.experts

    def linear(self, x_TI: torch.Tensor, counts: Counts, tokens_S: torch.Tensor | None = None) -> torch.Tensor:
        return self._matrix.linear(x_TI, self._all(counts), tokens_S)

    def gated(
        self, x_TI: torch.Tensor, counts: Counts, tokens_S: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor | None:
        return self._matrix.gated(x_TI, self._all(counts), tokens_S, dtype)

    def add_to(
        self, out_TO: torch.Tensor, x_SI: torch.Tensor, counts: Counts, tokens_S: torch.Tensor,
        weights_S: torch.Tensor, *, anew: bool,
    ) -> bool:  # fmt: skip
        return self._matrix.add_to(out_TO, x_SI, self._all(counts), tokens_S, weights_S, anew=anew)

    def _all(self, counts: Counts) -> Counts:
        return np.append(counts, np.zeros(self._matrix.experts - self.experts, np.int64))


def first_of(matrix: ExpertMatrix, experts: int) -> ExpertMatrix:
    """The first `experts` of a matrix, over the same memory."""
    return matrix if experts == matrix.experts else _First(matrix, experts)
