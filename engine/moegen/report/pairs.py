"""Nested mappings as names and values for people: plans, models, machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moegen.units import format_bytes


def pairs(mapping: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Name and value of everything in a nested mapping; curves, which are keyed by numbers, stay in one cell."""
    found: list[tuple[str, str]] = []
    for name, value in mapping.items():
        path = f"{above}{name}".replace("_", " ")
        if isinstance(value, Mapping) and not _is_curve(value):
            found += pairs(value, f"{path}: ") if any(value.values()) else [(path, "-")]
        else:
            found.append((path, _cell(path, value)))
    return found


def _is_curve(value: Mapping[str, Any]) -> bool:
    return all(key.isdigit() for key in value)


def _cell(path: str, value: Any) -> str:
    if value is None or value == {}:
        return "-"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_cell(path, each)}" for key, each in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _measure(path, value) if isinstance(value, (int, float)) else str(value)


def _measure(path: str, value: float) -> str:
    if "flops per s" in path:
        return f"{value / 1e9:,.1f} GFLOP/s"
    if "bytes per s" in path:
        return f"{value / 1e9:,.2f} GB/s"
    if path.endswith("bytes") or path.startswith(("host: ", "device memory: ")):
        return format_bytes(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
