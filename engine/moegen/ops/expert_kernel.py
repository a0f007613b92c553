"""The expert GEMM on the CPU: few rows against many weights, read once, in the dtype in which they are stored.

BLAS libraries lay a weight matrix out anew at every call, which at a handful of rows costs more than the product. Here
weights lie in *panels* from the start: `PANEL` output features side by side, input after input. A tile of up to
`TILE_ROWS` rows keeps its sums in vector registers while it walks down a panel: per input, the panel's weights are
loaded and widened to float32 once, and every row adds one broadcast and one multiply-add per vector. A bfloat16 or
float16 weight therefore costs two bytes of memory traffic and no accuracy: the arithmetic is float32.

Where the processor multiplies bfloat16 itself, weights and rows may also come as *pairs*: words that hold two
consecutive inputs in bfloat16 each. A word takes one instruction where a float32 takes one, so products take half the
time; they are exact, and added in float32.

Every output is one sum over the inputs in their order, whatever tile its row falls into: a row's result depends neither
on the rows beside it nor on the number of threads.

Compiled by Numba at first use (and cached on disk), so that installing needs no compiler. The tile is written as LLVM
vector operations, since auto-vectorisation does not keep its sums in registers. Numba caches a compiled kernel by its
own file: after a change in `moegen.ops.vectors` change this one, and after one here `moegen.ops.code_kernel`, which
uses these tiles.

Gated experts need not write gates and ups to memory: a thread that has a panel of each, for some rows, makes of them
the rows of the next product while they are in its cache.

Shape suffixes: T tokens, S rows sorted by expert, E experts, I inputs, O outputs, N panels, P = PANEL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from moegen.ops.kernel_cache import lock_kernel_cache
from moegen.ops.vector_ir import I64, LANES, LINE_BYTES, V32, VF, call, dot, halves, i64, prefetch, splat, vf
from moegen.ops.vectors import element_bytes, gate_row

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
TILE_ROWS = _TILE.rows
_ROW_BLOCK = 6 * TILE_ROWS  # rows that meet an expert's panels before the next rows do: they stay in a core's cache


def row_width(inputs: int) -> int:
    """How wide rows should lie in memory.

    A tile reads, and writes, the same place of all its rows at once: at a distance of a large power of two they would
    all fall into the same few lines of the first-level cache.
    """
    return inputs + 16 if inputs % 256 == 0 else inputs


BFLOAT16_BITS, FLOAT16_BITS = types.uint16, types.int16  # Numba has neither dtype: their bits travel so
BFLOAT16_PAIRS = types.int32  # the first in the lower half


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
    """The float32 vectors of one input's `PANEL` weights; words, of a pair of inputs."""

    def load(kind: ir.Type, index: int) -> ir.Value:
        place = b.gep(b.bitcast(pointer, kind.as_pointer()), [i64(index)])
        return b.load(place, align=2)

    if stored == types.float32:
        return [load(VF, v) for v in range(_TILE.vectors)]
    if stored == BFLOAT16_PAIRS:
        return [load(V32, v) for v in range(_TILE.vectors)]
    if stored == FLOAT16_BITS:
        float16 = ir.VectorType(ir.HalfType(), LANES)
        return [b.fpext(load(float16, v), VF) for v in range(_TILE.vectors)]
    assert stored == BFLOAT16_BITS
    return [half for pair in range(_TILE.vectors // 2) for half in halves(b, load(V32, pair))]


@intrinsic
def _tile(
    typing: Any, rows: Any, x: Any, tokens: Any, row: Any, panels: Any, expert: Any, panel: Any, following: Any,
    out: Any, out_width: Any, part: Any, parts: Any,
) -> Any:  # fmt: skip
    """`out[:rows, :P] = x[tokens[row : row + rows]] @ panels[expert, panel]`, for an address `out` of floats whose rows
    are `out_width` apart.

    It is the tile `part` of `parts` that meet this panel, and fetches its share of the panel `following`: else the
    first tile would wait for memory and the others leave it idle.
    """
    signature = types.void(types.intp, x, tokens, types.intp, panels, *[types.intp] * 7)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        rows, x, tokens, row, panels, expert, panel, following, out, out_width, part, parts = _views(
            context, b, signature, args
        )
        stored = signature.args[4].dtype
        weights, inputs, ahead = _panel_and_next(b, panels, stored, expert, panel, following, part, parts)
        row_tokens, place = b.gep(tokens.data, [row]), b.inttoptr(out, ir.FloatType().as_pointer())

        def emit(count: int) -> None:
            x_rows = _rows_at(b, x, _loaded(b, row_tokens, count))
            _store_sums(b, _emit_rows(b, x_rows, inputs, weights, stored, _zeros(count), (ahead,)), place, out_width)

        _of_each_height(b, rows, emit)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _added_tile(
    typing: Any, rows: Any, x: Any, tokens: Any, weights: Any, row: Any, panels: Any, expert: Any, panel: Any,
    following: Any, out: Any, part: Any, parts: Any, next_x: Any, next_x_step: Any,
) -> Any:  # fmt: skip
    """`out[tokens[r], panel * P :] += weights[r] * (x[r] @ panels[expert, panel])` for `rows` rows r from `row` on, one
    after another: a token may be named twice.

    For the rest see `_tile`; beside, a line at the address `next_x`, and at so many bytes more per input, is fetched.
    """
    signature = types.void(
        types.intp, x, tokens, weights, types.intp, panels, *[types.intp] * 3, out, *[types.intp] * 4
    )

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        rows, x, tokens, weights, row, panels, expert, panel, following, out, part, parts, *next_x = _views(
            context, b, signature, args
        )
        stored = signature.args[5].dtype
        matrix, inputs, ahead = _panel_and_next(b, panels, stored, expert, panel, following, part, parts)
        row_tokens, row_weights = b.gep(tokens.data, [row]), b.gep(weights.data, [row])
        column = b.mul(panel, i64(PANEL))

        def emit(count: int) -> None:
            x_rows = _rows_at(b, x, [b.add(row, i64(r)) for r in range(count)])
            sums = _emit_rows(b, x_rows, inputs, matrix, stored, _zeros(count), (ahead, _Ahead(*next_x)))
            for r, place in enumerate(_rows_at(b, out, _loaded(b, row_tokens, count))):
                weight = splat(b, b.load(b.gep(row_weights, [i64(r)])))
                for v, own in enumerate(sums[r]):
                    at = _vector_at(b, place, b.add(column, i64(v * LANES)))
                    b.store(call(b, "fma", weight, own, b.load(at, align=4)), at, align=4)

        _of_each_height(b, rows, emit)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def add_tile(typing: Any, rows: Any, x: Any, tokens: Any, row: Any, first_input: Any, inputs: Any, weights: Any,
             sums: Any) -> Any:  # fmt: skip
    """`sums[row : row + rows] += x[tokens[row : row + rows], first_input : first_input + inputs] @ weights`.

    `weights` are `[inputs, P]` float32 and lie in the nearest cache; sums begin anew where `first_input` is 0.
    """
    signature = types.void(types.intp, x, tokens, types.intp, types.intp, types.intp, weights, sums)

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        rows, x, tokens, row, first_input, inputs, weights, sums = _views(context, b, signature, args)
        row_tokens, own_sums = b.gep(tokens.data, [row]), b.gep(sums.data, [b.mul(row, i64(PANEL))])
        anew = b.icmp_signed("==", first_input, i64(0))

        def emit(count: int) -> None:
            x_rows = [b.gep(x_row, [first_input]) for x_row in _rows_at(b, x, _loaded(b, row_tokens, count))]
            starts = [
                [
                    b.select(anew, vf(0.0), b.load(_vector_at(b, own_sums, i64(r * PANEL + v * LANES)), align=4))
                    for v in range(_TILE.vectors)
                ]
                for r in range(count)
            ]
            more = _emit_rows(b, x_rows, inputs, weights.data, types.float32, starts)
            _store_sums(b, more, own_sums, i64(PANEL))

        _of_each_height(b, rows, emit)
        return context.get_dummy_value()

    return signature, codegen


def _views(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> list[Any]:
    """The arguments, arrays as views of them."""
    return [
        context.make_array(kind)(context, b, value) if isinstance(kind, types.Array) else value
        for kind, value in zip(signature.args, args, strict=True)
    ]


def _of_each_height(b: ir.IRBuilder, rows: ir.Value, emit: Callable[[int], None]) -> None:
    """What `emit` emits for a tile of `rows` rows: code of its own for every number of them."""
    end = b.append_basic_block("tile.end")
    choice = b.switch(rows, end)
    for count in range(1, _TILE.rows + 1):
        block = b.append_basic_block(f"tile.{count}")
        choice.add_case(i64(count), block)
        b.position_at_end(block)
        emit(count)
        b.branch(end)
    b.position_at_end(end)


@dataclass(frozen=True)
class _Ahead:
    """What a tile fetches while it computes: for every input so many bytes from an address on, and on by a step."""

    address: ir.Value
    step: ir.Value
    nbytes: int = 1


def _panel_and_next(
    b: ir.IRBuilder, panels: Any, stored: types.Type, expert: ir.Value, panel: ir.Value, following: ir.Value,
    part: ir.Value, parts: ir.Value,
) -> tuple[ir.Value, ir.Value, _Ahead]:  # fmt: skip
    """A panel's weights, how many inputs it has, and the tile's share of `following`, counted over all experts."""
    _, panels_per_expert, inputs, _ = cgutils.unpack_tuple(b, panels.shape)
    own = b.add(b.mul(expert, panels_per_expert), panel)
    weights, next_weights = (b.gep(panels.data, [b.mul(one, b.mul(inputs, i64(PANEL)))]) for one in (own, following))
    nbytes = PANEL * stored.bitwidth // 8
    address = b.add(b.ptrtoint(next_weights, I64), b.sdiv(b.mul(b.mul(part, inputs), i64(nbytes)), parts))
    return weights, inputs, _Ahead(address, b.sdiv(i64(nbytes), parts), nbytes)


def _loaded(b: ir.IRBuilder, values: ir.Value, count: int) -> list[ir.Value]:
    return [b.load(b.gep(values, [i64(n)])) for n in range(count)]


def _rows_at(b: ir.IRBuilder, matrix: Any, rows: Sequence[ir.Value]) -> list[ir.Value]:
    """Where these rows of a matrix begin."""
    width = cgutils.unpack_tuple(b, matrix.shape)[1]
    return [b.gep(matrix.data, [b.mul(row, width)]) for row in rows]


def _zeros(rows: int) -> list[list[ir.Value]]:
    return [[vf(0.0)] * _TILE.vectors] * rows


def _vector_at(b: ir.IRBuilder, floats: ir.Value, index: ir.Value) -> ir.Value:
    return b.bitcast(b.gep(floats, [index]), VF.as_pointer())


def _store_sums(b: ir.IRBuilder, sums: list[list[ir.Value]], out: ir.Value, outputs: ir.Value) -> None:
    """A tile's, to rows `outputs` floats apart."""
    for r, sum_row in enumerate(sums):
        for v, own in enumerate(sum_row):
            b.store(own, _vector_at(b, out, b.add(b.mul(outputs, i64(r)), i64(v * LANES))), align=4)


def _emit_rows(
    b: ir.IRBuilder, x_rows: list[ir.Value], inputs: ir.Value, weights: ir.Value, stored: Any,
    starts: list[list[ir.Value]], ahead: Sequence[_Ahead] = (),
) -> list[list[ir.Value]]:  # fmt: skip
    """The loop over inputs for a tile of these rows; its sums are values of the loop, hence registers."""
    before, loop, after = b.block, b.append_basic_block("inputs"), b.append_basic_block("sums")
    b.branch(loop)
    b.position_at_end(loop)
    i = b.phi(I64)
    sums = [[b.phi(VF) for _ in range(_TILE.vectors)] for _ in x_rows]
    for fetched in ahead:
        place = b.add(fetched.address, b.mul(i, fetched.step))
        for line in range(0, fetched.nbytes, LINE_BYTES):
            prefetch(b, b.add(place, i64(line)))
    vectors = _load_weights(b, b.gep(weights, [b.mul(i, i64(PANEL))]), stored)
    more = []
    for x_row, sum_row in zip(x_rows, sums, strict=True):
        value = splat(b, b.load(b.gep(x_row, [i])))
        more.append(
            [
                dot(b, value, vector, s) if stored == BFLOAT16_PAIRS else call(b, "fma", value, vector, s)
                for vector, s in zip(vectors, sum_row, strict=True)
            ]
        )
    following = b.add(i, i64(1))
    b.cbranch(b.icmp_signed("<", following, inputs), loop, after)
    i.add_incoming(i64(0), before)
    i.add_incoming(following, loop)
    for sum_row, start_row, more_row in zip(sums, starts, more, strict=True):
        for s, start, m in zip(sum_row, start_row, more_row, strict=True):
            s.add_incoming(start, before)
            s.add_incoming(m, loop)
    b.position_at_end(after)
    return more


_CLAIMS = 8  # of shares of the work, per thread
_CLAIMS_OF_PANELS = 4  # where each share costs another reading of the rows


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

    Rows of `x` may be wider than the I inputs, those of `out` wider than O: see `row_width`. I counts pairs where rows
    and weights come so. The work is rows times panels, so that a popular expert is shared by several threads. A thread
    that is done claims the next share, and shares grow smaller: a core that the operating system, or a virtual
    machine's host, gives to others for a while leaves more to the rest.
    """
    next_share, out, width = np.zeros(1, np.int64), out_SO.ctypes.data, out_SO.shape[1]
    for _ in numba.prange(threads):
        for expert, first, end, panel_from, panel_to in claimed(next_share, threads, starts_E1, panels_ENIP.shape[1]):
            for row in range(first, end, _ROW_BLOCK):
                rows = min(end - row, _ROW_BLOCK)
                for panel in range(panel_from, panel_to):
                    to = out + (row * width + panel * PANEL) * 4
                    _panel(x_TI, tokens_S, row, rows, panels_ENIP, expert, panel, panel + 1, to, width)


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def joined_panels(x_TI, tokens_S, panels_ENIP, starts_E1, outs_P, panels_P1, threads):  # type: ignore[no-untyped-def]
    """As `grouped_panels`, of matrices side by side, with the same bits: what is of the panels `panels[p]` to before
    `panels[p + 1]` goes to the address `outs[p]`, rows with no gaps between them."""
    next_share = np.zeros(1, np.int64)
    for _ in numba.prange(threads):
        for expert, first, end, panel_from, panel_to in claimed(next_share, threads, starts_E1, panels_ENIP.shape[1]):
            for row in range(first, end, _ROW_BLOCK):
                rows, part = min(end - row, _ROW_BLOCK), 0
                for panel in range(panel_from, panel_to):
                    while panels_P1[part + 1] <= panel:
                        part += 1
                    width = (panels_P1[part + 1] - panels_P1[part]) * PANEL
                    to = outs_P[part] + (row * width + (panel - panels_P1[part]) * PANEL) * 4
                    _panel(x_TI, tokens_S, row, rows, panels_ENIP, expert, panel, panel + 1, to, width)


@numba.njit(nogil=True, error_model="numpy")
def _shares(next_share, threads, claims, work):  # type: ignore[no-untyped-def]
    """Of so much work, from where to where one thread has to do it, until nothing is left; about so many times."""
    shares = threads * claims if threads > 1 else 1
    share = _claim(next_share)
    while share < shares:
        work_from = work - work * (shares - share) ** 2 // shares**2
        work_to = work - work * (shares - share - 1) ** 2 // shares**2
        share = _claim(next_share)
        yield work_from, work_to


@numba.njit(nogil=True, error_model="numpy")
def claimed(next_share, threads, starts_E1, panels):  # type: ignore[no-untyped-def]
    """What one thread has to do, until nothing is left: an expert, where its rows begin and end, and some of its
    `panels`, from one to before another."""
    experts = len(starts_E1) - 1
    for work_from, work_to in _shares(next_share, threads, _CLAIMS, starts_E1[experts] * panels):
        for expert in range(experts):
            first, end = starts_E1[expert], starts_E1[expert + 1]
            rows = end - first
            if rows > 0:
                panel_from = max((work_from - first * panels + rows - 1) // rows, 0)
                panel_to = min((work_to - first * panels + rows - 1) // rows, panels)
                if panel_from < panel_to:
                    yield expert, first, end, panel_from, panel_to


@register_jitable
def tiles_of(rows):  # type: ignore[no-untyped-def]
    """How many tiles so many rows are cut into."""
    return (rows + TILE_ROWS - 1) // TILE_ROWS


@register_jitable
def tile_rows(rows, tile, tiles):  # type: ignore[no-untyped-def]
    """A tile's first row and its height. They are nearly equal: a short last one would waste the machine."""
    top = rows * tile // tiles
    return top, rows * (tile + 1) // tiles - top


@register_jitable
def _panel(  # type: ignore[no-untyped-def]
    x_TI, tokens_S, row, rows, panels_ENIP, expert, panel, following, out, out_width
):  # fmt: skip
    """One panel with some rows of its expert; `following` is another of its panels. For the rest see `_tile`."""
    following += expert * panels_ENIP.shape[1]
    tiles = tiles_of(rows)
    for tile in range(tiles):
        top, height = tile_rows(rows, tile, tiles)
        to = out + top * out_width * 4
        _tile(
            height, x_TI, tokens_S, row + top, panels_ENIP, expert, panel, following, to, out_width, tile, tiles
        )  # fmt: skip


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def grouped_gates(x_TI, tokens_S, panels_ENIP, starts_E1, kind, out, out_bytes, threads):  # type: ignore[no-untyped-def]
    """`silu(gate) * up`, of `kind`, at the address `out`, rows `out_bytes` apart: gate and up are the halves of what
    `grouped_panels` answers, whole panels each, but are never written to memory. Work is shared as there."""
    panels, next_share = panels_ENIP.shape[1] // 2, np.zeros(1, np.int64)
    for _ in numba.prange(threads):
        both_RP = np.empty((_ROW_BLOCK, 2 * PANEL), np.float32)  # of a panel of gates and one of ups
        for expert, first, end, panel_from, panel_to in claimed(next_share, threads, starts_E1, panels):
            for row in range(first, end, _ROW_BLOCK):
                rows = min(end - row, _ROW_BLOCK)
                for gate in range(panel_from, panel_to):
                    up, both, width = panels + gate, both_RP.ctypes.data, 2 * PANEL
                    _panel(x_TI, tokens_S, row, rows, panels_ENIP, expert, gate, up, both, width)
                    _panel(x_TI, tokens_S, row, rows, panels_ENIP, expert, up, gate + 1, both + PANEL * 4, width)
                    to = out + row * out_bytes + gate * PANEL * element_bytes(kind)
                    for r in range(rows):
                        gate_row(kind, both + r * width * 4, PANEL, True, to + r * out_bytes)


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def added_panels(x_SI, tokens_S, weights_S, panels_ENIP, starts_E1, anew, out_TO, threads):  # type: ignore[no-untyped-def]
    """`out[tokens[s]] += weights[s] * (x[s] @ W[e].T)` for the rows s of one expert e after another; to 0 if `anew`.

    To the bits of `grouped_panels` and then `add_weighted_rows`, but answers are never written to memory: a thread has
    some panels of all experts, so nobody else adds to these outputs. Rows are read anew for every share of panels; so
    shares are few, and while one block of rows is multiplied, the next is fetched.
    """
    experts, panels, next_share = panels_ENIP.shape[0], panels_ENIP.shape[1], np.zeros(1, np.int64)
    for _ in numba.prange(threads):
        for panel_from, panel_to in _shares(next_share, threads, _CLAIMS_OF_PANELS, panels):
            if anew:
                out_TO[:, panel_from * PANEL : panel_to * PANEL] = 0
            expert = _with_rows(starts_E1, 0)
            while expert < experts:
                expert_after = _with_rows(starts_E1, expert + 1)
                for row in range(starts_E1[expert], starts_E1[expert + 1], _ROW_BLOCK):
                    rows = min(starts_E1[expert + 1] - row, _ROW_BLOCK)
                    next_row = row + rows if row + rows < starts_E1[experts] else 0
                    next_rows = min(rows, starts_E1[experts] - next_row)
                    _added_block(
                        x_SI, tokens_S, weights_S, row, rows, next_row, next_rows, panels_ENIP, expert, panel_from,
                        panel_to, expert_after * panels + panel_from, out_TO,
                    )  # fmt: skip
                expert = expert_after


@register_jitable
def _added_block(  # type: ignore[no-untyped-def]
    x_SI, tokens_S, weights_S, row, rows, next_row, next_rows, panels_ENIP, expert, panel_from, panel_to, next_panel,
    out_TO,
):  # fmt: skip
    """Some panels with some rows of their expert; the rows that come next, and the panel, are fetched."""
    panels, inputs = panels_ENIP.shape[1], panels_ENIP.shape[2]
    row_bytes, tiles = x_SI.shape[1] * x_SI.itemsize, tiles_of(rows)
    next_x, next_bytes = x_SI.ctypes.data + next_row * row_bytes, next_rows * row_bytes
    parts, part = tiles * (panel_to - panel_from), 0
    for panel in range(panel_from, panel_to):
        following = next_panel if panel + 1 == panel_to else expert * panels + panel + 1
        for tile in range(tiles):
            top, height = tile_rows(rows, tile, tiles)
            _added_tile(
                height, x_SI, tokens_S, weights_S, row + top, panels_ENIP, expert, panel, following, out_TO, tile,
                tiles, next_x + next_bytes * part // parts, next_bytes // (parts * inputs),
            )  # fmt: skip
            part += 1


@register_jitable
def _with_rows(starts_E1, expert):  # type: ignore[no-untyped-def]
    """The first expert from this one on that has any."""
    while expert < len(starts_E1) - 1 and starts_E1[expert] == starts_E1[expert + 1]:
        expert += 1
    return expert


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def add_weighted_rows(out_TD, width, places_TK, weights_S, answer_SD, first, threads):  # type: ignore[no-untyped-def]
    """`out[t] += weights[s] * answer[s - first]` for s in `places[t]`, one after another, where `answer` has that row.

    Of both, only the first `width` features of a row count.

    The first pairs of all (`first` 0) are added to 0: what was in `out` does not count. Threads share the tokens: a
    token's row stays in a core's cache until all of its experts are added, and is read and written once for several.
    """
    tokens = out_TD.shape[0]
    for thread in numba.prange(threads):
        rows = np.empty(places_TK.shape[1], np.int64)
        for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
            found = 0
            for k in range(places_TK.shape[1]):
                row = places_TK[t, k] - first
                if 0 <= row < answer_SD.shape[0]:
                    rows[found] = row
                    found += 1
            if first == 0:
                out_TD[t, :width] = 0
            done = 0
            while done + 4 <= found:
                r0, r1, r2, r3 = rows[done], rows[done + 1], rows[done + 2], rows[done + 3]
                w0, w1, w2, w3 = (weights_S[first + r0], weights_S[first + r1], weights_S[first + r2],
                                  weights_S[first + r3])  # fmt: skip
                for d in range(width):
                    sum_ = out_TD[t, d] + w0 * answer_SD[r0, d]
                    sum_ += w1 * answer_SD[r1, d]
                    sum_ += w2 * answer_SD[r2, d]
                    out_TD[t, d] = sum_ + w3 * answer_SD[r3, d]
                done += 4
            for n in range(done, found):
                row = rows[n]
                weight = weights_S[first + row]
                for d in range(width):
                    out_TD[t, d] += weight * answer_SD[row, d]
