"""The expert GEMM on the CPU over weights in few bits: expanded panel by panel, in a core's own cache.

Weights lie in memory as the checkpoint stores them. Of every panel of outputs a thread expands `BLOCK_INPUTS` inputs at
a time, to float32 in scratch of its own that stays in its first-level cache, and all rows of the expert then meet them
in the tiles of `moegen.ops.expert_kernel`, where their sums go on. So a weight of 4 or 8 bits costs that much memory
traffic, its value is `(code - zero) * scale` rounded once to float32, and the sums are those of float32 weights,
whatever the batch.

Codes that are stored row after row are transposed on the way, as words: `LANES` words of `LANES` outputs become `LANES`
vectors of outputs, whose words hold consecutive inputs.

Shape suffixes: T tokens, S rows sorted by expert, E experts, I inputs, O outputs, G groups of inputs, P = PANEL.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moegen.coding import GROUP_MULTIPLE
from moegen.ops.expert_kernel import PANEL, TILE_ROWS, add_tile, claimed, tile_rows, tiles_of
from moegen.ops.kernel_cache import lock_kernel_cache
from moegen.ops.vector_ir import (
    I32,
    LANES,
    LINE_BYTES,
    V16,
    V32,
    VF,
    as_floats,
    at,
    i64,
    load,
    nbytes,
    prefetch,
    store,
    transposed,
    v32,
    vf,
)
from moegen.ops.weight_codes import AWQ_SHIFTS, HALF_FACTOR

lock_kernel_cache()

ROW_BLOCK = 18 * TILE_ROWS  # rows that meet expanded weights before the next are expanded
BLOCK_INPUTS = 128  # that are expanded at once; a multiple of what one piece of a row has
KINDS = {"fp8_e4m3": 0, "int8": 1, "uint8": 2, "fp4_e2m1": 3, "uint4": 4}
ORDERS = {"rows": 0, "words down inputs": 1, "words across outputs": 2}
ROW_BYTES = 4 * LANES  # rows are read in pieces of so many bytes; the last one of a row may reach beyond it
_BITS = {kind: 4 if kind in ("fp4_e2m1", "uint4") else 8 for kind in KINDS}


def _words(value: int) -> ir.Constant:
    return v32([value] * LANES)


def _value(b: ir.IRBuilder, kind: str, words: ir.Value, place: int) -> ir.Value:
    """Of the codes that each word holds, the one at `place` from the lowest bits on, as float32 (over a power of two:
    see `HALF_FACTOR`)."""
    bits = _BITS[kind]
    if kind == "int8":
        return b.sitofp(b.ashr(b.shl(words, _words(24 - 8 * place)), _words(24)), VF)
    code = b.and_(b.lshr(words, _words(place * bits)), _words((1 << bits) - 1))
    if kind in ("uint8", "uint4"):
        return b.sitofp(code, VF)
    magnitude, left, sign, sign_left = (0x7F, 7, 0x80, 8) if kind == "fp8_e4m3" else (7, 9, 8, 12)
    half = b.or_(
        b.shl(b.and_(code, _words(magnitude)), _words(left)), b.shl(b.and_(code, _words(sign)), _words(sign_left))
    )
    return b.fpext(b.bitcast(b.trunc(half, V16), ir.VectorType(ir.HalfType(), LANES)), VF)


def _scaled(b: ir.IRBuilder, value: ir.Value, zero: ir.Value | None, scale: ir.Value) -> ir.Value:
    return b.fmul(value if zero is None else b.fsub(value, zero), scale)


def _zeros_at(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return b.sitofp(load(b, address, V16), VF)


@intrinsic
def _expand_block(
    typing: Any, scale_kind: Any, kind: Any, codes: Any, stride: Any, scales: Any, scale_step: Any, zeros: Any,
    zero_step: Any, first: Any, group: Any, groups: Any, to: Any,
) -> Any:  # fmt: skip
    """`ROW_BYTES` of each of LANES outputs, expanded to consecutive inputs, `first ..`, at `to`, PANEL floats apart.

    `codes` (of output 0 and its input `first`), `scales`, `zeros` (int16; not read for floating codes; both of output 0
    and group 0) and `to` are addresses; a group's scales and zeros are a step from those of the group before.
    """

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        _, kind, codes, stride, scales, scale_step, zeros, zero_step, first, group, groups, to = args
        columns = transposed(b, [load(b, b.add(codes, b.mul(i64(row), stride)), V32) for row in range(LANES)])
        last = b.sub(groups, i64(1))
        end = b.append_basic_block("expanded")
        choice = b.switch(kind, end)
        for name, number in KINDS.items():
            block = b.append_basic_block(name)
            choice.add_case(i64(number), block)
            b.position_at_end(block)
            factor, per_word = HALF_FACTOR.get(name), 32 // _BITS[name]
            scale, zero = vf(1.0), None
            for place in range(LANES * per_word):
                if place % GROUP_MULTIPLE == 0:
                    own = b.sdiv(b.add(first, i64(place)), group)
                    own = b.select(b.icmp_signed("<", own, last), own, last)
                    scale = as_floats(b, b.add(scales, b.mul(own, scale_step)), scale_kind)
                    if factor is not None:
                        scale = b.fmul(scale, vf(factor))
                    else:
                        zero = _zeros_at(b, b.add(zeros, b.mul(own, zero_step)))
                value = _value(b, name, columns[place // per_word], place % per_word)
                store(b, _scaled(b, value, zero, scale), at(b, to, place, 4 * PANEL))
            b.branch(end)
        b.position_at_end(end)
        return context.get_dummy_value()

    return types.void(scale_kind, *[types.intp] * 11), generate


@intrinsic
def _fetch(typing: Any, address: Any) -> Any:
    """The line there, soon to be read."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        prefetch(b, args[0])
        return context.get_dummy_value()

    return types.void(types.intp), generate


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
                for line in range(0, 4 * PANEL, LINE_BYTES):  # of the next panel: no hardware looks across pages
                    prefetch(b, at(b, words, 4 * PANEL + line, 1))
                out = at(b, to, b.mul(row.index, i64(32 // wide)), 4 * PANEL)
                for v, (scale, zero) in enumerate(parts):
                    own = load(b, at(b, words, v * LANES, 4), V32)
                    for place in range(32 // wide):
                        value = _scaled(b, _value(b, f"uint{wide}", own, place), zero, scale)
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
            prefetch(b, b.add(b.add(codes, b.mul(i.index, stride)), i64(LINE_BYTES)))  # of the panels that follow
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
def expand_inputs(  # type: ignore[no-untyped-def]
    order, kind, bits, codes_EXB, group, scales_EGO, zeros_EGO, expert, panel, first, inputs, to_IP
):  # fmt: skip
    """Inputs `first .. first + inputs` of one panel of one expert, `[BLOCK_INPUTS, P]` float32.

    `codes_EXB` are bytes: `[E, O, row bytes]`, or words `[E, X, 4 * O]` down the inputs, or `[E, I, O / 2]` across the
    outputs. `zeros_EGO` of one expert and one group serve all. `first` is a multiple of `BLOCK_INPUTS`.
    """
    scale_kind = scales_EGO[0, 0, 0]
    groups, outputs = scales_EGO.shape[1:]
    scale_bytes = scales_EGO.itemsize
    own_zeros = zeros_EGO.shape[0] > 1 or zeros_EGO.shape[1] > 1
    pieces, width = codes_EXB.shape[1:]
    codes = codes_EXB.ctypes.data + expert * pieces * width
    scales = scales_EGO.ctypes.data + expert * groups * outputs * scale_bytes
    zeros = zeros_EGO.ctypes.data + (expert * groups * outputs * 2 if own_zeros else 0)
    out = to_IP.ctypes.data
    first_output = panel * PANEL
    if order == 0:
        at_once = ROW_BYTES * 8 // bits
        zero_step = outputs * 2 if own_zeros else 0
        for output in range(first_output + PANEL, first_output + 2 * PANEL):  # of the next panel
            for byte in range(first * bits // 8, (first + inputs) * bits // 8, LINE_BYTES):
                _fetch(codes + output * width + byte)
        for output in range(first_output, first_output + PANEL, LANES):
            to = out + (output - first_output) * 4
            for i in range(first, first + inputs, at_once):
                own_codes, own_to = codes + output * width + i * bits // 8, to + (i - first) * PANEL * 4
                _expand_block(
                    scale_kind, kind, own_codes, width, scales + output * scale_bytes, outputs * scale_bytes,
                    zeros + output * 2, zero_step, i, group, groups, own_to,
                )  # fmt: skip
        return
    per_row = 32 // bits if order == 1 else 1  # inputs of one row of words
    i = first
    while i < first + inputs:
        g = min(i // group, groups - 1)
        end = first + inputs if g == groups - 1 else min(first + inputs, (g + 1) * group)
        row, count = i // per_row, (end - i) // per_row
        of_group = g * outputs + first_output
        own_scales, own_zeros_at = scales + of_group * scale_bytes, zeros + of_group * 2
        to = out + (i - first) * PANEL * 4
        if order == 1:
            _expand_words_down(
                scale_kind, bits, count, codes + row * width + first_output * 4, width, own_scales, own_zeros_at, to
            )
        else:
            _expand_words_across(
                scale_kind, count, codes + row * width + first_output // 2, width, own_scales, own_zeros_at, to
            )
        i = end


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def grouped_codes(  # type: ignore[no-untyped-def]
    x_TI, tokens_S, order, kind, bits, codes_EXB, group, scales_EGO, zeros_EGO, panels, inputs, starts_E1, out_SO,
    weights_RIP, sums_RSP, threads,
):  # fmt: skip
    """As `moegen.ops.expert_kernel.grouped_panels`, of coded weights of so many inputs.

    `weights_RIP` (I = `BLOCK_INPUTS`) and `sums_RSP` (S = `ROW_BLOCK`) are scratch, one for each thread.
    """
    at_once, row_block = weights_RIP.shape[1], sums_RSP.shape[1]
    next_share = np.zeros(1, np.int64)
    for thread in numba.prange(threads):
        weights_IP, sums_SP = weights_RIP[thread], sums_RSP[thread]
        for expert, first, end, panel_from, panel_to in claimed(next_share, threads, starts_E1, panels):
            for block in range(first, end, row_block):
                block_rows = min(end - block, row_block)
                tiles = tiles_of(block_rows)
                for panel in range(panel_from, panel_to):
                    for i in range(0, inputs, at_once):
                        count = min(inputs - i, at_once)
                        expand_inputs(order, kind, bits, codes_EXB, group, scales_EGO, zeros_EGO, expert, panel,
                                      i, count, weights_IP)  # fmt: skip
                        for tile in range(tiles):
                            top, height = tile_rows(block_rows, tile, tiles)
                            add_tile(height, x_TI, tokens_S[block:], top, i, count, weights_IP, sums_SP)
                    for row in range(block_rows):
                        for place in range(PANEL):
                            out_SO[block + row, panel * PANEL + place] = sums_SP[row, place]
