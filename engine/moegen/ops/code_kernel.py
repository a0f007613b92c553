"""The expert GEMM on the CPU over weights in few bits: expanded panel by panel, in a core's own cache.

Weights lie in memory as the checkpoint stores them. For every panel of outputs a thread expands the codes once, to
float32 in a scratch panel of its own that stays in its second-level cache, and all rows of the expert then meet it in
the tiles of `moegen.ops.expert_kernel`. So a weight of 4 or 8 bits costs that much memory traffic, its value is
`(code - zero) * scale` rounded once to float32, and the sums are those of float32 weights, whatever the batch.

Codes that are stored row after row are transposed on the way, as bytes: a block of `LANES` bytes of `LANES` outputs
becomes, byte column by byte column, vectors of outputs.

Shape suffixes: T tokens, S rows sorted by expert, E experts, I inputs, O outputs, G groups of inputs, P = PANEL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moegen.ops.expert_kernel import _TILE_ROWS, PANEL, _tile, own_panels
from moegen.ops.kernel_cache import lock_kernel_cache
from moegen.ops.vector_ir import I8, I32, LANES, V16, V32, VF, as_floats, at, i64, load, nbytes, store, v32, vf
from moegen.ops.weight_codes import AWQ_SHIFTS, HALF_FACTOR

lock_kernel_cache()

ROW_BLOCK = 18 * _TILE_ROWS  # rows that meet an expanded panel before the next panel is expanded
KINDS = {"fp8_e4m3": 0, "int8": 1, "uint8": 2, "fp4_e2m1": 3, "uint4": 4}
ORDERS = {"rows": 0, "words down inputs": 1, "words across outputs": 2}
ROW_BYTES = LANES  # rows are read in pieces of so many bytes: theirs are a multiple
_V8 = ir.VectorType(I8, LANES)


def _v16(value: int) -> ir.Constant:
    return ir.Constant(V16, [value] * LANES)


def _v8(value: int) -> ir.Constant:
    return ir.Constant(_V8, [value] * LANES)


def _from_half(b: ir.IRBuilder, code: ir.Value, magnitude: int, left: int, sign: int, sign_left: int) -> ir.Value:
    wide = b.zext(code, V16)
    bits = b.or_(b.shl(b.and_(wide, _v16(magnitude)), _v16(left)), b.shl(b.and_(wide, _v16(sign)), _v16(sign_left)))
    return b.fpext(b.bitcast(bits, ir.VectorType(ir.HalfType(), LANES)), VF)


_VALUES: dict[str, Callable[[ir.IRBuilder, ir.Value], ir.Value]] = {  # of a vector of codes, a byte each
    "fp8_e4m3": lambda b, code: _from_half(b, code, 0x7F, 7, 0x80, 8),
    "int8": lambda b, code: b.sitofp(b.sext(code, V32), VF),
    "uint8": lambda b, code: b.sitofp(b.zext(code, V32), VF),
    "fp4_e2m1": lambda b, code: _from_half(b, code, 7, 9, 8, 12),
    "uint4": lambda b, code: b.sitofp(b.zext(code, V32), VF),
}


def _transposed_bytes(b: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """LANES vectors of bytes, by columns: neighbours are interleaved until each vector is one column."""
    half = LANES // 2
    low = v32([lane // 2 + (LANES if lane % 2 else 0) for lane in range(LANES)])
    high = v32([half + lane // 2 + (LANES if lane % 2 else 0) for lane in range(LANES)])
    distance = 1
    while distance < LANES:
        pairs = [(rows[i], rows[i + half]) for i in range(half)]
        rows = [b.shuffle_vector(*pair, mask) for pair in pairs for mask in (low, high)]
        distance *= 2
    return rows


def _scaled(b: ir.IRBuilder, value: ir.Value, zero: ir.Value | None, scale: ir.Value) -> ir.Value:
    return b.fmul(value if zero is None else b.fsub(value, zero), scale)


def _zeros_at(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return b.sitofp(load(b, address, V16), VF)


@intrinsic
def _expand_block(typing: Any, scale_kind: Any, kind: Any, codes: Any, stride: Any, scales: Any, zeros: Any, to: Any
                  ) -> Any:  # fmt: skip
    """LANES bytes of each of LANES outputs, expanded to consecutive inputs at `to`, PANEL floats apart.

    `codes`, `scales`, `zeros` (int16; not read for floating codes) and `to` are addresses, of output 0 and its input 0.
    """

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _, kind, codes, stride, scales, zeros, to = args
        columns = _transposed_bytes(
            b, [b.load(b.inttoptr(at(b, codes, b.mul(i64(row), stride), 1), _V8.as_pointer()), align=1)
                for row in range(LANES)]
        )  # fmt: skip
        scale = as_floats(b, scales, scale_kind)
        end = b.append_basic_block("expanded")
        choice = b.switch(kind, end)
        for name, number in KINDS.items():
            block = b.append_basic_block(name)
            choice.add_case(i64(number), block)
            b.position_at_end(block)
            factor = HALF_FACTOR.get(name)
            own_scale = scale if factor is None else b.fmul(scale, vf(factor))
            zero = None if factor else _zeros_at(b, zeros)
            place = 0
            for column in columns:
                nibbles = name in ("fp4_e2m1", "uint4")
                codes_of = [b.and_(column, _v8(15)), b.lshr(column, _v8(4))] if nibbles else [column]
                for code in codes_of:
                    value = _scaled(b, _VALUES[name](b, code), zero, own_scale)
                    store(b, value, at(b, to, place, 4 * PANEL))
                    place += 1
            b.branch(end)
        b.position_at_end(end)
        return context.get_dummy_value()

    return types.void(scale_kind, *[types.intp] * 6), generate


@intrinsic
def _expand_words_down(typing: Any, scale_kind: Any, bits: Any, count: Any, codes: Any, stride: Any, scales: Any,
                       zeros: Any, to: Any) -> Any:  # fmt: skip
    """The inputs of one group that are in `count` rows of words, `stride` bytes apart: a word per output (GPTQ)."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _, bits, count, codes, stride, scales, zeros, to = args
        parts = _parts(b, scales, scale_kind, zeros)
        for wide in (4, 8):
            with b.if_then(b.icmp_signed("==", bits, i64(wide))), cgutils.for_range(b, count) as row:
                words = b.add(codes, b.mul(row.index, stride))
                out = at(b, to, b.mul(row.index, i64(32 // wide)), 4 * PANEL)
                for v, (scale, zero) in enumerate(parts):
                    own = load(b, at(b, words, v * LANES, 4), V32)
                    for place in range(32 // wide):
                        field = b.and_(b.lshr(own, v32([place * wide] * LANES)), v32([(1 << wide) - 1] * LANES))
                        value = _scaled(b, b.sitofp(field, VF), zero, scale)
                        store(b, value, at(b, out, place * PANEL + v * LANES, 4))
        return context.get_dummy_value()

    return types.void(scale_kind, *[types.intp] * 7), generate


@intrinsic
def _expand_words_across(typing: Any, scale_kind: Any, count: Any, codes: Any, stride: Any, scales: Any, zeros: Any,
                         to: Any) -> Any:  # fmt: skip
    """`count` inputs of one group, `stride` bytes apart: a word has eight outputs of one (AWQ)."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _, count, codes, stride, scales, zeros, to = args
        parts = _parts(b, scales, scale_kind, zeros)
        words = ir.VectorType(I32, PANEL // 8)
        with cgutils.for_range(b, count) as i:
            place = b.inttoptr(b.add(codes, b.mul(i.index, stride)), words.as_pointer())
            all_words, out = b.load(place, align=4), at(b, to, i.index, 4 * PANEL)
            for v, (scale, zero) in enumerate(parts):
                outputs = range(v * LANES, (v + 1) * LANES)
                own = b.shuffle_vector(all_words, all_words, v32([output // 8 for output in outputs]))
                shifts = v32([AWQ_SHIFTS[output % 8] for output in outputs])
                field = b.and_(b.lshr(own, shifts), v32([15] * LANES))
                store(b, _scaled(b, b.sitofp(field, VF), zero, scale), at(b, out, v * LANES, 4))
        return context.get_dummy_value()

    return types.void(scale_kind, *[types.intp] * 6), generate


def _parts(b: ir.IRBuilder, scales: ir.Value, kind: types.Type, zeros: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """Scale and zero of each vector of a panel: read once for a group of inputs, and kept in registers."""
    return [
        (as_floats(b, at(b, scales, v * LANES, nbytes(kind)), kind), _zeros_at(b, at(b, zeros, v * LANES, 2)))
        for v in range(PANEL // LANES)
    ]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def expand_panel(order, kind, codes_EXB, group, scales_EGO, zeros_EGO, expert, panel, to_IP):  # type: ignore[no-untyped-def]
    """One panel of one expert, `[at least I, P]` float32.

    `codes_EXB` are bytes: `[E, O, row bytes]`, or words `[E, X, 4 * O]` down the inputs, or `[E, I, O / 2]` across the
    outputs. `zeros_EGO` of one expert and one group serve all.
    """
    scale_kind = scales_EGO[0, 0, 0]
    groups, outputs = scales_EGO.shape[1:]
    scale_bytes = scales_EGO.itemsize
    bits = 4 if kind >= 3 else 8
    own_zeros = zeros_EGO.shape[0] > 1 or zeros_EGO.shape[1] > 1
    pieces, width = codes_EXB.shape[1:]
    codes = codes_EXB.ctypes.data + expert * pieces * width
    scales = scales_EGO.ctypes.data + expert * groups * outputs * scale_bytes
    zeros = zeros_EGO.ctypes.data + (expert * groups * outputs * 2 if own_zeros else 0)
    out = to_IP.ctypes.data
    first = panel * PANEL
    if order == 0:
        at_once = LANES * 8 // bits
        for output in range(first, first + PANEL, LANES):
            to = out + (output - first) * 4
            for block in range(width // LANES):
                g = min(block * at_once // group, groups - 1)
                of_group = g * outputs + output
                _expand_block(
                    scale_kind, kind, codes + output * width + block * LANES, width, scales + of_group * scale_bytes,
                    zeros + (of_group if own_zeros else output) * 2, to + block * at_once * PANEL * 4,
                )  # fmt: skip
        return
    inputs = 32 // bits if order == 1 else 1  # of one row of words
    for g in range(groups):
        row = g * group // inputs
        count = (pieces if g == groups - 1 else (g + 1) * group // inputs) - row
        of_group = g * outputs + first
        own_scales, own_zeros_at = scales + of_group * scale_bytes, zeros + of_group * 2
        to = out + row * inputs * PANEL * 4
        if order == 1:
            _expand_words_down(
                scale_kind, bits, count, codes + row * width + first * 4, width, own_scales, own_zeros_at, to
            )
        else:
            _expand_words_across(
                scale_kind, count, codes + row * width + first // 2, width, own_scales, own_zeros_at, to
            )


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def grouped_codes(  # type: ignore[no-untyped-def]
    x_TI, tokens_S, order, kind, codes_EXB, group, scales_EGO, zeros_EGO, panels, starts_E1, out_SO, weights_R2IP,
    sums_RSP, threads,
):  # fmt: skip
    """As `moegen.ops.expert_kernel.grouped_panels`, of coded weights.

    `weights_R2IP` and `sums_RSP` (S = `ROW_BLOCK`) are scratch, one for each thread; the second panel of weights takes
    what lies beyond the inputs, and is what a tile fetches ahead.
    """
    experts = codes_EXB.shape[0]
    rows_total = starts_E1[experts]
    for thread in numba.prange(threads):
        work_from = rows_total * panels * thread // threads
        work_to = rows_total * panels * (thread + 1) // threads
        for expert in range(experts):
            first = starts_E1[expert]
            rows = starts_E1[expert + 1] - first
            panel_from, panel_to = own_panels(first, rows, panels, work_from, work_to)
            for block in range(first, first + rows, ROW_BLOCK):
                block_rows = min(first + rows - block, ROW_BLOCK)
                tiles = (block_rows + _TILE_ROWS - 1) // _TILE_ROWS
                for panel in range(panel_from, panel_to):
                    expand_panel(order, kind, codes_EXB, group, scales_EGO, zeros_EGO, expert, panel,
                                 weights_R2IP[thread, 0])  # fmt: skip
                    for tile in range(tiles):
                        top = block_rows * tile // tiles
                        height = block_rows * (tile + 1) // tiles - top
                        _tile(
                            height, x_TI, tokens_S[block:], top, weights_R2IP, thread, 0, sums_RSP[thread], tile, tiles
                        )
                    for row in range(block_rows):
                        for place in range(PANEL):
                            out_SO[block + row, panel * PANEL + place] = sums_RSP[thread, row, place]
