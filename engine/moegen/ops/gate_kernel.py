"""Gated SiLU on the CPU: gate and up are read once, and the answer is written once, where the next product wants it.

Written out in torch it takes three passes, another where rows are rounded for that product, and the last bits of a row
depend on where its threads cut the batch. Compiled by Numba at first use, which caches it by this file: change
something here after a change in `moegen.ops.vector_ir`.

Shape suffixes: S rows, F features.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moegen.ops.expert_weights import empty_rows
from moegen.ops.kernel_cache import lock_kernel_cache
from moegen.ops.threads import threads_for
from moegen.ops.vector_ir import (
    F32,
    I32,
    LANES,
    VF,
    at,
    call,
    exp_negative,
    i64,
    load,
    rounded_to_bfloat16,
    splat,
    store,
    vf,
)

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
            _gate_row(kind, x + row * x_bytes, features, gated, out + row * out_bytes)


@intrinsic
def _gate_row(typing: Any, kind: Any, x: Any, features: Any, gated: Any, out: Any) -> Any:
    """`out = silu(x[:features])`, times `x[features : 2 * features]` if gated; `out` has the dtype of `kind`."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _, gate, features, gated, to = args
        up = at(b, gate, features, 4)
        rounded = kind == types.uint16

        def emit(index: ir.Value, held: ir.Type) -> None:
            """The elements from `index` on, as many as `held` holds. One is computed as many are, to the same bits."""

            def read(place: ir.Value) -> ir.Value:
                value = load(b, at(b, place, index, 4), held)
                return value if held == VF else splat(b, value)

            answer = _silu(b, read(gate))
            with b.if_else(gated) as (then, otherwise):
                with then:
                    product, after_product = b.fmul(answer, read(up)), b.block
                with otherwise:
                    plain = b.block
            chosen = b.phi(VF)
            chosen.add_incoming(product, after_product)
            chosen.add_incoming(answer, plain)
            result = rounded_to_bfloat16(b, chosen) if rounded else chosen
            if held == F32:
                result = b.extract_element(result, ir.Constant(I32, 0))
            store(b, result, at(b, to, index, 2 if rounded else 4))

        whole = b.sdiv(features, i64(LANES))
        with cgutils.for_range(b, whole) as loop:
            emit(b.mul(loop.index, i64(LANES)), VF)
        with cgutils.for_range(b, features, start=b.mul(whole, i64(LANES))) as loop:
            emit(loop.index, F32)
        return context.get_dummy_value()

    return types.void(kind, types.intp, types.intp, types.boolean, types.intp), codegen


def _silu(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """`x / (1 + e^-x)`, by a power that cannot overflow."""
    decay = exp_negative(b, b.fneg(call(b, "fabs", x)))
    positive = b.fcmp_ordered(">=", x, vf(0.0))
    return b.fdiv(b.select(positive, x, b.fmul(x, decay)), b.fadd(vf(1.0), decay))
