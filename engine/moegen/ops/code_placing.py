"""Codes, scales and zeros from the bytes of one read to where they are multiplied, in one compiled call.

An expert has up to nine such runs of bytes, some of a few kilobytes: placed one by one they cost more time in Python
than in memory. What the bytes mean is said in `moegen.ops.weight_codes`.

Shape suffixes: N runs, F fields of a run, E experts, X rows of codes, B their bytes, G groups of inputs, O outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from moegen.ops.kernel_cache import lock_kernel_cache
from moegen.ops.vector_ir import I8, I16, I32, I64

lock_kernel_cache()

_CODES, _SCALES, _ZEROS = range(3)
PARTS = {"codes": _CODES, "scales": _SCALES, "zeros": _ZEROS}
_FLOAT32, _BFLOAT16, _FLOAT16, _EXPONENT = range(4)  # of a scale; an exponent is a power of two
SCALE_DTYPES = {
    torch.float32: _FLOAT32, torch.bfloat16: _BFLOAT16, torch.float16: _FLOAT16, torch.uint8: _EXPONENT,
    torch.float8_e8m0fnu: _EXPONENT,
}  # fmt: skip


class Run(NamedTuple):
    """The fields of a run: one part of some outputs of one expert, stored as `[lines, line_elements]`."""

    part: int  # of PARTS
    start: int  # byte of the read
    expert: int  # of the layer
    first_output: int
    outputs: int
    lines: int
    line_elements: int
    kind: int  # of scales, one of SCALE_DTYPES; of codes, the bytes of an element


@intrinsic
def _copy(typing: Any, to: Any, source: Any, count: Any) -> Any:
    """So many bytes, between addresses."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        to, source = (b.inttoptr(address, I8.as_pointer()) for address in args[:2])
        cgutils.raw_memcpy(b, to, source, args[2], ir.Constant(I64, 1))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


def _reads(kind: ir.IntType) -> Any:
    """A function of an address: the number there, of as many bits, wherever it lies."""

    @intrinsic
    def read(typing: Any, address: Any) -> Any:
        def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
            number = b.load(b.inttoptr(args[0], kind.as_pointer()), align=1)
            return b.zext(number, I64)

        return types.int64(types.intp), generate

    return read


_read8, _read16, _read32 = map(_reads, (I8, I16, I32))


@register_jitable
def _scale_bits(address, kind):  # type: ignore[no-untyped-def]
    """The float32 of the scale there, as its bits."""
    if kind == _FLOAT32:
        return _read32(address)
    if kind == _BFLOAT16:
        return _read16(address) << 16
    if kind == _EXPONENT:
        return _read8(address) << 23
    half = _read16(address)
    sign, magnitude = (half & 0x8000) << 16, half & 0x7FFF
    if magnitude >= 0x400 or magnitude == 0:
        return sign | ((magnitude + (112 << 10 if magnitude else 0)) << 13)  # 112 is between the biases
    exponent = 113
    while magnitude < 0x400:  # a subnormal of float16 is none of float32
        magnitude <<= 1
        exponent -= 1
    return sign | exponent << 23 | (magnitude & 0x3FF) << 13


@numba.njit(nogil=True, cache=True, error_model="numpy")
def place_runs(  # type: ignore[no-untyped-def]
    data, runs_NF, first_expert, order, bits, scale_rows, zero_shift, zero_shifts, codes_EXB, scales_EGO, zeros_EGO
):
    """Puts runs of `data` (uint8) in their places; those of expert `first_expert` are the matrices' first.

    `scales_EGO` are the bits of float32, or of bfloat16 which holds them; of `zeros_EGO` there may be none.
    `zero_shifts` is where in a word each of its zeros begins.
    """
    width = codes_EXB.shape[2]
    per_word = 32 // bits
    mask = (1 << bits) - 1
    lost_bits = 32 - 8 * scales_EGO.itemsize
    for n in range(runs_NF.shape[0]):
        part, start, expert, first, outputs, lines, elements, kind = runs_NF[n]
        expert -= first_expert
        source = data.ctypes.data + start
        if part == _CODES:
            to = codes_EXB.ctypes.data + expert * codes_EXB.shape[1] * width
            to += first * width if order == 0 else first * 4 if order == 1 else first * bits // 8
            count = elements * kind
            if count == width:
                _copy(to, source, count * lines)
            else:
                for line in range(lines):
                    _copy(to + line * width, source + line * count, count)
        elif part == _SCALES:
            nbytes = 4 if kind == _FLOAT32 else 1 if kind == _EXPONENT else 2
            for g in range(scales_EGO.shape[1]):
                for output in range(outputs):
                    at = output // scale_rows * elements + g if order == 0 else g * elements + output
                    scales_EGO[expert, g, first + output] = _scale_bits(source + at * nbytes, kind) >> lost_bits
        else:
            for line in range(lines):
                for w in range(elements):
                    word = _read32(source + (line * elements + w) * 4)
                    for k in range(per_word):
                        zeros_EGO[expert, line, first + w * per_word + k] = (word >> zero_shifts[k] & mask) + zero_shift
