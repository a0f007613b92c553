"""Gated SiLU on the CPU: gate and up are read once, and the answer is written once, where the next product wants it.

Written out in torch it takes three passes, another where rows are rounded for that product, and the last bits of a row
depend on where its threads cut the batch. Compiled by Numba at first use, which caches it by this file: change
something here after a change in `moegen.ops.vectors` or `vector_ir`.

Shape suffixes: S rows, F features.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from moegen.ops.expert_weights import empty_rows
from moegen.ops.kernel_cache import lock_kernel_cache
from moegen.ops.threads import threads_for
from moegen.ops.vectors import gate_row

lock_kernel_cache()


def silu(x: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(x)` of float32, whose bits do not depend on the elements beside it."""
    x_SF = x.reshape(-1, x.shape[-1]).contiguous()
    return _answered(x_SF, torch.empty_like(x_SF), gated=False).view(x.shape)


def silu_gated(gate_up_S2F: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`silu(gate) * up` of float32 rows that hold both, one after the other: `[S, F]` in `dtype`, as `laid_out` has it.

    bfloat16 is possible where the processor multiplies it (`vector_ir.DOTS`).
    """
    x_S2F = gate_up_S2F if gate_up_S2F.stride(1) == 1 else gate_up_S2F.contiguous()
    return _answered(x_S2F, empty_rows(x_S2F[:, : x_S2F.shape[1] // 2], dtype), gated=True)


def _answered(x: torch.Tensor, out_SF: torch.Tensor, gated: bool) -> torch.Tensor:
    """`out`, computed. Addresses stand for rows, whether there are gaps between them or not: one kernel serves both."""
    kind, size = (np.uint16(0), 2) if out_SF.dtype == torch.bfloat16 else (np.float32(0), 4)
    threads = threads_for(x.numel())
    places = x.data_ptr(), 4 * x.stride(0), out_SF.data_ptr(), size * out_SF.stride(0)
    _gate_rows(kind, *places, *out_SF.shape, gated, threads)
    return out_SF


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def _gate_rows(kind, x, x_bytes, out, out_bytes, rows, features, gated, threads):  # type: ignore[no-untyped-def]
    for thread in numba.prange(threads):
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            gate_row(kind, x + row * x_bytes, features, gated, out + row * out_bytes)
