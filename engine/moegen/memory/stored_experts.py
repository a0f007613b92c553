"""Where a checkpoint keeps its experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from itertools import chain

import torch

from moegen.coding import Coding
from moegen.memory.direct_read import READ_BYTES
from moegen.memory.read_request import Part, ReadRequest, coalesced
from moegen.memory.stored_rows import CodedRows, Rows, StoredRows, rows_by_expert
from moegen.memory.traced import Read, Traced
from moegen.ops.expert_weights import ExpertGroup

_AS_STORED = {torch.float32, torch.bfloat16, torch.float16}  # other dtypes are converted before they are placed


@dataclass(frozen=True)
class StoredProjection:
    """One projection of all experts of a layer.

    Attributes:
        dtype: as stored; of several, one that holds them all; without `rows`, the one that was asked for.
        rows: per expert where its rows lie; None when more has to be done than to move rows of usual dtypes.
    """

    experts: int
    out_features: int
    in_features: int
    dtype: torch.dtype
    rows: tuple[tuple[Rows, ...], ...] | None
    coding: Coding | None = None  # of elements that are stored as codes, and kept so

    @classmethod
    def of(cls, weight_EOI: Traced) -> StoredProjection:
        """From a traced parameter."""
        rows = rows_by_expert(weight_EOI)
        parts = list(chain.from_iterable(rows or ()))
        experts, out_features, in_features = weight_EOI.shape
        coded = [part for part in parts if isinstance(part, CodedRows)]
        if coded and len(coded) == len(parts) and len({part.tensor.coding for part in coded}) == 1:
            return cls(experts, out_features, in_features, weight_EOI.dtype, rows, coded[0].tensor.coding)
        dtypes = {part.dtype for part in parts if isinstance(part, StoredRows)}
        movable = bool(dtypes) and dtypes <= _AS_STORED and not coded
        dtype = reduce(torch.promote_types, dtypes) if movable else weight_EOI.dtype
        return cls(experts, out_features, in_features, dtype, rows if movable else None)

    @property
    def expert_elements(self) -> int:
        return self.out_features * self.in_features

    @property
    def expert_nbytes(self) -> int:
        """Stored bytes of one expert."""
        if self.rows is not None and self.coding is not None:
            return sum(part.nbytes for part in self.rows[0])
        return self.expert_elements * self.dtype.itemsize


@dataclass(frozen=True)
class ExpertSource:
    """Where one layer's experts are stored: both projections of each."""

    up: StoredProjection  # gate_up_proj, or up_proj of experts without a gate
    down: StoredProjection
    _whole: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None  # where they cannot be read in parts

    @classmethod
    def of(cls, up_EOI: Traced, down_EOI: Traced, read: Read) -> ExpertSource:
        """From two traced parameters; `read` is kept as long as the source is, only if they have to be converted."""
        up, down = StoredProjection.of(up_EOI), StoredProjection.of(down_EOI)
        in_parts = up.rows is not None and down.rows is not None
        return cls(up, down, None if in_parts else lambda: (up_EOI.realise(read), down_EOI.realise(read)))

    @property
    def experts(self) -> int:
        return self.up.experts

    @property
    def expert_elements(self) -> int:
        return self.up.expert_elements + self.down.expert_elements

    @property
    def addressable(self) -> bool:
        """Whether some of the experts can be read without the others; if not, they have to stay resident."""
        return self._whole is None

    def nbytes(self, experts: int) -> int:
        """Stored bytes of so many experts."""
        return experts * (self.up.expert_nbytes + self.down.expert_nbytes)

    def requests(self, first: int, experts: int) -> tuple[ReadRequest, ...]:
        """The reads that bring experts `first .. first + experts`, in the order of the files.

        Raises:
            ValueError: they are not addressable.
        """
        if self.up.rows is None or self.down.rows is None:
            raise ValueError("these experts can only be loaded whole: see ExpertSource.addressable")
        parts = (
            Part(is_up, piece)
            for is_up, projection in ((True, self.up.rows), (False, self.down.rows))
            for rows in chain.from_iterable(projection[first : first + experts])
            for piece in rows.cut(READ_BYTES)
        )
        return tuple(coalesced(parts))

    def load_whole(self, groups: Iterable[ExpertGroup]) -> None:
        """Fills this layer's groups where it is not addressable; takes the memory of the layer once more meanwhile."""
        assert self._whole is not None
        up_EOI, down_EOI = self._whole()
        for group in groups:
            for expert in range(group.experts):
                group.up.place(expert, 0, up_EOI[group.first + expert].contiguous())
                group.down.place(expert, 0, down_EOI[group.first + expert].contiguous())
