"""Measures this machine, in seconds: GEMM by dtype and rows, DRAM reads, the link to the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from moegen.plan.machine import Machine, Rates

_ROWS = (1, 4, 16, 64, 256, 1024)
_WEIGHTS, _OUT, _IN = 24, 768, 1024  # like the experts of a layer: together larger than a cache
_BLOCK_BYTES = 256 << 20


def probe(device: str = "auto") -> Machine:
    """This machine with its rates measured now. Raises `SpecError` when the device does not exist."""
    machine = Machine.detect(device)
    where = torch.device(machine.device)
    gemm = {
        str(dtype).removeprefix("torch."): {rows: gemm_flops_per_s(where, dtype, rows) for rows in _ROWS}
        for dtype in (torch.float32, torch.bfloat16)
    }
    host = torch.ones(_BLOCK_BYTES // 8, dtype=torch.int64)
    rates = Rates(gemm, _BLOCK_BYTES / _median_seconds(lambda: host.sum(), where))
    if where.type != "cpu":
        pinned, there = host.pin_memory(), host.to(where)
        rates = replace(
            rates,
            h2d_bytes_per_s=_BLOCK_BYTES / _median_seconds(lambda: there.copy_(pinned, non_blocking=True), where),
            d2h_bytes_per_s=_BLOCK_BYTES / _median_seconds(lambda: pinned.copy_(there, non_blocking=True), where),
        )
    return replace(machine, rates=rates)


@torch.inference_mode()
def gemm_flops_per_s(device: torch.device, dtype: torch.dtype, rows: int) -> float:
    """Rate of `[rows, 1024] @ [1024, 768]` over two dozen weights in turn, as an expert stage meets them."""
    weights = torch.randn(_WEIGHTS, _OUT, _IN, device=device).to(dtype)
    x = torch.randn(rows, _IN, device=device).to(dtype)

    def sweep() -> None:
        for weight in weights:
            F.linear(x, weight)

    return 2 * rows * _OUT * _IN * _WEIGHTS / _median_seconds(sweep, device)


def _median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    work()
    times = []
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
