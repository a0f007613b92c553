"""How long something takes, on whatever device it runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_ROUNDS = 3  # of every timing; their median counts, for jobs meet the machine as it usually is


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


Timings = dict[Any, Any]
"""What is to be timed: functions of nothing that return a number, or one for each of some passes, by any keys."""


def usual(timings: Timings) -> Timings:
    """What the functions return, by the same keys: the median of `_ROUNDS` rounds.

    A round goes over all of them before the next one begins: a machine that others share, and that is slow for some
    seconds, is so in one round and not in all that is known of one of them.
    """
    rounds = [_timed(timings) for _ in range(_ROUNDS)]
    medians: Timings = _medians(rounds)
    return medians


def _timed(timings: Any) -> Any:
    return {key: _timed(value) for key, value in timings.items()} if isinstance(timings, dict) else timings()


def _medians(rounds: list[Any]) -> Any:
    if isinstance(rounds[0], dict):
        return {key: _medians([found[key] for found in rounds]) for key in rounds[0]}
    return np.median(rounds, axis=0).tolist()
