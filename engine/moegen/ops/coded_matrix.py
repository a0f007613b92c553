"""Expert weights in few bits, in the form in which they are stored: expanded where they are multiplied.

Shape suffixes: E experts of the block, O output features, I input features, G groups of inputs, T tokens, S rows sorted
by expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from moegen.coding import Coding
from moegen.ops.code_kernel import BLOCK_INPUTS, KINDS, ORDERS, ROW_BLOCK, ROW_BYTES, grouped_codes
from moegen.ops.code_placing import place_runs
from moegen.ops.expert_kernel import PANEL
from moegen.ops.expert_weights import Counts, laid_out, starts_of, with_gaps
from moegen.ops.threads import numba_threads
from moegen.ops.weight_codes import expanded, quantised, zero_shifts

Empty = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]  # makes a tensor of zeros


class CodedMatrix:
    """One projection of several experts, in codes, scales and zeros (an `ExpertMatrix`).

    Attributes:
        tensors: codes, scales and, if stored, zeros: `[E, ...]` each.
    """

    def __init__(
        self, experts: int, out_features: int, in_features: int, coding: Coding, compute_dtype: torch.dtype,
        empty: Empty,
    ) -> None:  # fmt: skip
        """`empty` makes the tensors: where they are is where they are multiplied, in `compute_dtype`."""
        self.experts, self.out_features, self.in_features = experts, out_features, in_features
        self.coding, self._compute_dtype = coding, compute_dtype
        self._panels = -(-out_features // PANEL)
        outputs, groups = self._panels * PANEL, coding.groups(in_features)
        shape = (experts, *_code_shape(coding, outputs, in_features))
        # The last row's last piece is read beyond its end.
        self.codes = empty((math.prod(shape) + ROW_BYTES,), torch.uint8)[:-ROW_BYTES].view(shape)
        scale_dtype = torch.bfloat16 if coding.scale_bytes == 2 else torch.float32
        self.scales_EGO = empty((experts, groups, outputs), scale_dtype)
        self.zeros_EGO = empty((experts, groups, outputs), torch.int16) if coding.zero is None else None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.codes, self.scales_EGO) + (() if self.zeros_EGO is None else (self.zeros_EGO,))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def row_dtype(self) -> torch.dtype:
        return self._compute_dtype

    def place(self, expert: int, first_row: int, rows_OI: torch.Tensor) -> None:
        """Plain weights: they are quantised, a scale per output. Only one of `OWN_CODINGS` can be made so."""
        codes, scales_GO = quantised(rows_OI, self.coding)
        self.place_codes(expert, first_row, codes)
        self.place_scales(expert, first_row, scales_GO)

    def place_transposed(self, expert: int, matrix_IO: torch.Tensor) -> None:
        self.place(expert, 0, matrix_IO.T)

    def place_codes(self, expert: int, first_row: int, codes: torch.Tensor) -> None:
        """Of some outputs: `[outputs, row bytes]` uint8, or words `[.., outputs]` or `[inputs, outputs / 8]` int32."""
        if self.coding.order == "rows":
            self.codes[expert, first_row : first_row + codes.shape[0], : codes.shape[1]].copy_(codes)
            return
        first = first_row // (8 if self.coding.order == "words across outputs" else 1)
        self.codes[expert].view(torch.int32)[:, first : first + codes.shape[1]].copy_(codes)

    def place_scales(self, expert: int, first_row: int, scales_GO: torch.Tensor) -> None:
        self.scales_EGO[expert, :, first_row : first_row + scales_GO.shape[1]].copy_(scales_GO)

    def place_zeros(self, expert: int, first_row: int, zeros_GO: torch.Tensor) -> None:
        assert self.zeros_EGO is not None
        self.zeros_EGO[expert, :, first_row : first_row + zeros_GO.shape[1]].copy_(zeros_GO)

    @property
    def places_runs(self) -> bool:
        """Whether `place_runs` can be used: in the host's memory."""
        return self.codes.device.type == "cpu"

    def place_runs(self, data: torch.Tensor, runs_NF: np.ndarray, first_expert: int) -> None:
        """The same of many parts of one read at once: see `moegen.ops.code_placing`."""
        coding, scales, zeros = self.coding, self.scales_EGO, self.zeros_EGO
        place_runs(
            data.numpy(), runs_NF, first_expert, ORDERS[coding.order], coding.bits, coding.scale_rows,
            coding.zero_shift, np.array(zero_shifts(coding)), self.codes.numpy(),
            scales.view(torch.uint16 if scales.dtype == torch.bfloat16 else torch.uint32).numpy(),
            (torch.empty(0, 0, 0, dtype=torch.int16) if zeros is None else zeros).numpy(),
        )  # fmt: skip

    def expanded(self, expert: int) -> torch.Tensor:
        """One expert's matrix, `[O, I]` float32, made anew at every call."""
        codes = self.codes[expert]
        if self.coding.order != "rows":
            codes = codes.view(torch.int32)
        zeros_GO = None if self.zeros_EGO is None else self.zeros_EGO[expert]
        matrix_OI = expanded(codes, self.scales_EGO[expert], zeros_GO, self.coding, self.in_features)
        return matrix_OI[: self.out_features]

    @property
    def _on_cpu(self) -> bool:
        return self.codes.device.type == "cpu" and self._compute_dtype == torch.float32

    def lay_out(self, x_TI: torch.Tensor) -> torch.Tensor:
        return laid_out(x_TI) if self._on_cpu else x_TI

    def linear(self, x_TI: torch.Tensor, counts: Counts, tokens_S: torch.Tensor | None = None) -> torch.Tensor:
        if self._on_cpu:
            return self._linear_on_cpu(laid_out(x_TI), counts, tokens_S)
        x_SI = x_TI if tokens_S is None else x_TI[tokens_S]
        answers = [
            x @ self.expanded(expert).to(x.dtype).T
            for expert, x in enumerate(x_SI.split(np.asarray(counts).tolist()))
            if len(x)
        ]
        return torch.cat(answers) if answers else x_SI.new_empty(0, self.out_features)

    def gated(
        self, x_TI: torch.Tensor, counts: Counts, tokens_S: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor | None:
        return None

    def add_to(
        self, out_TO: torch.Tensor, x_SI: torch.Tensor, counts: Counts, tokens_S: torch.Tensor,
        weights_S: torch.Tensor, *, anew: bool,
    ) -> bool:  # fmt: skip
        return False

    def _linear_on_cpu(self, laid_TI: torch.Tensor, counts: Counts, tokens_S: torch.Tensor | None) -> torch.Tensor:
        starts = starts_of(counts)
        tokens = np.arange(starts[-1]) if tokens_S is None else tokens_S.numpy()
        out_SO = torch.empty(len(tokens), self._panels * PANEL)
        scales = self.scales_EGO.view(torch.uint16) if self.scales_EGO.dtype == torch.bfloat16 else self.scales_EGO
        zeros = self.zeros_EGO
        if zeros is None:
            zeros = torch.full((1, 1, self._panels * PANEL), self.coding.zero or 0, dtype=torch.int16)
        threads = numba_threads()
        grouped_codes(
            with_gaps(laid_TI).numpy(), tokens, ORDERS[self.coding.order], KINDS[self.coding.kind], self.coding.bits,
            self.codes.numpy(), self.coding.group_inputs, scales.numpy(), zeros.numpy(), self._panels,
            self.in_features, starts, out_SO.numpy(), torch.empty(threads, BLOCK_INPUTS, PANEL).numpy(),
            torch.empty(threads, ROW_BLOCK, PANEL).numpy(), threads,
        )  # fmt: skip
        return out_SO[:, : self.out_features]


def _code_shape(coding: Coding, outputs: int, inputs: int) -> tuple[int, int]:
    """Bytes of one expert's codes."""
    if coding.order == "words down inputs":
        return inputs * coding.bits // 32, outputs * 4
    if coding.order == "words across outputs":
        return inputs, outputs // 2
    return outputs, -(-inputs * coding.bits // 8)
