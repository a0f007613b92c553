"""LLVM IR for the kernels that Numba's loop vectoriser would not find by itself: the words that they are written in.

Addresses are integers, strides are in elements or, where named so, in bytes. Arithmetic is float32. A vector is as wide
as the host's registers.

Numba caches a compiled kernel by its own file: after a change here, change the kernels that use it.
"""

from __future__ import annotations

import os

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils

_FEATURES = llvmlite.binding.get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 4 if _FEATURES.get("neon") else 8  # float32 per vector
DOTS = bool(_FEATURES.get("avx512bf16"))  # whether `dot` can be used here
LINE_BYTES = 64  # of a cache line
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
V8, V16, V32, VF = (ir.VectorType(kind, LANES) for kind in (I8, I16, I32, F32))
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
# Cephes' expf: e^x = 1 + x + x^2 P(x) for |x| <= ln 2 / 2.
_EXP_P = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_EXP_FLOOR = -87.0  # e^x is taken as e^-87 below it: the least of float32 that is not subnormal
_ALIGNMENT = {I8: 1, V8: 1, I16: 2, V16: 2, V32: 1}  # of words too: they may be four codes


def _first_level_bytes() -> int:
    """Of a core's data cache; 0 if nobody says."""
    try:
        return os.sysconf("SC_LEVEL1_DCACHE_SIZE")
    except (AttributeError, ValueError, OSError):  # not Linux
        return 0


_ROOMY = _first_level_bytes() >= 48 << 10  # lines that no other cache has stay there until they are read


def i64(value: int) -> ir.Constant:
    """An address, an index or a count."""
    return ir.Constant(I64, value)


def v32(lanes: list[int]) -> ir.Constant:
    """A vector of these words."""
    return ir.Constant(V32, lanes)


def vf(value: float) -> ir.Constant:
    """A vector of this number, in every lane."""
    return ir.Constant(VF, [ir.Constant(F32, value)] * LANES)


def splat(b: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """A vector of this number or word, in every lane."""
    empty = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    return b.shuffle_vector(b.insert_element(empty, scalar, ir.Constant(I32, 0)), empty, v32([0] * LANES))


def call(b: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """LLVM's own function of float32 vectors."""
    kind = ir.FunctionType(VF, [VF] * len(args))
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v{LANES}f32"), args)


def greater(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The greater of both; the second where one is no number."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def exp_negative(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x for x <= 0, to about one unit in the last place."""
    x = greater(b, x, vf(_EXP_FLOOR))
    power = call(b, "rint", b.fmul(x, vf(_LOG2_E)))
    rest = call(b, "fma", power, vf(-_LN2_LOW), call(b, "fma", power, vf(-_LN2_HIGH), x))
    series = vf(_EXP_P[0])
    for coefficient in _EXP_P[1:]:
        series = call(b, "fma", series, rest, vf(coefficient))
    series = b.fadd(call(b, "fma", series, b.fmul(rest, rest), rest), vf(1.0))
    exponent = b.shl(b.add(b.fptosi(power, V32), v32([127] * LANES)), v32([23] * LANES))
    return b.fmul(series, b.bitcast(exponent, VF))


class _BFloat16(ir.types._BaseFloatType):
    """What llvmlite has no name for."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat16._create_instance()


def dot(b: ir.IRBuilder, x: ir.Value, y: ir.Value, sums: ir.Value) -> ir.Value:
    """`sums + x * y` of words that hold two bfloat16 each: both products are added, in float32."""
    pairs = ir.VectorType(_BFloat16(), 2 * LANES)
    kind = ir.FunctionType(VF, [VF, pairs, pairs])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return b.call(function, [sums, b.bitcast(x, pairs), b.bitcast(y, pairs)])


def rounded_to_bfloat16(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The bits of the nearest bfloat16, to the even one of two; where there is `dot`."""
    return b.bitcast(b.fptrunc(x, ir.VectorType(_BFloat16(), LANES)), V16)


def at(b: ir.IRBuilder, address: ir.Value, index: ir.Value | int, stride: int) -> ir.Value:
    """`address + index * stride`, in bytes."""
    return b.add(address, b.mul(i64(index) if isinstance(index, int) else index, i64(stride)))


def load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """What is at an address that is aligned to its elements at least; words may be two bfloat16, or four codes."""
    return b.load(b.inttoptr(address, kind.as_pointer()), align=_ALIGNMENT.get(kind, 4))


def store(b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    """Puts it there."""
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=4)


def nbytes(kind: types.Type) -> int:
    """Of a float32, of a pair, of the bits of a bfloat16, or of a code."""
    return {types.float32: 4, types.int32: 4, types.int8: 1}.get(kind, 2)


def as_float(b: ir.IRBuilder, address: ir.Value, kind: types.Type) -> ir.Value:
    """The element there, as float32."""
    if kind == types.float32:
        return load(b, address, F32)
    if kind == types.int8:
        return b.sitofp(load(b, address, I8), F32)
    return b.bitcast(b.shl(b.zext(load(b, address, I16), I32), ir.Constant(I32, 16)), F32)


def as_floats(b: ir.IRBuilder, address: ir.Value, kind: types.Type) -> ir.Value:
    """The LANES elements there, in their order, as float32."""
    if kind == types.float32:
        return load(b, address, VF)
    if kind == types.int8:
        return b.sitofp(b.sext(load(b, address, V8), V32), VF)
    return b.bitcast(b.shl(b.zext(load(b, address, V16), V32), v32([16] * LANES)), VF)


def halves(b: ir.IRBuilder, words: ir.Value) -> list[ir.Value]:
    """Of words that hold two bfloat16 each: the lower ones and the upper ones, as float32."""
    return [b.bitcast(half, VF) for half in (b.shl(words, v32([16] * LANES)), b.and_(words, v32([0xFFFF0000] * LANES)))]


def elements(b: ir.IRBuilder, words: ir.Value, kind: types.Type) -> list[ir.Value]:
    """The elements that words hold, from the lowest bits on, as float32: one float32, two bfloat16 or four codes."""
    if kind == types.float32:
        return [b.bitcast(words, VF)]
    if kind == types.int8:
        tops = [b.shl(words, v32([left] * LANES)) for left in (24, 16, 8, 0)]
        return [b.sitofp(b.ashr(top, v32([24] * LANES)), VF) for top in tops]
    return halves(b, words)


def transposed(b: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """A square of LANES words by LANES, by columns: blocks of twice `distance` swap their off-diagonal quarters."""
    rows = list(rows)
    distance = 1
    while distance < LANES:
        upper = v32([LANES + (k ^ distance) if k & distance else k for k in range(LANES)])
        lower = v32([LANES + k if k & distance else k ^ distance for k in range(LANES)])
        for i in range(LANES):
            if not i & distance:
                pair = rows[i], rows[i | distance]
                rows[i], rows[i | distance] = b.shuffle_vector(*pair, upper), b.shuffle_vector(*pair, lower)
        distance *= 2
    return rows


def prefetch(b: ir.IRBuilder, address: ir.Value, *, once: bool = False) -> None:
    """Of its cache line, for reading, into the second-level cache; what is read `once`, and soon, past it if it can."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    level = 0 if once and _ROOMY else 2
    read, locality, data = (ir.Constant(I32, n) for n in (0, level, 1))
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    b.call(function, [b.inttoptr(address, I8.as_pointer()), read, locality, data])
