"""Expert weights in the form in which the device multiplies them: panels on a CPU, plain matrices elsewhere.

Shape suffixes: E experts of the block, O output features, I input features, T tokens, S rows
sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from moegen.ops.expert_kernel import PANEL, grouped_panels, panel_places, row_width
from moegen.ops.host_memory import host_zeros
from moegen.ops.panel_packing import pack_rows, pack_transposed
from moegen.ops.threads import numba_threads

UP = {True: "gate_up_proj", False: "up_proj"}  # the first projection of experts with and without a gate
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}  # as the kernel knows them


class ExpertMatrix(Protocol):
    """One projection of several experts: E matrices of `[out_features, in_features]`."""

    experts: int
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
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

    def linear(self, x_TI: torch.Tensor, counts: Sequence[int], tokens_S: torch.Tensor | None = None) -> torch.Tensor:
        """`[S, O]`: the next `counts[e]` rows of `x[tokens]`, or of `x` itself, times expert e's matrix."""
        ...


class PanelMatrix:
    """In panels for `grouped_panels`: weights as stored (float32, bfloat16, float16), arithmetic in float32."""

    def __init__(self, experts: int, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        self.experts, self.out_features, self.in_features = experts, out_features, in_features
        self.dtype = dtype
        panels = -(-out_features // PANEL)
        self._places = panel_places(dtype == torch.bfloat16)
        # Zeros, as nothing is placed in the last panel's features beyond `out_features`.
        self._panels_ENIP = _bits(host_zeros((experts, panels, in_features, PANEL), dtype))

    @property
    def nbytes(self) -> int:
        return self._panels_ENIP.nbytes

    def place(self, expert: int, first_row: int, rows_OI: torch.Tensor) -> None:
        pack_rows(self._panels_ENIP[expert], first_row, _bits(rows_OI.to(self.dtype)), self._places)

    def place_transposed(self, expert: int, matrix_IO: torch.Tensor) -> None:
        pack_transposed(self._panels_ENIP[expert], _bits(matrix_IO.to(self.dtype)), self._places)

    def unpacked(self, expert: int) -> torch.Tensor:
        """One expert's matrix as it was placed, `[O, I]`: a copy, made anew at every call."""
        features_NIP = torch.from_numpy(self._panels_ENIP[expert][:, :, self._places]).view(self.dtype)
        return features_NIP.transpose(1, 2).reshape(-1, self.in_features)[: self.out_features]

    def looked_up(self, expert: int, features_T: torch.Tensor) -> torch.Tensor:
        """`[T, I]`: some rows of one expert's matrix, as they were placed."""
        panels, within = np.divmod(features_T.numpy(), PANEL)
        return torch.from_numpy(self._panels_ENIP[expert][panels, :, self._places[within]]).view(self.dtype)

    def lay_out(self, x_TI: torch.Tensor) -> torch.Tensor:
        return laid_out(x_TI)

    def linear(self, x_TI: torch.Tensor, counts: Sequence[int], tokens_S: torch.Tensor | None = None) -> torch.Tensor:
        starts = np.array([0, *counts]).cumsum()
        tokens = np.arange(starts[-1]) if tokens_S is None else tokens_S.numpy()
        out_SO = torch.empty(len(tokens), self._panels_ENIP.shape[1] * PANEL)
        laid_TI = laid_out(x_TI)
        x = laid_TI.as_strided((laid_TI.shape[0], laid_TI.stride(0)), laid_TI.stride())  # with the gaps between rows
        threads = numba_threads()
        grouped_panels(x.numpy(), tokens, self._panels_ENIP, starts, out_SO.numpy(), threads)
        return out_SO[:, : self.out_features]


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

    def place(self, expert: int, first_row: int, rows_OI: torch.Tensor) -> None:
        self.weight_EOI[expert, first_row : first_row + rows_OI.shape[0]].copy_(rows_OI)

    def place_transposed(self, expert: int, matrix_IO: torch.Tensor) -> None:
        self.weight_EOI[expert].copy_(matrix_IO.T)

    def lay_out(self, x_TI: torch.Tensor) -> torch.Tensor:
        return x_TI

    def linear(self, x_TI: torch.Tensor, counts: Sequence[int], tokens_S: torch.Tensor | None = None) -> torch.Tensor:
        x_SI = x_TI if tokens_S is None else x_TI[tokens_S]
        weight_EIO = self.weight_EOI.transpose(1, 2)
        if x_SI.dtype not in (torch.float32, torch.bfloat16):
            return torch.cat([x @ w for x, w in zip(x_SI.split(list(counts)), weight_EIO, strict=True)])
        offsets_E = torch.tensor(counts, device=x_SI.device).cumsum(0).to(torch.int32)
        return F.grouped_mm(x_SI, weight_EIO, offs=offsets_E)


def laid_out(x_TI: torch.Tensor) -> torch.Tensor:
    """In float32, rows `row_width` apart, as the CPU's kernel reads them; returned as it is where it lies so."""
    width = row_width(x_TI.shape[1])
    if x_TI.dtype == torch.float32 and x_TI.stride() == (width, 1) and x_TI.storage_offset() % width == 0:
        return x_TI
    return empty_rows(x_TI, torch.float32).copy_(x_TI)


def empty_rows(x_TI: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Of `x`'s shape `[..., T, I]`, and dtype if none is given; on a CPU rows lie as `laid_out` has them."""
    if x_TI.device.type != "cpu":
        return torch.empty_like(x_TI, dtype=dtype)
    *tokens, inputs = x_TI.shape
    return torch.empty(*tokens, row_width(inputs), dtype=dtype or x_TI.dtype)[..., :inputs]


def _bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(_BITS.get(tensor.dtype, tensor.dtype)).numpy()


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

    def lend(self, counts_E: Sequence[int]) -> Iterator[ExpertGroup]:
        """The groups that have tokens, in expert order; each is lent until the next is asked for."""
        ...


@dataclass(frozen=True)
class ResidentExperts:
    """A layer whose groups all stay on the device."""

    groups: tuple[ExpertGroup, ...]

    def lend(self, counts_E: Sequence[int]) -> Iterator[ExpertGroup]:
        return (group for group in self.groups if any(counts_E[group.first : group.first + group.experts]))


def resident_experts(module: Any, dtype: torch.dtype) -> ResidentExperts:
    """Takes a loaded transformers experts module's own weights out of it, as one group, kept in `dtype`."""
    group = ExpertGroup(0, _taken(module, UP[module.has_gate], dtype), _taken(module, "down_proj", dtype))
    return ResidentExperts((group,))


def _taken(module: Any, name: str, dtype: torch.dtype) -> ExpertMatrix:
    weight = getattr(module, name)
    delattr(module, name)
    experts, rows, columns = weight.shape
    features = (columns, rows) if module.is_transposed else (rows, columns)
    matrix = expert_matrix(experts, *features, dtype, weight.dtype, weight.device)
    for expert in range(experts):
        if module.is_transposed:
            matrix.place_transposed(expert, weight[expert])
        else:
            matrix.place(expert, 0, weight[expert])
    return matrix


def expert_matrix(
    experts: int, out_features: int, in_features: int, dtype: torch.dtype, compute_dtype: torch.dtype,
    device: torch.device,
) -> ExpertMatrix:  # fmt: skip
    """An empty one, in the form in which `device` multiplies in `compute_dtype`."""
    if device.type == "cpu" and compute_dtype == torch.float32:
        return PanelMatrix(experts, out_features, in_features, dtype)
    return PlainMatrix(torch.empty(experts, out_features, in_features, dtype=compute_dtype, device=device))
