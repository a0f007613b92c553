"""How long something takes, on whatever device it runs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The shortest of `repeats` runs, or of as many as a third of a second has room for; a short first one warms up.

    The shortest, since whatever else the machine does can only make a run longer.
    """
    times: list[float] = []
    while len(times) < repeats and sum(times) < 0.3:
        _synchronize(device)
        started = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
