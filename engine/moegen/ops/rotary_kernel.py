"""Rotary positions on the CPU: every head is read once and written once.

Written out in torch it takes six passes over queries and keys. Compiled by Numba at first use. Nothing is contracted
into multiply-adds: the answers are torch's, bit for bit.

Shape suffixes: T tokens, H heads, D head dim, E rotary dims.
"""

from __future__ import annotations

import numba
import torch

from moegen.ops.kernel_cache import lock_kernel_cache
from moegen.ops.threads import threads_for

lock_kernel_cache()


def rotated(x_1HTD: torch.Tensor, cos_1TE: torch.Tensor, sin_1TE: torch.Tensor) -> torch.Tensor:
    """`x * cos + rotate_half(x) * sin` in the first E dims of every head, the others as they are; in float32.

    The answer lies in memory token after token, as queries and keys usually come from their projection.
    """
    x_THD = x_1HTD[0].transpose(0, 1).contiguous()
    out_THD = torch.empty_like(x_THD)
    threads = threads_for(x_THD.numel())
    _rotate(x_THD.numpy(), cos_1TE[0].contiguous().numpy(), sin_1TE[0].contiguous().numpy(), out_THD.numpy(), threads)
    return out_THD.transpose(0, 1)[None]


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def _rotate(x_THD, cos_TE, sin_TE, out_THD, threads):  # type: ignore[no-untyped-def]
    tokens, heads, dim = x_THD.shape
    rotary = cos_TE.shape[1]
    half = rotary // 2
    for thread in numba.prange(threads):
        for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
            for h in range(heads):
                for d in range(half):
                    low, high = x_THD[t, h, d], x_THD[t, h, half + d]
                    out_THD[t, h, d] = low * cos_TE[t, d] - high * sin_TE[t, d]
                    out_THD[t, h, half + d] = high * cos_TE[t, half + d] + low * sin_TE[t, half + d]
                for d in range(rotary, dim):
                    out_THD[t, h, d] = x_THD[t, h, d]
