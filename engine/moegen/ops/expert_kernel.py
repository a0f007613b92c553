"""The expert GEMM on the CPU: few rows against many weights, read once, in the dtype in which they are stored.

BLAS libraries lay a weight matrix out anew at every call, which at a handful of rows costs more than the product. Here
weights lie in *panels* from the start: `PANEL` output features side by side, input after input. A tile of up to
`_TILE_ROWS` rows keeps its sums in vector registers while it walks down a panel: per input, the panel's weights are
loaded and widened to float32 once, and every row adds one broadcast and one multiply-add per vector. A bfloat16 or
float16 weight therefore costs two bytes of memory traffic and no accuracy: the arithmetic is float32.

Every output is one sum over the inputs in their order, whatever tile its row falls into: a row's result depends neither
on the rows beside it nor on the number of threads.

Compiled by Numba at first use (and cached on disk), so that installing needs no compiler. The tile is written as LLVM
vector operations, since auto-vectorisation does not keep its sums in registers.

Shape suffixes: T tokens, S rows sorted by expert, E experts, I inputs, O outputs, N panels, P = PANEL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from moegen.ops.kernel_cache import lock_kernel_cache
from moegen.ops.vector_ir import I64, LANES, LINE_BYTES, V32, VF, call, halves, i64, prefetch, splat, vf

lock_kernel_cache()


@dataclass(frozen=True)
class _Tile:
    """What fits the vector registers: `rows * vectors` sums, the weights of one input, one broadcast."""

    vectors: int  # per panel; even, since bfloat16 weights lie in pairs
    rows: int


_TILE = {
    16: _Tile(vectors=2, rows=14),  # 32 registers (AVX-512)
    8: _Tile(vectors=2, rows=6),  # 16 (AVX2)
    4: _Tile(vectors=4, rows=6),  # 32 (NEON)
}[LANES]
PANEL = LANES * _TILE.vectors
_TILE_ROWS = _TILE.rows
_ROW_BLOCK = 6 * _TILE_ROWS  # rows that meet an expert's panels before the next rows do: they stay in a core's cache


def row_width(inputs: int) -> int:
    """How wide rows of x should lie in memory.

    A tile reads the same place of all its rows at once: at a distance of a large power of two they would all fall
    into the same few lines of the first-level cache.
    """
    return inputs + 16 if inputs % 256 == 0 else inputs


BFLOAT16_BITS, FLOAT16_BITS = types.uint16, types.int16  # Numba has neither dtype: their bits travel so


def panel_places(bfloat16: bool) -> np.ndarray:
    """Where each of a panel's `PANEL` output features lies among the values of one input, `[P]`.

    Two vectors of bfloat16 share their 32-bit words, one in the lower halves and one in the upper, so that widening
    is one shift or one mask.
    """
    feature = np.arange(PANEL)
    if not bfloat16:
        return feature
    vector, lane = np.divmod(feature, LANES)
    return vector // 2 * (2 * LANES) + 2 * lane + vector % 2


def _load_weights(b: ir.IRBuilder, pointer: ir.Value, stored: types.Type) -> list[ir.Value]:
    """The float32 vectors of one input's `PANEL` weights."""

    def load(kind: ir.Type, index: int) -> ir.Value:
        place = b.gep(b.bitcast(pointer, kind.as_pointer()), [i64(index)])
        return b.load(place, align=2)

    if stored == types.float32:
        return [load(VF, v) for v in range(_TILE.vectors)]
    if stored == FLOAT16_BITS:
        float16 = ir.VectorType(ir.HalfType(), LANES)
        return [b.fpext(load(float16, v), VF) for v in range(_TILE.vectors)]
    assert stored == BFLOAT16_BITS
    return [half for pair in range(_TILE.vectors // 2) for half in halves(b, load(V32, pair))]


@intrinsic
def _tile(
    typing: Any, rows: Any, x: Any, tokens: Any, row: Any, panels: Any, expert: Any, panel: Any, out: Any, part: Any,
    parts: Any,
) -> Any:  # fmt: skip
    """`out[row : row + rows, panel * P : (panel + 1) * P] = x[tokens[row : row + rows]] @ panels[expert, panel]`.

    It is the tile `part` of `parts` that meet this panel, and fetches its share of the panel that follows in memory:
    else the first tile would wait for memory and the others leave it idle.
    """
    stored = panels.dtype
    signature = types.void(
        types.intp, x, tokens, types.intp, panels, types.intp, types.intp, out, types.intp, types.intp
    )

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        rows, _, _, row, _, expert, panel, _, part, parts = args
        x_view, tokens_view, panels_view, out_view = (
            context.make_array(signature.args[a])(context, b, args[a]) for a in (1, 2, 4, 7)
        )
        x_width = cgutils.unpack_tuple(b, x_view.shape)[1]
        outputs = cgutils.unpack_tuple(b, out_view.shape)[1]
        _, panels_per_expert, inputs, _ = cgutils.unpack_tuple(b, panels_view.shape)
        row_tokens = b.gep(tokens_view.data, [row])
        out_row = b.gep(out_view.data, [b.add(b.mul(row, outputs), b.mul(panel, i64(PANEL)))])
        index = b.mul(b.add(b.mul(expert, panels_per_expert), panel), b.mul(inputs, i64(PANEL)))
        weights = b.gep(panels_view.data, [index])
        following = b.ptrtoint(b.gep(weights, [b.mul(inputs, i64(PANEL))]), I64)
        input_bytes = i64(PANEL * stored.bitwidth // 8)
        ahead = b.add(following, b.sdiv(b.mul(b.mul(part, inputs), input_bytes), parts))
        ahead_step = b.sdiv(input_bytes, parts)
        end = b.append_basic_block("tile.end")
        choice = b.switch(rows, end)
        for count in range(1, _TILE.rows + 1):
            block = b.append_basic_block(f"tile.{count}")
            choice.add_case(i64(count), block)
            b.position_at_end(block)
            places = [b.load(b.gep(row_tokens, [i64(r)])) for r in range(count)]
            x_rows = [b.gep(x_view.data, [b.mul(place, x_width)]) for place in places]
            _emit_rows(b, x_rows, inputs, weights, stored, out_row, outputs, ahead, ahead_step)
            b.branch(end)
        b.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


def _emit_rows(
    b: ir.IRBuilder, x_rows: list[ir.Value], inputs: ir.Value, weights: ir.Value, stored: Any, out: ir.Value,
    outputs: ir.Value, ahead: ir.Value, ahead_step: ir.Value,
) -> None:  # fmt: skip
    """The loop over inputs for a tile of these rows; its sums are values of the loop, hence registers."""
    before, loop, after = b.block, b.append_basic_block("inputs"), b.append_basic_block("sums")
    b.branch(loop)
    b.position_at_end(loop)
    i = b.phi(I64)
    sums = [[b.phi(VF) for _ in range(_TILE.vectors)] for _ in x_rows]
    place = b.add(ahead, b.mul(i, ahead_step))
    for line in range(0, PANEL * stored.bitwidth // 8, LINE_BYTES):
        prefetch(b, b.add(place, i64(line)))
    vectors = _load_weights(b, b.gep(weights, [b.mul(i, i64(PANEL))]), stored)
    more = []
    for x_row, sum_row in zip(x_rows, sums, strict=True):
        value = splat(b, b.load(b.gep(x_row, [i])))
        more.append([call(b, "fma", value, vector, s) for vector, s in zip(vectors, sum_row, strict=True)])
    following = b.add(i, i64(1))
    b.cbranch(b.icmp_signed("<", following, inputs), loop, after)
    i.add_incoming(i64(0), before)
    i.add_incoming(following, loop)
    for sum_row, more_row in zip(sums, more, strict=True):
        for s, m in zip(sum_row, more_row, strict=True):
            s.add_incoming(vf(0.0), before)
            s.add_incoming(m, loop)
    b.position_at_end(after)
    for r, more_row in enumerate(more):
        for v, m in enumerate(more_row):
            place = b.gep(out, [b.add(b.mul(outputs, i64(r)), i64(v * LANES))])
            b.store(m, b.bitcast(place, VF.as_pointer()), align=4)


_CLAIMS = 8  # of shares of the work, per thread


@intrinsic
def _claim(typing: Any, next_share: Any) -> Any:
    """`next_share[0]`, which no other thread is given, and one more for whoever comes next."""

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        view = context.make_array(signature.args[0])(context, b, args[0])
        return b.atomic_rmw("add", view.data, i64(1), "monotonic")

    return types.intp(next_share), codegen


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def grouped_panels(x_TI, tokens_S, panels_ENIP, starts_E1, out_SO, threads):  # type: ignore[no-untyped-def]
    """`out[starts[e] : starts[e + 1]] = x[tokens[starts[e] : starts[e + 1]]] @ W[e].T` for every expert, O = N * P.

    Rows of `x` may be wider than the I inputs: see `row_width`. The work is rows times panels, so that a popular expert
    is shared by several threads. A thread that is done claims the next share, and shares grow smaller: a core that the
    operating system, or a virtual machine's host, gives to others for a while leaves more to the rest.
    """
    experts, panels = panels_ENIP.shape[:2]
    work = starts_E1[experts] * panels
    shares = threads * _CLAIMS if threads > 1 else 1
    next_share = np.zeros(1, np.int64)
    for _ in numba.prange(threads):
        share = _claim(next_share)
        while share < shares:
            work_from = work - work * (shares - share) ** 2 // shares**2
            work_to = work - work * (shares - share - 1) ** 2 // shares**2
            share = _claim(next_share)
            for expert in range(experts):
                first = starts_E1[expert]
                rows = starts_E1[expert + 1] - first
                panel_from, panel_to = own_panels(first, rows, panels, work_from, work_to)
                _panels(x_TI, tokens_S, panels_ENIP, expert, panel_from, panel_to, first, rows, out_SO)


@register_jitable
def own_panels(first, rows, panels, work_from, work_to):  # type: ignore[no-untyped-def]
    """Which panels of an expert, whose rows begin at `first`, a share of the work has; the first is not below the
    second where it has none."""
    if rows == 0:
        return 0, 0
    panel_from = max((work_from - first * panels + rows - 1) // rows, 0)
    return panel_from, min((work_to - first * panels + rows - 1) // rows, panels)


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _panels(x_TI, tokens_S, panels_ENIP, expert, panel_from, panel_to, first, rows, out_SO):  # type: ignore[no-untyped-def]
    """Some panels of one expert with all of its rows."""
    for block in range(0, rows, _ROW_BLOCK):
        block_rows = min(rows - block, _ROW_BLOCK)
        tiles = (block_rows + _TILE_ROWS - 1) // _TILE_ROWS
        for panel in range(panel_from, panel_to):
            for tile in range(tiles):  # of nearly equal height: a short last one would waste the machine
                top = block_rows * tile // tiles
                height = block_rows * (tile + 1) // tiles - top
                _tile(height, x_TI, tokens_S, first + block + top, panels_ENIP, expert, panel, out_SO, tile, tiles)


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def add_weighted_rows(out_TD, tokens_S, weights_S, answer_SD, threads):  # type: ignore[no-untyped-def]
    """`out[tokens[s]] += weights[s] * answer[s]`, pair after pair; threads share the columns, so that none collide."""
    width = out_TD.shape[1]
    for thread in numba.prange(threads):
        left, right = width * thread // threads, width * (thread + 1) // threads
        for s in range(tokens_S.shape[0]):
            token, weight = tokens_S[s], weights_S[s]
            for d in range(left, right):
                out_TD[token, d] += weight * answer_SD[s, d]
