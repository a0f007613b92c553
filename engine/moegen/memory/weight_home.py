"""Where expert weights live between passes: on the device that multiplies, in the host's slab, or on disk.

A layer's experts are cut into pieces of consecutive ones, and each piece has one home. What stays on a GPU is not kept
on the host as well; what is read from disk has no second copy anywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from moegen.coding import Coding
from moegen.errors import BudgetError
from moegen.memory.direct_read import DirectFiles, ReadBuffer
from moegen.memory.read_request import ReadRequest
from moegen.memory.stored_experts import ExpertSource, StoredProjection
from moegen.ops.coded_matrix import CodedMatrix, Empty
from moegen.ops.expert_weights import ExpertGroup, ExpertMatrix, PlainMatrix, expert_matrix
from moegen.ops.host_memory import host_zeros
from moegen.ops.threads import use_threads
from moegen.units import format_bytes

_ALIGNED = 64  # bytes; where tensors of the slab begin


@dataclass(frozen=True, slots=True)
class Piece:
    """Experts `first .. first + experts` of one layer: what moves at once."""

    layer: str  # the name of its experts module
    first: int
    experts: int


def cut_layer(layer: str, experts: int, group_experts: int) -> tuple[Piece, ...]:
    """A layer's pieces, in order; the last may have fewer experts."""
    return tuple(Piece(layer, first, min(group_experts, experts - first)) for first in range(0, experts, group_experts))


@dataclass(frozen=True)
class Arithmetic:
    """Where experts are multiplied and in which dtypes: what decides the form of their matrices."""

    device: torch.device
    dtype: torch.dtype  # of the products
    expert_dtype: torch.dtype | None = None  # of the weights in memory, where the form leaves a choice; None: as stored
    compress_to: Coding | None = None  # what plain weights become when they are placed
    rounded: bool = False  # see `PanelMatrix`

    def empty_group(self, source: ExpertSource, first: int, experts: int) -> ExpertGroup:
        """Where they are multiplied."""

        def empty(projection: StoredProjection) -> ExpertMatrix:
            features = (projection.out_features, projection.in_features)
            coding = self.coding_of(projection)
            if coding is not None:
                return CodedMatrix(experts, *features, coding, self.dtype, self._zeros)
            stored = self.expert_dtype or projection.dtype
            return expert_matrix(experts, *features, stored, self.dtype, self.device, self.rounded)

        return ExpertGroup(first, empty(source.up), empty(source.down))

    def coding_of(self, projection: StoredProjection) -> Coding | None:
        """Of its matrices in memory."""
        return projection.coding or self.compress_to

    def slab_group(self, source: ExpertSource, piece: Piece, empty: Empty) -> ExpertGroup:
        """On the host, in the form in which it is copied to the device: over tensors that `empty` makes."""

        def of(projection: StoredProjection) -> ExpertMatrix:
            features = (piece.experts, projection.out_features, projection.in_features)
            coding = self.coding_of(projection)
            if coding is not None:
                return CodedMatrix(*features, coding, self.dtype, empty)
            return PlainMatrix(empty(features, self.dtype))

        return ExpertGroup(piece.first, of(source.up), of(source.down))

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self.device.type == "cpu":
            return host_zeros(shape, dtype)
        return torch.zeros(shape, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class WeightHomes:
    """Every piece of a model in one of three homes. Use as a context manager; the slab is unpinned after it."""

    arithmetic: Arithmetic
    sources: Mapping[str, ExpertSource]
    pieces: dict[str, tuple[Piece, ...]] = field(default_factory=dict)  # of each layer, in order
    device: dict[Piece, ExpertGroup] = field(default_factory=dict)
    host: dict[Piece, ExpertGroup] = field(default_factory=dict)  # only when the device is a GPU
    disk: dict[Piece, tuple[ReadRequest, ...]] = field(default_factory=dict)
    _pins: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> WeightHomes:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pins.close()

    @classmethod
    def settle(
        cls, sources: Mapping[str, ExpertSource], files: DirectFiles, arithmetic: Arithmetic, *, group_experts: int,
        resident_groups: int, host_groups: int = 0, readers: int = 1,
    ) -> WeightHomes:  # fmt: skip
        """In every layer the first `resident_groups` go to the device, the next `host_groups` to the host's slab.

        The rest stays on disk. Layers whose experts cannot be read in parts go to the device whole.

        Raises:
            BudgetError: the host's slab cannot be made.
            StorageError: the disk or a file fails.
        """
        homes = cls(arithmetic, sources)
        slab: list[Piece] = []
        for layer, source in sources.items():
            pieces = homes.pieces[layer] = cut_layer(layer, source.experts, group_experts)
            resident = resident_groups if source.addressable else len(pieces)
            for piece in pieces[:resident]:
                homes.device[piece] = arithmetic.empty_group(source, piece.first, piece.experts)
            slab += pieces[resident : resident + host_groups]
            for piece in pieces[resident + host_groups :]:
                homes.disk[piece] = source.requests(piece.first, piece.experts)
        with ExitStack() as undo:
            undo.push(homes)
            homes._make_slab(slab)
            homes._fill(files, readers)
            undo.pop_all()
        return homes

    @property
    def streamed(self) -> tuple[Piece, ...]:
        """What comes to the device in every pass, in the order in which layers meet it."""
        return tuple(piece for pieces in self.pieces.values() for piece in pieces if piece not in self.device)

    def _make_slab(self, pieces: list[Piece]) -> None:
        """Empty groups in one allocation, registered once: pinning each tensor would round it to a power of two."""
        wanted = _Slab(None)
        for piece in pieces:
            self.arithmetic.slab_group(self.sources[piece.layer], piece, wanted.empty)
        memory = host_zeros((wanted.used,), torch.uint8)
        if pieces and self.arithmetic.device.type == "cuda":
            self._pins.enter_context(pinned(memory))
        slab = _Slab(memory)
        for piece in pieces:
            self.host[piece] = self.arithmetic.slab_group(self.sources[piece.layer], piece, slab.empty)

    def _fill(self, files: DirectFiles, readers: int) -> None:
        groups = {**self.device, **self.host}
        whole = {piece.layer for piece in groups if not self.sources[piece.layer].addressable}
        for layer in whole:
            self.sources[layer].load_whole(group for piece, group in groups.items() if piece.layer == layer)
        reads = (
            (group, request)
            for piece, group in groups.items()
            if piece.layer not in whole
            for request in self.sources[piece.layer].requests(piece.first, piece.experts)
        )
        read_all(reads, files, readers)


def read_all(reads: Iterable[tuple[ExpertGroup, ReadRequest]], files: DirectFiles, readers: int) -> None:
    """Reads everything with `readers` threads. Raises `StorageError` when the disk or a file fails."""
    own = threading.local()

    def read(item: tuple[ExpertGroup, ReadRequest]) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = ReadBuffer()
        group, request = item
        request.read_into(group, files, own.buffer)

    with ThreadPoolExecutor(readers, "moegen-load", use_threads, (1,)) as pool:
        for _ in pool.map(read, reads):
            pass


class _Slab:
    """Tensors one after the other in one piece of memory; without memory, only their sizes are added up."""

    def __init__(self, memory: torch.Tensor | None) -> None:
        self._memory, self.used = memory, 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        start = self.used
        self.used += -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGNED) * _ALIGNED
        if self._memory is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._memory[start : start + size].view(dtype).view(shape)


@contextmanager
def pinned(memory: torch.Tensor) -> Iterator[None]:
    """Copies between `memory` and the device are direct and asynchronous inside.

    Raises:
        BudgetError: the driver refuses.
    """
    driver = torch.cuda.cudart()
    status = int(driver.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if status:
        raise BudgetError(
            f"engine.host_memory: the driver cannot lock {format_bytes(memory.nbytes)} of host memory "
            f"(error {status}); give the engine less, or raise the limit on locked memory (ulimit -l)"
        )
    try:
        yield
    finally:
        driver.cudaHostUnregister(memory.data_ptr())
