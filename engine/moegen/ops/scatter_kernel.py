"""Tokens' keys and values into their pages on the CPU: every row of a KV head is one copy.

torch's indexed assignment takes several times as long. Compiled by Numba at first use.

Shape suffixes: P pages, G KV heads, C tokens of a page, T tokens; what a KV head keeps of a token may have a shape.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moegen.ops.kernel_cache import lock_kernel_cache
from moegen.ops.threads import threads_for
from moegen.ops.vector_ir import I8, i64

lock_kernel_cache()


def scatter_tokens(
    table_PGC: torch.Tensor, pages_T: npt.NDArray[np.int64], slots_T: npt.NDArray[np.int64], new_TG: torch.Tensor
) -> None:
    """`table[pages[t], :, slots[t]] = new[t]` for every token. Both are of one dtype; a table's rows lie whole."""
    if not len(pages_T):
        return
    if not new_TG[:1, :1].is_contiguous():
        new_TG = new_TG.contiguous()
    size = table_PGC.element_size()
    to_PGC = tuple(size * table_PGC.stride(axis) for axis in range(3))
    from_TG = tuple(size * new_TG.stride(axis) for axis in range(2))
    heads, row_bytes, threads = table_PGC.shape[1], new_TG[0, 0].nbytes, threads_for(new_TG.numel())
    _scatter(table_PGC.data_ptr(), to_PGC, pages_T, slots_T, new_TG.data_ptr(), from_TG, heads, row_bytes, threads)


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def _scatter(table, to_PGC, pages_T, slots_T, new, from_TG, heads, row_bytes, threads):  # type: ignore[no-untyped-def]
    """Addresses of the first rows, and bytes from one to the next along each axis."""
    tokens = len(pages_T)
    for thread in numba.prange(threads):
        for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
            to = table + pages_T[t] * to_PGC[0] + slots_T[t] * to_PGC[2]
            for head in range(heads):
                _copy(to + head * to_PGC[1], new + t * from_TG[0] + head * from_TG[1], row_bytes)


@intrinsic
def _copy(typing: Any, to: Any, source: Any, count: Any) -> Any:
    """`count` bytes from one address to another."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        places = [b.inttoptr(address, I8.as_pointer()) for address in args[:2]]
        cgutils.raw_memcpy(b, *places, args[2], i64(1))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen
