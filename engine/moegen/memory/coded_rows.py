"""Runs of bytes that make coded expert matrices: codes, scales and zeros, where the files have them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from moegen.coding import CodedTensor
from moegen.memory.traced import DTYPES, Block
from moegen.ops.code_placing import PARTS, SCALE_DTYPES, Run
from moegen.ops.coded_matrix import CodedMatrix
from moegen.ops.expert_weights import ExpertMatrix
from moegen.ops.weight_codes import scales_of, zeros_of
from moegen.shape import StoredTensor

PartName = Literal["codes", "scales", "zeros"]


@dataclass(frozen=True, slots=True)
class CodedRows:
    """One part of rows `first_row .. first_row + rows` of one expert's matrix: bytes of a file from `start` on.

    Attributes:
        shape: of the run, in elements of the stored tensor's dtype.
    """

    expert: int
    first_row: int
    rows: int
    tensor: CodedTensor
    part: PartName
    stored: StoredTensor
    start: int
    shape: tuple[int, ...]

    @property
    def file(self) -> str:
        return self.stored.uri

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.stored.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.start + self.nbytes

    def cut(self, most_bytes: int) -> Iterator[CodedRows]:
        """In pieces of at most `most_bytes`, as far as rows allow; only codes that lie row after row are cut."""
        row_bytes = self.nbytes // max(self.rows, 1)
        step = max(most_bytes // max(row_bytes, 1), 1)
        if self.part != "codes" or self.tensor.coding.order != "rows" or self.rows <= step:
            yield self
            return
        for done in range(0, self.rows, step):
            rows = min(step, self.rows - done)
            yield replace(
                self,
                first_row=self.first_row + done,
                rows=rows,
                start=self.start + done * row_bytes,
                shape=(rows, *self.shape[1:]),
            )

    def run(self, start: int) -> Run:
        """It, in a read that begins at byte `start` of the file."""
        lines, line_elements = self.shape if self.shape else (1, 1)
        kind = SCALE_DTYPES[self.dtype] if self.part == "scales" else self.dtype.itemsize
        at = self.start - start
        return Run(PARTS[self.part], at, self.expert, self.first_row, self.rows, lines, line_elements, kind)

    def place(self, data: torch.Tensor, matrix: ExpertMatrix, first_expert: int) -> None:
        """Puts the bytes `data` (`[nbytes]` uint8) into `matrix`, whose expert 0 is the layer's `first_expert`."""
        assert isinstance(matrix, CodedMatrix)
        expert, coding = self.expert - first_expert, self.tensor.coding
        if data.storage_offset() % self.dtype.itemsize:
            data = data.clone()
        if self.part == "codes" and coding.order == "rows":
            matrix.place_codes(expert, self.first_row, data.view(self.rows, -1))
            return
        stored = data.view(self.dtype).view(self.shape)
        if self.part == "codes":
            matrix.place_codes(expert, self.first_row, stored)
        elif self.part == "scales":
            matrix.place_scales(expert, self.first_row, scales_of(stored, coding, self.rows))
        else:
            matrix.place_zeros(expert, self.first_row, zeros_of(stored, coding))


def coded_rows_of(block: Block, expert: int, in_features: int) -> tuple[CodedRows, ...] | None:
    """The runs that make this block of an expert's matrix; None where they are no runs."""
    tensor = block.stored
    assert isinstance(tensor, CodedTensor)
    outputs, inputs = tensor.shape[-2:]
    _, rows, columns = block.shape
    start = block.start + (expert - block.origin[0]) * block.strides[0]
    number, first_output = start // (outputs * inputs), start % (outputs * inputs) // inputs
    whole_rows = columns == in_features == inputs and start % inputs == 0 and block.strides[1:] == (inputs, 1)
    of_words = tensor.coding.order != "rows"
    if not whole_rows or (of_words and rows != outputs) or first_output % tensor.coding.scale_rows:
        return None

    def run(part: PartName, stored: StoredTensor, row: int, shape: tuple[int, ...]) -> CodedRows:
        """`shape` from `row` on of the tensor of this expert's number."""
        itemsize, of_expert = DTYPES[stored.dtype].itemsize, torch.Size(stored.shape[-2:]).numel()
        if len(tensor.shape) == 3:  # all experts in one
            of_expert = torch.Size(stored.shape[1:]).numel()
        width = torch.Size(shape[1:]).numel()
        at = stored.start + (number * of_expert + row * width) * itemsize
        return CodedRows(expert, block.origin[1], rows, tensor, part, stored, at, shape)

    coding, scales = tensor.coding, tensor.scales
    if of_words:
        assert tensor.zeros is not None
        return (
            run("codes", tensor.codes, 0, tensor.codes.shape),
            run("scales", scales, 0, scales.shape),
            run("zeros", tensor.zeros, 0, tensor.zeros.shape),
        )
    row_elements = inputs * coding.bits // 8 // DTYPES[tensor.codes.dtype].itemsize
    first_scale = first_output // coding.scale_rows
    scale_rows = -(-(first_output + rows) // coding.scale_rows) - first_scale
    single = len(scales.shape) < 2
    scale_shape = scales.shape if single and not scales.shape else (scale_rows, 1 if single else scales.shape[-1])
    return (
        run("codes", tensor.codes, first_output, (rows, row_elements)),
        run("scales", scales, 0 if scale_shape == () else first_scale, scale_shape),
    )
