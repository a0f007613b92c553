"""Weights into the panels of `expert_kernel`, at the speed of memory.

Output features come row after row, `[O, I]`, or input after input, `[I, O]`; a panel wants the `PANEL` features of one
input side by side. Rows are turned in squares: as many words of 32 bits as a vector has lanes, in as many vectors. A
16-bit weight travels with the one that shares its word.

Shape suffixes: O output features, I inputs, N panels, P = PANEL.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moegen.ops.expert_kernel import BFLOAT16_BITS, PANEL, panel_places
from moegen.ops.kernel_cache import lock_kernel_cache
from moegen.ops.vector_ir import I64, LANES, V16, V32, at, i64, load, store, transposed, v32

lock_kernel_cache()


@intrinsic
def _place_square(typing: Any, panel: Any, rows: Any, first_row: Any, first_input: Any) -> Any:
    """`LANES` inputs of `PANEL` features: `panel[i, places] = rows[first_row : first_row + PANEL, i]`."""
    stored = panel.dtype
    width = stored.bitwidth // 8
    feature_at = np.argsort(panel_places(stored == BFLOAT16_BITS)).tolist()

    def codegen(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        panel_view, rows_view = (context.make_array(signature.args[a])(context, b, args[a]) for a in (0, 1))
        row_step, _ = cgutils.unpack_tuple(b, rows_view.strides)
        source = at(b, b.ptrtoint(rows_view.data, I64), args[3], width)
        target = at(b, b.ptrtoint(panel_view.data, I64), args[3], PANEL * width)

        def inputs_of(feature: int) -> ir.Value:
            place = b.add(source, b.mul(b.add(args[2], i64(feature)), row_step))
            return load(b, place, V32) if width == 4 else b.zext(load(b, place, V16), V32)

        def words(first: int) -> list[ir.Value]:
            """Of the panel's words `first ..`, each for `LANES` inputs."""
            if width == 4:
                return [inputs_of(feature_at[first + lane]) for lane in range(LANES)]
            places = [2 * (first + lane) for lane in range(LANES)]
            return [
                b.or_(inputs_of(feature_at[p]), b.shl(inputs_of(feature_at[p + 1]), v32([16] * LANES))) for p in places
            ]

        for first in range(0, PANEL * width // 4, LANES):
            for i, vector in enumerate(transposed(b, words(first))):
                store(b, vector, b.add(target, i64(i * PANEL * width + first * 4)))
        return context.get_dummy_value()

    return types.void(panel, rows, types.intp, types.intp), codegen


@numba.njit(nogil=True, cache=True)
def pack_rows(panels_NIP, first_row, rows_OI, places_P):  # type: ignore[no-untyped-def]
    """Output features `first_row ..` of one expert, stored row after row, into its panels."""
    count, inputs = rows_OI.shape
    squares = inputs - inputs % LANES
    row = 0
    while row < count:
        panel = panels_NIP[(first_row + row) // PANEL]
        feature = (first_row + row) % PANEL
        beside = min(PANEL - feature, count - row)
        turned = squares if beside == PANEL else 0
        for i in range(0, turned, LANES):
            _place_square(panel, rows_OI, row, i)
        for r in range(beside):
            place = places_P[feature + r]
            for i in range(turned, inputs):
                panel[i, place] = rows_OI[row + r, i]
        row += beside


@numba.njit(nogil=True, cache=True)
def pack_transposed(panels_NIP, matrix_IO, places_P):  # type: ignore[no-untyped-def]
    """One expert's matrix, stored input after input, into its panels."""
    inputs, outputs = matrix_IO.shape
    for panel in range(panels_NIP.shape[0]):
        features = min(PANEL, outputs - panel * PANEL)
        for i in range(inputs):
            for f in range(features):
                panels_NIP[panel, i, places_P[f]] = matrix_IO[i, panel * PANEL + f]
