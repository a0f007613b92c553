"""Vector instructions for Numba kernels, written as LLVM IR: what its loop vectoriser would not find by itself.

Addresses are integers, strides are in elements. Arithmetic is float32. What is stored is float32 or bfloat16, told
apart by `kind`: any value of the stored array's element type, uint16 for a bfloat16, which is the upper half of a
float32. A vector is as wide as the host's registers.

Numba caches a compiled kernel by its own file: after a change here, change the kernels that use it.
"""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FEATURES = llvmlite.binding.get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx") else 4
BLOCK = 2 * LANES  # columns of a product
MAX_ROWS = 6 if LANES == 8 else 8  # of a product: two accumulators each, in the 16 registers of AVX2 or 32 elsewhere
DEPTH = 128  # of a product
X_STRIDE = DEPTH + 16  # elements: known when compiling, a whole number of cache lines, and no power of two

_LINE_BYTES = 64
_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_V16, _V32, _VF = (ir.VectorType(kind, LANES) for kind in (_I16, _I32, _F32))
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
# Cephes' expf: e^x = 1 + x + x^2 P(x) for |x| <= ln 2 / 2.
_EXP_P = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_EXP_FLOOR = -87.0  # e^x is taken as 0 below it


def _i(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _vi(lanes: list[int]) -> ir.Constant:
    return ir.Constant(_V32, lanes)


def _vf(value: float) -> ir.Constant:
    return ir.Constant(_VF, [ir.Constant(_F32, value)] * LANES)


def _splat(b: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    empty = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    return b.shuffle_vector(b.insert_element(empty, scalar, ir.Constant(_I32, 0)), empty, _vi([0] * LANES))


def _call(b: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    kind = ir.FunctionType(_VF, [_VF] * len(args))
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v{LANES}f32"), args)


def _at(b: ir.IRBuilder, address: ir.Value, index: ir.Value | int, stride: int) -> ir.Value:
    """`address + index * stride`, in bytes."""
    return b.add(address, b.mul(_i(index) if isinstance(index, int) else index, _i(stride)))


def _load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=2 if kind in (_V16, _I16) else 4)


def _store(b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=4)


def _bytes(kind: types.Type) -> int:
    return 4 if kind == types.float32 else 2


def _float(b: ir.IRBuilder, address: ir.Value, kind: types.Type, vector: bool = True) -> ir.Value:
    """LANES elements, or one, as float32."""
    if kind == types.float32:
        return _load(b, address, _VF if vector else _F32)
    bits = b.zext(_load(b, address, _V16 if vector else _I16), _V32 if vector else _I32)
    sixteen = _vi([16] * LANES) if vector else ir.Constant(_I32, 16)
    return b.bitcast(b.shl(bits, sixteen), _VF if vector else _F32)


def _greater(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _sum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.fadd(x, y)


def _reduce(b: ir.IRBuilder, vector: ir.Value, combine: Callable[..., ir.Value]) -> ir.Value:
    """All lanes combined, always in the same order."""
    distance = LANES // 2
    while distance:
        other = b.shuffle_vector(vector, vector, _vi([lane ^ distance for lane in range(LANES)]))
        vector = combine(b, vector, other)
        distance //= 2
    return b.extract_element(vector, ir.Constant(_I32, 0))


def _exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x for x <= 0, to about one unit in the last place."""
    tiny = b.fcmp_ordered("<", x, _vf(_EXP_FLOOR))
    x = b.select(tiny, _vf(_EXP_FLOOR), x)
    power = _call(b, "rint", b.fmul(x, _vf(_LOG2_E)))
    rest = _call(b, "fma", power, _vf(-_LN2_LOW), _call(b, "fma", power, _vf(-_LN2_HIGH), x))
    series = _vf(_EXP_P[0])
    for coefficient in _EXP_P[1:]:
        series = _call(b, "fma", series, rest, _vf(coefficient))
    series = b.fadd(_call(b, "fma", series, b.fmul(rest, rest), rest), _vf(1.0))
    exponent = b.shl(b.add(b.fptosi(power, _V32), _vi([127] * LANES)), _vi([23] * LANES))
    return b.select(tiny, _vf(0.0), b.fmul(series, b.bitcast(exponent, _VF)))


def _prefetch(b: ir.IRBuilder, address: ir.Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    read, into_l2, data = (ir.Constant(_I32, n) for n in (0, 2, 1))
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    b.call(function, [b.inttoptr(address, _I8.as_pointer()), read, into_l2, data])


@intrinsic
def widen(typing, kind, source, to):  # type: ignore[no-untyped-def]
    """Copies the one element at `source` to `to`, as float32."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        _store(b, _float(b, args[1], kind, vector=False), args[2])
        return context.get_dummy_value()

    return types.void(kind, types.intp, types.intp), generate


@intrinsic
def get(typing, address):  # type: ignore[no-untyped-def]
    """The integer at `address`."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        return _load(b, args[0], _I64)

    return types.intp(types.intp), generate


@intrinsic
def put(typing, address, value):  # type: ignore[no-untyped-def]
    """Stores an integer (8 bytes), or a float (4), at `address`."""
    stored = types.float32 if isinstance(value, types.Float) else types.intp

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        _store(b, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.intp, stored), generate


@intrinsic
def product(  # type: ignore[no-untyped-def]
    typing, kind, ahead_kind, fresh, rows, depth, x, panels, panel_rows, offset, stride, ahead_stride, out, out_stride
):
    """`out[r, :BLOCK] = sum over k < depth of x[r, k] * panel[k, :BLOCK]`; `+=` unless fresh.

    At most MAX_ROWS rows, X_STRIDE elements apart in `x`, and a depth of at most DEPTH. The panel is of `kind` and lies
    in pieces of `panel_rows` rows, `offset` bytes after each address in the table `panels`. During each piece, as many
    rows of `ahead_kind`, `ahead_stride` apart, are prefetched from the piece after it: the table has one address more
    than pieces.
    """

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        none = b.append_basic_block("none")
        switch = b.switch(args[3], none)
        for count in range(2, MAX_ROWS + 1, 2):
            with b.goto_block(b.append_basic_block(f"rows_{count}")):
                switch.add_case(_i(count - 1), b.block)
                switch.add_case(_i(count), b.block)
                b.call(_product_function(b.module, kind, ahead_kind, count), args[2:])
                b.branch(none)
        b.position_at_end(none)
        return context.get_dummy_value()

    return types.void(kind, ahead_kind, *[types.intp] * 11), generate


def _product_function(module: ir.Module, kind: types.Type, ahead_kind: types.Type, rows: int) -> ir.Function:
    """For an even number of rows, the last of which may be missing. Called, not inlined: it is compiled once."""
    name = f"moegen_product_{kind}_{ahead_kind}_{rows}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64] * 11), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    b = ir.IRBuilder(function.append_basic_block())
    _product(b, kind, BLOCK * _bytes(ahead_kind), rows, *function.args)
    b.ret_void()
    return function


def _product(  # type: ignore[no-untyped-def]
    b,
    kind,
    ahead_bytes,
    rows,
    fresh,
    given,
    depth,
    x,
    panels,
    panel_rows,
    offset,
    stride,
    ahead_stride,
    out,
    out_stride,
):
    size = _bytes(kind)
    own = [_i(r) for r in range(rows - 1)] + [b.sub(given, _i(1))]  # a missing row is the one before it, once more
    outs = [[b.add(_at(b, out, b.mul(out_stride, r), 4), _i(4 * LANES * v)) for v in range(2)] for r in own]
    is_fresh = b.icmp_signed("!=", fresh, _i(0))
    starts = [[b.select(is_fresh, _vf(0.0), _load(b, at, _VF)) for at in row] for row in outs]
    sums = [[cgutils.alloca_once_value(b, start) for start in row] for row in starts]
    with cgutils.for_range_slice(b, _i(0), depth, panel_rows, inc=True) as (done, piece):
        panel = b.add(_load(b, _at(b, panels, piece, 8), _I64), offset)
        ahead = b.add(_load(b, _at(b, panels, b.add(piece, _i(1)), 8), _I64), offset)
        left = b.sub(depth, done)
        with cgutils.for_range(b, b.select(b.icmp_signed("<", left, panel_rows), left, panel_rows)) as loop:
            next_row = _at(b, ahead, b.mul(loop.index, ahead_stride), ahead_bytes // BLOCK)
            for line in range(0, ahead_bytes, _LINE_BYTES):
                _prefetch(b, b.add(next_row, _i(line)))
            at = _at(b, panel, b.mul(loop.index, stride), size)
            columns = [_float(b, b.add(at, _i(v * LANES * size)), kind) for v in range(2)]
            column_x = _at(b, x, b.add(done, loop.index), 4)
            for r in range(rows):
                factor = _splat(b, _load(b, _at(b, column_x, own[r], 4 * X_STRIDE), _F32))
                for column, sum_ in zip(columns, sums[r], strict=True):
                    b.store(_call(b, "fma", factor, column, b.load(sum_)), sum_)
    for row, kept in zip(outs, sums, strict=True):
        for at, sum_ in zip(row, kept, strict=True):
            _store(b, b.load(sum_), at)


@intrinsic
def transpose(typing, kind, source, stride, last, to, to_stride):  # type: ignore[no-untyped-def]
    """`to[d, c] = source[min(c, last), d]` as float32 for LANES rows c, and LANES words of columns d.

    A word is one float32, or two bfloat16.
    """

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        _, source, stride, last, to, to_stride = args
        size = _bytes(kind)
        rows = []
        for c in range(LANES):
            own = b.select(b.icmp_signed("<", _i(c), last), _i(c), last)
            rows.append(_load(b, _at(b, source, b.mul(own, stride), size), _V32))
        for n, column in enumerate(_transposed(b, rows)):
            if kind == types.float32:
                halves = [column]
            else:
                halves = [b.shl(column, _vi([16] * LANES)), b.and_(column, _vi([0xFFFF0000] * LANES))]
            for half, value in enumerate(halves):
                _store(b, value, _at(b, to, to_stride, 4 * (len(halves) * n + half)))
        return context.get_dummy_value()

    return types.void(kind, *[types.intp] * 5), generate


def _transposed(b: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Blocks of twice `distance` swap their off-diagonal quarters."""
    rows = list(rows)
    distance = 1
    while distance < LANES:
        upper = _vi([LANES + (k ^ distance) if k & distance else k for k in range(LANES)])
        lower = _vi([LANES + k if k & distance else k ^ distance for k in range(LANES)])
        for i in range(LANES):
            if not i & distance:
                pair = rows[i], rows[i | distance]
                rows[i], rows[i | distance] = b.shuffle_vector(*pair, upper), b.shuffle_vector(*pair, lower)
        distance *= 2
    return rows


@intrinsic
def scale(typing, row, vectors, factor):  # type: ignore[no-untyped-def]
    """`row *= factor`."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        row, vectors, factor = args
        factors = _splat(b, factor)
        with cgutils.for_range(b, vectors) as loop:
            at = _at(b, row, loop.index, 4 * LANES)
            _store(b, b.fmul(_load(b, at, _VF), factors), at)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32), generate


@intrinsic
def clear(typing, row, vectors):  # type: ignore[no-untyped-def]
    """`row = 0`."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        with cgutils.for_range(b, args[1]) as loop:
            _store(b, _vf(0.0), _at(b, args[0], loop.index, 4 * LANES))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def soften(typing, row, vectors, low, high, best, total):  # type: ignore[no-untyped-def]
    """One step of the online softmax: scores become weights relative to the new maximum. Returns the factor for sums.

    At least one column lies in [low, high); the others weigh 0. `best` and `total` are the addresses of the running
    maximum and sum; sums of weighted values from before must be multiplied by the factor.
    """

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        row, vectors, low, high, best, total = args
        before = _splat(b, _load(b, best, _F32))
        top, sum_ = cgutils.alloca_once_value(b, before), cgutils.alloca_once_value(b, _vf(0.0))
        low, high = (_splat(b, b.trunc(bound, _I32)) for bound in (low, high))
        with cgutils.for_range(b, vectors) as loop:
            at = _at(b, row, loop.index, 4 * LANES)
            first = _splat(b, b.trunc(b.mul(loop.index, _i(LANES)), _I32))
            column = b.add(first, _vi(list(range(LANES))))
            inside = b.and_(b.icmp_signed(">=", column, low), b.icmp_signed("<", column, high))
            score = b.select(inside, _load(b, at, _VF), _vf(float("-inf")))
            _store(b, score, at)
            b.store(_greater(b, score, b.load(top)), top)
        maximum = _reduce(b, b.load(top), _greater)
        after = _splat(b, maximum)
        with cgutils.for_range(b, vectors) as loop:
            at = _at(b, row, loop.index, 4 * LANES)
            weight = _exp(b, b.fsub(_load(b, at, _VF), after))
            _store(b, weight, at)
            b.store(b.fadd(b.load(sum_), weight), sum_)
        shrink = b.extract_element(_exp(b, b.fsub(before, after)), ir.Constant(_I32, 0))
        kept = b.fmul(shrink, _load(b, total, _F32))
        _store(b, b.fadd(kept, _reduce(b, b.load(sum_), _sum)), total)
        _store(b, maximum, best)
        return shrink

    return types.float32(*[types.intp] * 6), generate


@intrinsic
def softcap(typing, row, vectors, cap):  # type: ignore[no-untyped-def]
    """`row = cap * tanh(row / cap)`."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        row, vectors, cap = args
        caps = _splat(b, cap)
        with cgutils.for_range(b, vectors) as loop:
            at = _at(b, row, loop.index, 4 * LANES)
            ratio = b.fdiv(_load(b, at, _VF), caps)
            decay = _exp(b, b.fmul(_call(b, "fabs", ratio), _vf(-2.0)))
            tanh = b.fdiv(b.fsub(_vf(1.0), decay), b.fadd(_vf(1.0), decay))
            _store(b, b.fmul(caps, _call(b, "copysign", tanh, ratio)), at)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32), generate


@intrinsic
def take_number(typing, counter):  # type: ignore[no-untyped-def]
    """The integer at `counter`; the next taker, on any thread, gets one more."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        return b.atomic_rmw("add", b.inttoptr(args[0], _I64.as_pointer()), _i(1), "seq_cst")

    return types.intp(types.intp), generate
