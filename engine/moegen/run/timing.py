"""How long something takes, on whatever device it runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of five runs, or of as many as a third of a second has room for: what the machine can do."""
    return min(_times(work, device))


def usual_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Their median: what it does, beside whatever else has a share of it."""
    return statistics.median(_times(work, device))


def _times(work: Callable[[], object], device: torch.device, repeats: int = 5) -> list[float]:
    times: list[float] = []
    while len(times) <= repeats and sum(times) < 0.3:
        _synchronize(device)
        started = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return times[1:] or times  # the first warms up


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
