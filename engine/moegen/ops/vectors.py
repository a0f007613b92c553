"""Vector instructions for Numba kernels: what its loop vectoriser would not find by itself.

Addresses are integers, strides are in elements. Arithmetic is float32. What is stored is float32, bfloat16 or codes,
told apart by `kind`: any value of the stored array's element type, uint16 for a bfloat16, which is the upper half of a
float32, and int8 for a code, which is taken as the number that it is.

What is worked with, `own`, is float32, or int32 for *pairs*: words of two bfloat16 that follow one another in the sums,
where the processor multiplies such words (`vector_ir.DOTS`). Their products are exact, and added in float32.

Numba caches a compiled kernel by its own file: after a change here, change the kernels that use it.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moegen.ops.vector_ir import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    LINE_BYTES,
    V32,
    VF,
    as_float,
    as_floats,
    at,
    call,
    dot,
    elements,
    exp_negative,
    greater,
    halves,
    i64,
    load,
    nbytes,
    prefetch,
    rounded_to_bfloat16,
    splat,
    store,
    transposed,
    v32,
    vf,
)

BLOCK = 2 * LANES  # columns of a product
MAX_ROWS = 6 if LANES == 8 else 8  # of a product: two accumulators each, in the 16 registers of AVX2 or 32 elsewhere
DEPTH = 128  # of a product
SOFT_ROWS = 4  # of a softmax
X_STRIDE = DEPTH + 16  # elements: known when compiling, a whole number of cache lines, and no power of two


def _sum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.fadd(x, y)


def _reduce(b: ir.IRBuilder, vector: ir.Value, combine: Callable[..., ir.Value]) -> ir.Value:
    """All lanes combined, always in the same order."""
    distance = LANES // 2
    while distance:
        other = b.shuffle_vector(vector, vector, v32([lane ^ distance for lane in range(LANES)]))
        vector = combine(b, vector, other)
        distance //= 2
    return b.extract_element(vector, ir.Constant(I32, 0))


@intrinsic
def widen(typing, kind, source, to):  # type: ignore[no-untyped-def]
    """Copies the one element at `source` to `to`, as float32."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        store(b, as_float(b, args[1], kind), args[2])
        return context.get_dummy_value()

    return types.void(kind, types.intp, types.intp), generate


@intrinsic
def widen_block(typing, kind, source, to):  # type: ignore[no-untyped-def]
    """Copies BLOCK elements at `source` to `to`, as float32."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        for vector in range(BLOCK // LANES):
            place = b.add(args[1], i64(vector * LANES * nbytes(kind)))
            store(b, as_floats(b, place, kind), b.add(args[2], i64(4 * vector * LANES)))
        return context.get_dummy_value()

    return types.void(kind, types.intp, types.intp), generate


@intrinsic
def get(typing, address):  # type: ignore[no-untyped-def]
    """The integer at `address`."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        return load(b, args[0], I64)

    return types.intp(types.intp), generate


@intrinsic
def get_float(typing, address):  # type: ignore[no-untyped-def]
    """The float32 at `address`."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        return load(b, args[0], F32)

    return types.float32(types.intp), generate


@intrinsic
def put(typing, address, value):  # type: ignore[no-untyped-def]
    """Stores an integer (8 bytes), or a float (4), at `address`."""
    stored = types.float32 if isinstance(value, types.Float) else types.intp

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        store(b, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.intp, stored), generate


@intrinsic
def element_bytes(typing, kind):  # type: ignore[no-untyped-def]
    """Of what is stored."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        return i64(nbytes(kind))

    return types.intp(kind), generate


@intrinsic
def own_size(typing, own):  # type: ignore[no-untyped-def]
    """The bytes of one element of what is worked with: of a pair, half of its word."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        return i64(2 if own == types.int32 else 4)

    return types.intp(own), generate


@intrinsic
def product(  # type: ignore[no-untyped-def]
    typing, kind, own, ahead_kind, fresh, rows, depth, x, panels, panel_rows, offset, stride, aheads, ahead_offset,
    ahead_stride, out, out_stride,
):  # fmt: skip
    """`out[r, :BLOCK] = sum over k < depth of x[r, k] * panel[k, :BLOCK]`; `+=` unless fresh.

    At most MAX_ROWS rows of `own`, X_STRIDE words apart in `x`, and a depth of at most DEPTH. The panel is of `kind`,
    which may be `own`, and lies in pieces of `panel_rows` rows, `offset` bytes after each address in the table
    `panels`. At row k of a piece, BLOCK elements of `ahead_kind` are prefetched, `ahead_offset + k * ahead_stride`
    bytes after the piece's address in the table `aheads`. Pairs are pairs of rows: a panel of pairs has `stride` words
    from one to the next; of one that is bfloat16, the last row's partner, where there is none, is itself.
    """

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        none = b.append_basic_block("none")
        switch = b.switch(args[4], none)
        for count in range(2, MAX_ROWS + 1, 2):
            with b.goto_block(b.append_basic_block(f"rows_{count}")):
                switch.add_case(i64(count - 1), b.block)
                switch.add_case(i64(count), b.block)
                b.call(_product_function(b.module, kind, own, ahead_kind, count), args[3:])
                b.branch(none)
        b.position_at_end(none)
        return context.get_dummy_value()

    return types.void(kind, own, ahead_kind, *[types.intp] * 13), generate


def _product_function(
    module: ir.Module, kind: types.Type, own: types.Type, ahead_kind: types.Type, rows: int
) -> ir.Function:
    """For an even number of rows, the last of which may be missing. Called, not inlined: it is compiled once."""
    name = f"moegen_product_{kind}_{own}_{ahead_kind}_{rows}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 13), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    b = ir.IRBuilder(function.append_basic_block())
    _product(b, kind, own, BLOCK * nbytes(ahead_kind), rows, *function.args)
    b.ret_void()
    return function


def _product(  # type: ignore[no-untyped-def]
    b, kind, own, ahead_bytes, rows, fresh, given, depth, x, panels, panel_rows, offset, stride, aheads, ahead_offset,
    ahead_stride, out, out_stride,
):  # fmt: skip
    paired = own == types.int32
    order = _column_order(kind, own)
    places = [i64(r) for r in range(rows - 1)] + [b.sub(given, i64(1))]  # a missing row is the one before, once more
    outs = [[b.add(at(b, out, b.mul(out_stride, r), 4), i64(4 * LANES * v)) for v in range(2)] for r in places]
    is_fresh = b.icmp_signed("!=", fresh, i64(0))
    starts = [_ordered(b, [b.select(is_fresh, vf(0.0), load(b, place, VF)) for place in row], order) for row in outs]
    sums = [[cgutils.alloca_once_value(b, start) for start in row] for row in starts]
    each = 2 if paired else 1  # rows of a panel at once
    steps, piece_steps = (b.ashr(b.add(rows_, i64(each - 1)), i64(each - 1)) for rows_ in (depth, panel_rows))
    with cgutils.for_range_slice(b, i64(0), steps, piece_steps, inc=True) as (done, piece):
        panel = b.add(load(b, at(b, panels, piece, 8), I64), offset)
        ahead = b.add(load(b, at(b, aheads, piece, 8), I64), ahead_offset)
        left = b.sub(steps, done)
        with cgutils.for_range(b, b.select(b.icmp_signed("<", left, piece_steps), left, piece_steps)) as loop:
            for part in range(each):
                ahead_row = b.add(ahead, b.mul(at(b, i64(part), loop.index, each), ahead_stride))
                for line in range(0, ahead_bytes, LINE_BYTES):
                    prefetch(b, b.add(ahead_row, i64(line)), once=True)
            step = b.add(done, loop.index)
            if paired and kind == types.uint16:
                alone = b.icmp_signed(">=", at(b, i64(1), step, 2), depth)
                first = at(b, panel, b.mul(loop.index, stride), 2 * nbytes(kind))
                second = b.select(alone, first, at(b, first, stride, nbytes(kind)))
                columns = _interleaved(b, first, second, order)
            else:
                columns = _columns(b, at(b, panel, b.mul(loop.index, stride), nbytes(kind)), kind)
            column_x = at(b, x, step, 4)
            for place, row in zip(places, sums, strict=True):
                factor = splat(b, load(b, at(b, column_x, place, 4 * X_STRIDE), I32 if paired else F32))
                for column, sum_ in zip(columns, row, strict=True):
                    so_far = b.load(sum_)
                    more = dot(b, factor, column, so_far) if paired else call(b, "fma", factor, column, so_far)
                    b.store(more, sum_)
    back = [order.index(column) for column in range(BLOCK)]
    for row, kept in zip(outs, sums, strict=True):
        for place, end in zip(row, _ordered(b, [b.load(sum_) for sum_ in kept], back), strict=True):
            store(b, end, place)


def _column_order(kind: types.Type, own: types.Type) -> list[int]:
    """In which order a product holds its columns: that in which they are made of what is stored with least effort."""
    if kind != types.uint16:
        return list(range(BLOCK))
    if own == types.int32:  # words of two rows, which are interleaved by quarters of a vector
        quarters = [column // 4 for column in range(0, BLOCK, 4)]
        return [4 * quarter + n for odd in range(2) for quarter in quarters[odd::2] for n in range(4)]
    return [*range(0, BLOCK, 2), *range(1, BLOCK, 2)]  # two bfloat16 of a word are widened at once


def _ordered(b: ir.IRBuilder, vectors: list[ir.Value], order: list[int]) -> list[ir.Value]:
    """Both vectors' elements in another order."""
    if order == list(range(BLOCK)):
        return vectors
    return [b.shuffle_vector(*vectors, v32(half)) for half in (order[:LANES], order[LANES:])]


def _columns(b: ir.IRBuilder, place: ir.Value, kind: types.Type) -> list[ir.Value]:
    """BLOCK elements, or pairs, as products take them."""
    if kind == types.uint16:
        return halves(b, load(b, place, V32))
    if kind == types.int32:
        return [load(b, b.add(place, i64(4 * v * LANES)), V32) for v in range(2)]
    return [as_floats(b, b.add(place, i64(v * LANES * nbytes(kind))), kind) for v in range(2)]


def _interleaved(b: ir.IRBuilder, first: ir.Value, second: ir.Value, order: list[int]) -> list[ir.Value]:
    """Pairs of BLOCK bfloat16 of two rows, column by column in this order."""
    both = [load(b, row, ir.VectorType(I16, BLOCK)) for row in (first, second)]
    mixes = [[row * BLOCK + column for column in half for row in range(2)] for half in (order[:LANES], order[LANES:])]
    return [b.bitcast(b.shuffle_vector(*both, ir.Constant(ir.VectorType(I32, BLOCK), mix)), V32) for mix in mixes]


@intrinsic
def pair_block(typing, first, second, to):  # type: ignore[no-untyped-def]
    """Copies BLOCK bfloat16 of two rows to `to`, as pairs."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        for v, pairs in enumerate(_interleaved(b, args[0], args[1], list(range(BLOCK)))):
            store(b, pairs, b.add(args[2], i64(4 * v * LANES)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@intrinsic
def transpose(typing, kind, own, source, stride, last, to, to_stride):  # type: ignore[no-untyped-def]
    """`to[d, c] = source[min(c, last), d]` as `own`, for LANES rows c, and LANES words of columns d.

    A word is one float32, two bfloat16 (which are a pair) or four codes.
    """

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        _, _, source, stride, last, to, to_stride = args
        size = nbytes(kind)
        rows = []
        for c in range(LANES):
            row = b.select(b.icmp_signed("<", i64(c), last), i64(c), last)
            rows.append(load(b, at(b, source, b.mul(row, stride), size), V32))
        for n, column in enumerate(transposed(b, rows)):
            values = [column] if own == types.int32 else elements(b, column, kind)
            for part, value in enumerate(values):
                store(b, value, at(b, to, to_stride, 4 * (len(values) * n + part)))
        return context.get_dummy_value()

    return types.void(kind, own, *[types.intp] * 5), generate


@intrinsic
def take_scaled(typing, own, source, count, factor, to):  # type: ignore[no-untyped-def]
    """`to[:count] = factor * source[:count]`, rounded if they are to be pairs, then whole vectors."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        _, source, count, factor, to = args
        rounded = own == types.int32
        vectors = b.sdiv(count, i64(LANES))
        with cgutils.for_range(b, vectors) as loop:
            value = b.fmul(splat(b, factor), load(b, at(b, source, loop.index, 4 * LANES), VF))
            size = 2 if rounded else 4
            store(b, rounded_to_bfloat16(b, value) if rounded else value, at(b, to, loop.index, size * LANES))
        if not rounded:
            with cgutils.for_range(b, count, start=b.mul(vectors, i64(LANES))) as loop:
                store(b, b.fmul(factor, load(b, at(b, source, loop.index, 4), F32)), at(b, to, loop.index, 4))
        return context.get_dummy_value()

    return types.void(own, *[types.intp] * 2, types.float32, types.intp), generate


@intrinsic
def add_scaled(typing, source, count, factor, to):  # type: ignore[no-untyped-def]
    """`to[:count] += factor * source[:count]`."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        source, count, factor, to = args
        vectors = b.sdiv(count, i64(LANES))
        for kind, first, end in ((VF, i64(0), vectors), (F32, b.mul(vectors, i64(LANES)), count)):
            with cgutils.for_range(b, end, start=first) as loop:
                width = 4 * LANES if kind == VF else 4
                place = at(b, to, loop.index, width)
                factors = splat(b, factor) if kind == VF else factor
                added = b.fmul(factors, load(b, at(b, source, loop.index, width), kind))
                store(b, b.fadd(load(b, place, kind), added), place)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 2, types.float32, types.intp), generate


@intrinsic
def scale(typing, row, vectors, factor):  # type: ignore[no-untyped-def]
    """`row *= factor`, which is at an address."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        row, vectors, factor = args
        factors = splat(b, load(b, factor, F32))
        with cgutils.for_range(b, vectors) as loop:
            place = at(b, row, loop.index, 4 * LANES)
            store(b, b.fmul(load(b, place, VF), factors), place)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@intrinsic
def multiply(typing, row, vectors, factors):  # type: ignore[no-untyped-def]
    """`row *= factors`, element by element."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        row, vectors, factors = args
        with cgutils.for_range(b, vectors) as loop:
            place = at(b, row, loop.index, 4 * LANES)
            store(b, b.fmul(load(b, place, VF), load(b, at(b, factors, loop.index, 4 * LANES), VF)), place)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@intrinsic
def fetch(typing, address, count):  # type: ignore[no-untyped-def]
    """Asks memory for the cache lines of so many bytes from `address` on, which are read once."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        lines = b.udiv(b.add(args[1], i64(LINE_BYTES - 1)), i64(LINE_BYTES))
        with cgutils.for_range(b, lines) as loop:
            prefetch(b, at(b, args[0], loop.index, LINE_BYTES), once=True)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def clear(typing, row, vectors):  # type: ignore[no-untyped-def]
    """`row = 0`."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        with cgutils.for_range(b, args[1]) as loop:
            store(b, vf(0.0), at(b, args[0], loop.index, 4 * LANES))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def soften(typing, own, rows, row, vectors, low, high, best, total, shrink):  # type: ignore[no-untyped-def]
    """One step of the online softmax: scores become weights, `own`, relative to the new maximum.

    At most SOFT_ROWS rows, X_STRIDE elements apart; alone, each would mostly wait for itself. At least one column lies
    in [low, high); the others weigh 0. `best`, `total` and `shrink` are the addresses of each row's running maximum and
    sum, and of the factor by which sums of weighted values from before must be multiplied.
    """

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        _, rows, row, vectors, low, high, best, total, shrink = args
        bounds = [splat(b, b.trunc(bound, I32)) for bound in (low, high)]
        _soften(
            b, own, rows, row, vectors, best, total, shrink, lambda vector: [_inside(b, vector, *bounds)] * SOFT_ROWS
        )
        return context.get_dummy_value()

    return types.void(own, *[types.intp] * 8), generate


@intrinsic
def soften_queries(typing, own, rows, row, vectors, low, high, end, best, total, shrink):  # type: ignore[no-untyped-def]
    """`soften` of rows of consecutive queries: columns [low + r, high + r) of row r, before `end`."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        _, rows, row, vectors, low, high, end, best, total, shrink = args
        first, after, last = (splat(b, b.trunc(bound, I32)) for bound in (low, high, end))
        steps = [splat(b, b.trunc(row, I32)) for row in _own_rows(b, rows)]

        def inside(vector: ir.Value) -> list[ir.Value]:
            there = _inside(b, vector, first, last)
            seen = [_inside(b, vector, b.add(first, step), b.add(after, step)) for step in steps]
            return [b.and_(there, own_columns) for own_columns in seen]

        _soften(b, own, rows, row, vectors, best, total, shrink, inside)
        return context.get_dummy_value()

    return types.void(own, *[types.intp] * 9), generate


def _soften(  # type: ignore[no-untyped-def]
    b, own, rows, row, vectors, best, total, shrink, inside: Callable[[ir.Value], list[ir.Value]]
):  # fmt: skip
    """`inside(vector)`: for each row, which columns of this vector count. Weights that are rounded take half the place
    of their scores, and are summed before."""
    rounded = own == types.int32
    own_rows = _own_rows(b, rows)
    bests, totals, shrinks = ([at(b, place, r, 4) for r in own_rows] for place in (best, total, shrink))
    starts = [at(b, row, r, 4 * X_STRIDE) for r in own_rows]
    before = [splat(b, load(b, place, F32)) for place in bests]
    tops = [cgutils.alloca_once_value(b, value) for value in before]
    with cgutils.for_range(b, vectors) as loop:
        for start, seen, top in zip(starts, inside(loop.index), tops, strict=True):
            score = b.select(seen, load(b, at(b, start, loop.index, 4 * LANES), VF), vf(float("-inf")))
            b.store(greater(b, score, b.load(top)), top)
    maxima = [_reduce(b, b.load(top), greater) for top in tops]
    afters = [splat(b, maximum) for maximum in maxima]
    sums = [cgutils.alloca_once_value(b, vf(0.0)) for _ in own_rows]
    with cgutils.for_range(b, vectors) as loop:
        scores = [load(b, at(b, start, loop.index, 4 * LANES), VF) for start in starts]
        places = [at(b, start, loop.index, (2 if rounded else 4) * LANES) for start in starts]
        for place, score, seen, after, sum_ in zip(places, scores, inside(loop.index), afters, sums, strict=True):
            weight = b.select(seen, exp_negative(b, b.fsub(score, after)), vf(0.0))
            store(b, rounded_to_bfloat16(b, weight) if rounded else weight, place)
            b.store(b.fadd(b.load(sum_), weight), sum_)
    factors = [
        b.extract_element(exp_negative(b, b.fsub(old, new)), ir.Constant(I32, 0))
        for old, new in zip(before, afters, strict=True)
    ]
    kept = [b.fmul(factor, load(b, place, F32)) for factor, place in zip(factors, totals, strict=True)]
    for r in range(SOFT_ROWS):
        store(b, b.fadd(kept[r], _reduce(b, b.load(sums[r]), _sum)), totals[r])
        store(b, maxima[r], bests[r])
        store(b, factors[r], shrinks[r])


def _own_rows(b: ir.IRBuilder, rows: ir.Value) -> list[ir.Value]:
    """A missing row is the last one once more: all is read before anything is written, and written twice the same."""
    last = b.sub(rows, i64(1))
    return [b.select(b.icmp_signed("<", i64(r), last), i64(r), last) for r in range(SOFT_ROWS)]


def _inside(b: ir.IRBuilder, vector: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    """Which columns of a row's vector lie in [low, high)."""
    column = b.add(splat(b, b.trunc(b.mul(vector, i64(LANES)), I32)), v32(list(range(LANES))))
    return b.and_(b.icmp_signed(">=", column, low), b.icmp_signed("<", column, high))


@intrinsic
def gate_row(typing, kind, x, features, gated, out):  # type: ignore[no-untyped-def]
    """`out = silu(x[:features])`, times `x[features : 2 * features]` if gated; `out` has the dtype of `kind`."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
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

    return types.void(kind, types.intp, types.intp, types.boolean, types.intp), generate


def _silu(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """`x / (1 + e^-x)`, by a power that cannot overflow."""
    decay = exp_negative(b, b.fneg(call(b, "fabs", x)))
    positive = b.fcmp_ordered(">=", x, vf(0.0))
    return b.fdiv(b.select(positive, x, b.fmul(x, decay)), b.fadd(vf(1.0), decay))


@intrinsic
def softcap(typing, row, vectors, cap):  # type: ignore[no-untyped-def]
    """`row = cap * tanh(row / cap)`."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        row, vectors, cap = args
        caps = splat(b, cap)
        with cgutils.for_range(b, vectors) as loop:
            place = at(b, row, loop.index, 4 * LANES)
            ratio = b.fdiv(load(b, place, VF), caps)
            decay = exp_negative(b, b.fmul(call(b, "fabs", ratio), vf(-2.0)))
            tanh = b.fdiv(b.fsub(vf(1.0), decay), b.fadd(vf(1.0), decay))
            store(b, b.fmul(caps, call(b, "copysign", tanh, ratio)), place)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32), generate


@intrinsic
def take_number(typing, counter):  # type: ignore[no-untyped-def]
    """The integer at `counter`; the next taker, on any thread, gets one more."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        return b.atomic_rmw("add", b.inttoptr(args[0], I64.as_pointer()), i64(1), "seq_cst")

    return types.intp(types.intp), generate
