"""Rates as functions of a size: measured at some sizes, interpolated between them where both axes are logarithms."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Curve = Mapping[int, float]
Surface = Mapping[int, Curve]


def at(curve: Curve, sizes: npt.ArrayLike) -> Floats:
    """The rate at each of `sizes`; outside the measured sizes, that of the nearest one."""
    known = sorted(curve)
    logs = np.log(np.maximum(np.asarray(sizes, np.float64), 1e-9))
    return np.exp(np.interp(logs, np.log(known), np.log([curve[size] for size in known])))


def on(surface: Surface, parameter: float) -> Curve:
    """The curve of a surface at `parameter`, between the two measured ones that are nearest."""
    sizes = sorted(set[int]().union(*surface.values()))
    by_parameter = {p: at(curve, sizes) for p, curve in surface.items()}
    return {
        size: float(at({p: float(rates[i]) for p, rates in by_parameter.items()}, parameter))
        for i, size in enumerate(sizes)
    }
