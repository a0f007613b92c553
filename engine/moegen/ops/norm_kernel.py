"""Root-mean-square norm on the CPU: every row is read once and written once, where the next product wants it.

Written out in torch it takes five passes over the tokens, each through memory. Compiled by Numba at first use.

Shape suffixes: R rows, D features.
"""

from __future__ import annotations

import numba
import torch

from moegen.ops.expert_kernel import row_width
from moegen.ops.kernel_cache import lock_kernel_cache
from moegen.ops.threads import threads_for

lock_kernel_cache()


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`weight * x / sqrt(mean(x**2) + epsilon)` over the last axis, in float32, of `x`'s shape.

    Rows of a batch of tokens `[.., T, D]` lie `row_width` apart: as `moegen.ops.expert_weights.laid_out` leaves them.
    """
    features = x.shape[-1]
    x_RD = x.reshape(-1, features).contiguous()
    width = row_width(features) if x.dim() < 4 else features  # heads side by side are one row to whoever is next
    out_RW = torch.empty(len(x_RD), width)
    threads = threads_for(x_RD.numel())
    _norm_rows(x_RD.numpy(), weight_D.numpy(), epsilon, out_RW.numpy(), threads)
    return out_RW[:, :features].view(x.shape)


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _norm_rows(x_RD, weight_D, epsilon, out_RW, threads):  # type: ignore[no-untyped-def]
    """A row's sum is taken in the same order wherever the row is: it does not depend on the batch."""
    rows, features = x_RD.shape
    for thread in numba.prange(threads):
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            squares = numba.float32(0)
            for d in range(features):
                squares += x_RD[row, d] * x_RD[row, d]
            root = numba.float32(1) / numba.float32((squares / features + epsilon) ** 0.5)
            for d in range(features):
                out_RW[row, d] = weight_D[d] * (x_RD[row, d] * root)
