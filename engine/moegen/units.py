"""Bytes, durations and moments, read from and written for people."""

from __future__ import annotations

import re
import time

from moegen.errors import SpecError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_SUFFIX_BYTES = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1 << 40,
}


def parse_bytes(text: str | int, field: str) -> int:
    """`"2.5GiB"`, `"800 MB"` or a plain number of bytes -> bytes.

    Raises:
        SpecError: naming `field`, when `text` is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if match is None or match[2] not in _SUFFIX_BYTES:
        raise SpecError(f"{field}: {text!r} is not a size; write bytes or a unit, as in 2GiB or 800MB")
    return int(float(match[1]) * _SUFFIX_BYTES[match[2]])


def format_bytes(count: float) -> str:
    """1536 -> `"1.5 KiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_duration(seconds: float) -> str:
    """3725 -> `"1h02m"`, 75 -> `"1m15s"`, 9.2 -> `"9s"`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    if whole >= 60:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole}s"


def format_moment(unix_s: float) -> str:
    """1790000000 -> `"2026-09-21 14:13 UTC"`."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_s))
