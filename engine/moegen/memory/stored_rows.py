"""Rows of expert matrices, where the files have them.

An expert's matrix is `[out_features, in_features]`, as `moegen.ops.expert_weights` has it. In the files it lies whole
or in blocks of rows (gate and up apart), one expert to a tensor or all in one, as it is or transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from moegen.coding import CodedTensor
from moegen.memory.coded_rows import CodedRows, coded_rows_of
from moegen.memory.traced import DTYPES, Block, Traced
from moegen.ops.expert_weights import ExpertMatrix

_ROWS_TOGETHER = 64  # rows are cut at multiples of this, so that no panel of a matrix is written by two readers


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows `first_row .. first_row + rows` of one expert's matrix, consecutive in a file from byte `start` on."""

    expert: int
    first_row: int
    rows: int
    columns: int
    file: str
    start: int
    dtype: torch.dtype
    transposed: bool  # stored as `[columns, rows]`

    @property
    def nbytes(self) -> int:
        return self.rows * self.columns * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    def cut(self, most_bytes: int) -> Iterator[StoredRows]:
        """In pieces of at most `most_bytes`, as far as rows allow; transposed ones in one piece."""
        row_bytes = self.columns * self.dtype.itemsize
        step = max(most_bytes // row_bytes // _ROWS_TOGETHER, 1) * _ROWS_TOGETHER
        if self.transposed or self.rows <= step:
            yield self
            return
        for done in range(0, self.rows, step):
            yield replace(
                self,
                first_row=self.first_row + done,
                rows=min(step, self.rows - done),
                start=self.start + done * row_bytes,
            )

    def place(self, data: torch.Tensor, matrix: ExpertMatrix, first_expert: int) -> None:
        """Puts the bytes `data` (`[nbytes]` uint8) into `matrix`, whose expert 0 is the layer's `first_expert`."""
        if data.storage_offset() % self.dtype.itemsize:
            data = data.clone()  # a file whose header is no multiple of the element size
        values = data.view(self.dtype)
        expert = self.expert - first_expert
        if not self.transposed:
            matrix.place(expert, self.first_row, values.view(self.rows, self.columns))
        elif self.rows == matrix.out_features:
            matrix.place_transposed(expert, values.view(self.columns, self.rows))
        else:
            matrix.place(expert, self.first_row, values.view(self.columns, self.rows).T.contiguous())


Rows = StoredRows | CodedRows


def rows_by_expert(weight_EOI: Traced) -> tuple[tuple[Rows, ...], ...] | None:
    """Where the rows of every expert lie, if each block of them is one run of bytes (or one for each part of a coded
    tensor); else None."""
    if weight_EOI.blocks is None:
        return None
    experts, _, in_features = weight_EOI.shape
    found: list[list[Rows]] = [[] for _ in range(experts)]
    for block in weight_EOI.blocks:
        for expert in range(block.origin[0], block.origin[0] + block.shape[0]):
            rows = _rows_of(block, expert, in_features)
            if rows is None:
                return None
            found[expert].extend(rows)
    return tuple(map(tuple, found))


def _rows_of(block: Block, expert: int, in_features: int) -> tuple[Rows, ...] | None:
    if isinstance(block.stored, CodedTensor):
        return coded_rows_of(block, expert, in_features)
    _, rows, columns = block.shape
    _, row_stride, column_stride = block.strides
    plain, transposed = (row_stride, column_stride) == (columns, 1), (row_stride, column_stride) == (1, rows)
    if columns != in_features or not (plain or transposed):
        return None
    stored, dtype = block.stored, DTYPES[block.stored.dtype]
    start = block.start + (expert - block.origin[0]) * block.strides[0]
    found = StoredRows(
        expert=expert,
        first_row=block.origin[1],
        rows=rows,
        columns=columns,
        file=stored.uri,
        start=stored.start + start * dtype.itemsize,
        dtype=dtype,
        transposed=not plain,
    )
    return (found,)
