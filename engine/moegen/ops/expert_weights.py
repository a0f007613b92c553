"""Expert weights in the form in which the device multiplies them: panels on a CPU, plain matrices elsewhere.

Shape suffixes: E experts of the block, O output features, I input features, T tokens, S rows
sorted by expert.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from moegen.ops.expert_kernel import (
    PANEL,
    added_panels,
    grouped_gates,
    grouped_panels,
    joined_panels,
    panel_places,
    row_width,
)
from moegen.ops.host_memory import host_zeros
from moegen.ops.panel_packing import pack_rows, pack_transposed
from moegen.ops.threads import numba_threads
from moegen.ops.vector_ir import DOTS

UP = {True: "gate_up_proj", False: "up_proj"}  # the first projection of experts with and without a gate
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}  # as the kernel knows them
_PANELS_TO_SHARE = 8  # per thread, at least, if threads are to have panels of all experts: they are done together then

Counts = Sequence[int] | npt.NDArray[np.int64]  # [E] rows, or tokens, of each expert


class ExpertMatrix(Protocol):
    """One projection of several experts: E matrices of `[out_features, in_features]`."""

    experts: int
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        ...

    @property
    def row_dtype(self) -> torch.dtype:
        """Of the rows that `linear` reads."""
        ...

    def place(self, expert: int, first_row: int, rows_OI: torch.Tensor) -> None:
        """Sets output features `first_row ..` of one expert. Distinct rows may be placed by several threads."""
        ...

    def place_transposed(self, expert: int, matrix_IO: torch.Tensor) -> None:
        """Sets one expert's whole matrix from its transpose."""
        ...

    def lay_out(self, x_TI: torch.Tensor) -> torch.Tensor:
        """The same numbers as `linear` reads them best: what meets several groups or chunks is laid out once."""
        ...

    def linear(self, x_TI: torch.Tensor, counts: Counts, tokens_S: torch.Tensor | None = None) -> torch.Tensor:
        """`[S, O]`: the next `counts[e]` rows of `x[tokens]`, or of `x` itself, times expert e's matrix."""
        ...

    def gated(
        self, x_TI: torch.Tensor, counts: Counts, tokens_S: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """`[S, O / 2]` in `dtype`, as `laid_out` has it: `silu_gated` of what `linear` answers, to the same bits; None
        where both are not done at once."""
        ...

    def add_to(
        self, out_TO: torch.Tensor, x_SI: torch.Tensor, counts: Counts, tokens_S: torch.Tensor,
        weights_S: torch.Tensor, *, anew: bool,
    ) -> bool:  # fmt: skip
        """Adds `weights[s]` times what `linear(x, counts)` answers to `out[tokens[s]]`, one expert after another, to 0
        if `anew`; `out` is of `empty_rows`. False, and nothing added, where that is not done at once."""
        ...


class PanelMatrix:
    """In panels for `grouped_panels`: weights as stored (float32, bfloat16, float16), arithmetic in float32.

    With `rounded`, rows are rounded to bfloat16 where the weights are that too and the processor multiplies it.
    """

    def __init__(
        self, experts: int, out_features: int, in_features: int, dtype: torch.dtype, rounded: bool = False
    ) -> None:
        self.experts, self.out_features, self.in_features = experts, out_features, in_features
        self.dtype, self._pairs = dtype, rounded and DOTS and dtype == torch.bfloat16
        panels = -(-out_features // PANEL)
        self._places = panel_places(dtype == torch.bfloat16 and not self._pairs)
        # Zeros, as nothing is placed in the last panel's features beyond `out_features`.
        stored = (-(-in_features // 2), torch.int32) if self._pairs else (in_features, dtype)
        self._panels_ENIP = _bits(host_zeros((experts, panels, stored[0], PANEL), stored[1]))

    @property
    def nbytes(self) -> int:
        return self._panels_ENIP.nbytes

    @property
    def row_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self._pairs else torch.float32

    def place(self, expert: int, first_row: int, rows_OI: torch.Tensor) -> None:
        rows_OI = rows_OI.to(self.dtype)
        pack_rows(
            self._panels_ENIP[expert], first_row, _pairs(rows_OI) if self._pairs else _bits(rows_OI), self._places
        )

    def place_transposed(self, expert: int, matrix_IO: torch.Tensor) -> None:
        if self._pairs:
            self.place(expert, 0, matrix_IO.T)
        else:
            pack_transposed(self._panels_ENIP[expert], _bits(matrix_IO.to(self.dtype)), self._places)

    def unpacked(self, expert: int) -> torch.Tensor:
        """One expert's matrix as it was placed, `[O, I]`: a copy, made anew at every call."""
        features_NPI = torch.from_numpy(self._panels_ENIP[expert][:, :, self._places]).transpose(1, 2).contiguous()
        return features_NPI.view(self.dtype).flatten(0, 1)[: self.out_features, : self.in_features]

    def looked_up(self, expert: int, features_T: torch.Tensor) -> torch.Tensor:
        """`[T, I]`: some rows of one expert's matrix, as they were placed."""
        panels, within = np.divmod(features_T.numpy(), PANEL)
        rows_TI = torch.from_numpy(self._panels_ENIP[expert][panels, :, self._places[within]])
        return rows_TI.view(self.dtype)[:, : self.in_features]

    def lay_out(self, x_TI: torch.Tensor) -> torch.Tensor:
        return laid_out(x_TI, self.row_dtype)

    def linear(self, x_TI: torch.Tensor, counts: Counts, tokens_S: torch.Tensor | None = None) -> torch.Tensor:
        starts = starts_of(counts)
        tokens = np.arange(starts[-1]) if tokens_S is None else tokens_S.numpy()
        return self._product(x_TI, tokens, starts, row_width(self._panels_ENIP.shape[1] * PANEL))

    def gated(
        self, x_TI: torch.Tensor, counts: Counts, tokens_S: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor | None:
        if self.out_features % (2 * PANEL):
            return None
        starts = starts_of(counts)
        out_SF = _rows((len(tokens_S), self.out_features // 2), dtype)
        kind = np.uint16(0) if dtype == torch.bfloat16 else np.float32(0)
        threads = numba_threads()
        grouped_gates(
            self._as_multiplied(x_TI), tokens_S.numpy(), self._panels_ENIP, starts, kind, out_SF.data_ptr(),
            out_SF.stride(0) * out_SF.itemsize, threads,
        )  # fmt: skip
        return out_SF

    def add_to(
        self, out_TO: torch.Tensor, x_SI: torch.Tensor, counts: Counts, tokens_S: torch.Tensor,
        weights_S: torch.Tensor, *, anew: bool,
    ) -> bool:  # fmt: skip
        threads = numba_threads()
        if self.out_features % PANEL or self._panels_ENIP.shape[1] < _PANELS_TO_SHARE * threads:
            return False
        added_panels(
            self._as_multiplied(x_SI), tokens_S.numpy(), weights_S.numpy(), self._panels_ENIP, starts_of(counts), anew,
            with_gaps(out_TO).numpy(), threads,
        )  # fmt: skip
        return True

    def packed_linear(self, x_TI: torch.Tensor) -> torch.Tensor:
        """`linear` of all rows and the only matrix, with no gaps between the answer's rows where features are whole
        panels: as torch's own functions read them best."""
        tokens, starts = _in_order(x_TI.shape[0])
        return self._product(x_TI, tokens, starts, self._panels_ENIP.shape[1] * PANEL)

    def beside(self, features: Sequence[int]) -> list[PanelMatrix]:
        """The matrices, with so many output features each, of which this one is made; whole panels each."""
        parts, ends = [], np.cumsum(features) // PANEL
        for own, end in zip(features, ends, strict=True):
            part = copy.copy(self)
            part.out_features, part._panels_ENIP = own, self._panels_ENIP[:, end - own // PANEL : end]
            parts.append(part)
        return parts

    def packed_linears(self, x_TI: torch.Tensor, features: tuple[int, ...]) -> list[torch.Tensor]:
        """`packed_linear` of each of the matrices that it is made of, at once."""
        tokens, starts = _in_order(x_TI.shape[0])
        outs = [torch.empty(len(tokens), own) for own in features]
        threads = numba_threads()
        joined_panels(
            self._as_multiplied(x_TI), tokens, self._panels_ENIP, starts, np.array([out.data_ptr() for out in outs]),
            _first_panels(features), threads,
        )  # fmt: skip
        return outs

    def _product(self, x_TI: torch.Tensor, tokens_S: np.ndarray, starts_E1: np.ndarray, width: int) -> torch.Tensor:
        """The answer's rows lie `width` apart."""
        out_SO = torch.empty(len(tokens_S), width)
        threads = numba_threads()
        grouped_panels(self._as_multiplied(x_TI), tokens_S, self._panels_ENIP, starts_E1, out_SO.numpy(), threads)
        return out_SO[:, : self.out_features]

    def _as_multiplied(self, x_TI: torch.Tensor) -> np.ndarray:
        """Laid out, with the gaps between rows."""
        x = with_gaps(self.lay_out(x_TI))
        return (x.view(torch.int32) if self._pairs else x).numpy()


class PlainMatrix:
    """As torch multiplies them: over memory that is given, `[E, O, I]`."""

    def __init__(self, weight_EOI: torch.Tensor) -> None:
        self.experts, self.out_features, self.in_features = weight_EOI.shape
        self.weight_EOI = weight_EOI

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What a copy of it has to copy."""
        return (self.weight_EOI,)

    @property
    def nbytes(self) -> int:
        return self.weight_EOI.nbytes

    @property
    def row_dtype(self) -> torch.dtype:
        return self.weight_EOI.dtype

    def place(self, expert: int, first_row: int, rows_OI: torch.Tensor) -> None:
        self.weight_EOI[expert, first_row : first_row + rows_OI.shape[0]].copy_(rows_OI)

    def place_transposed(self, expert: int, matrix_IO: torch.Tensor) -> None:
        self.weight_EOI[expert].copy_(matrix_IO.T)

    def lay_out(self, x_TI: torch.Tensor) -> torch.Tensor:
        return x_TI

    def linear(self, x_TI: torch.Tensor, counts: Counts, tokens_S: torch.Tensor | None = None) -> torch.Tensor:
        x_SI = x_TI if tokens_S is None else x_TI[tokens_S]
        weight_EIO = self.weight_EOI.transpose(1, 2)
        if x_SI.dtype not in (torch.float32, torch.bfloat16):
            return torch.cat([x @ w for x, w in zip(x_SI.split(np.asarray(counts).tolist()), weight_EIO, strict=True)])
        offsets_E = torch.from_numpy(starts_of(counts)[1:]).to(x_SI.device, torch.int32)
        return F.grouped_mm(x_SI, weight_EIO, offs=offsets_E)

    def gated(
        self, x_TI: torch.Tensor, counts: Counts, tokens_S: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor | None:
        return None

    def add_to(
        self, out_TO: torch.Tensor, x_SI: torch.Tensor, counts: Counts, tokens_S: torch.Tensor,
        weights_S: torch.Tensor, *, anew: bool,
    ) -> bool:  # fmt: skip
        return False


def starts_of(counts: Counts) -> np.ndarray:
    """Where each expert's rows begin, and where the last one's end."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


@lru_cache(maxsize=8)
def _in_order(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel wants to know of so many rows, each of which meets the only matrix: asked for by every layer."""
    return np.arange(rows), np.array([0, rows])


@lru_cache
def _first_panels(features: tuple[int, ...]) -> np.ndarray:
    """Where the panels of matrices of whole panels begin that lie side by side, and where the last one's end."""
    return starts_of(features) // PANEL


def with_gaps(x_TI: torch.Tensor) -> torch.Tensor:
    """Rows as `laid_out` or a product made them, with what lies between them; rows without gaps as they are."""
    if x_TI.stride(1) != 1 or x_TI.stride(0) <= x_TI.shape[1]:
        return x_TI.contiguous()
    return x_TI.as_strided((x_TI.shape[0], x_TI.stride(0)), (x_TI.stride(0), 1))


def laid_out(x_TI: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """In `dtype`, rows as the CPU's kernel reads them, or as they are on other devices; itself where it lies so."""
    if x_TI.device.type != "cpu":
        return x_TI.to(dtype)
    width = _row_elements(x_TI.shape[1], dtype)
    if x_TI.dtype == dtype and x_TI.stride() == (width, 1) and x_TI.storage_offset() % width == 0:
        return x_TI
    return empty_rows(x_TI, dtype).copy_(x_TI)


def empty_rows(x_TI: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Of `x`'s shape `[..., T, I]`, and dtype if none is given; on a CPU rows lie as `laid_out` has them."""
    if x_TI.device.type != "cpu":
        return torch.empty_like(x_TI, dtype=dtype)
    return _rows(x_TI.shape, dtype or x_TI.dtype)


def _rows(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    *tokens, inputs = shape
    width = _row_elements(inputs, dtype)
    odd = dtype == torch.bfloat16 and inputs % 2  # the last pair's other half meets a weight of 0
    return (torch.zeros if odd else torch.empty)(*tokens, width, dtype=dtype)[..., :inputs]


def _row_elements(inputs: int, dtype: torch.dtype) -> int:
    """From one row to the next."""
    return 2 * row_width(-(-inputs // 2)) if dtype == torch.bfloat16 else row_width(inputs)


def _bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(_BITS.get(tensor.dtype, tensor.dtype)).numpy()


def _pairs(rows_OI: torch.Tensor) -> np.ndarray:
    """bfloat16 as `BFLOAT16_PAIRS`, `[O, ceil(I / 2)]`."""
    if rows_OI.shape[1] % 2:
        rows_OI = F.pad(rows_OI, (0, 1))
    rows_OI = rows_OI.contiguous()
    if rows_OI.storage_offset() % 2 or rows_OI.data_ptr() % 4:  # words would lie across words
        rows_OI = rows_OI.clone()
    return rows_OI.view(torch.int32).numpy()


@dataclass(frozen=True)
class ExpertGroup:
    """Consecutive experts `first ..` of one layer: what moves as one piece."""

    first: int
    up: ExpertMatrix  # gate_up_proj, or up_proj of experts without a gate
    down: ExpertMatrix

    @property
    def experts(self) -> int:
        return self.up.experts

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes


class ExpertSupply(Protocol):
    """Where a layer's expert groups come from."""

    def lend(self, counts_E: Counts) -> Iterator[ExpertGroup]:
        """The groups that have tokens, in expert order; each is lent until the next is asked for."""
        ...


@dataclass(frozen=True)
class ResidentExperts:
    """A layer whose groups all stay on the device."""

    groups: tuple[ExpertGroup, ...]

    def lend(self, counts_E: Counts) -> Iterator[ExpertGroup]:
        return (group for group in self.groups if any(counts_E[group.first : group.first + group.experts]))


def resident_experts(module: Any, dtype: torch.dtype, rounded: bool = False) -> ResidentExperts:
    """Takes a loaded transformers experts module's own weights out of it, as one group, kept in `dtype`."""
    up, down = (_taken(module, name, dtype, rounded) for name in (UP[module.has_gate], "down_proj"))
    return ResidentExperts((ExpertGroup(0, up, down),))


def _taken(module: Any, name: str, dtype: torch.dtype, rounded: bool) -> ExpertMatrix:
    weight = getattr(module, name)
    delattr(module, name)
    experts, rows, columns = weight.shape
    features = (columns, rows) if module.is_transposed else (rows, columns)
    matrix = expert_matrix(experts, *features, dtype, weight.dtype, weight.device, rounded)
    for expert in range(experts):
        if module.is_transposed:
            matrix.place_transposed(expert, weight[expert])
        else:
            matrix.place(expert, 0, weight[expert])
    return matrix


def expert_matrix(
    experts: int, out_features: int, in_features: int, dtype: torch.dtype, compute_dtype: torch.dtype,
    device: torch.device, rounded: bool = False,
) -> ExpertMatrix:  # fmt: skip
    """An empty one, in the form in which `device` multiplies in `compute_dtype`; for `rounded` see `PanelMatrix`."""
    if device.type == "cpu" and compute_dtype == torch.float32:
        return PanelMatrix(experts, out_features, in_features, dtype, rounded)
    return PlainMatrix(torch.empty(experts, out_features, in_features, dtype=compute_dtype, device=device))
