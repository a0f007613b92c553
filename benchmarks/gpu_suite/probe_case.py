"""The machine's rates, by the engine's own probe; and how fast the device reads and writes its own memory."""

from __future__ import annotations

from dataclasses import asdict

import torch
from moegen.run import engine_rates, machine_rates
from moegen.run.probe import probe
from moegen.run.timing import best_seconds

from benchmarks.gpu_suite.setting import Desk


def device_memory_bytes_per_s(device: torch.device, size_bytes: int) -> float:
    """Of a copy, reads and writes both counted."""
    rate = _copy_rate(device, size_bytes)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # nothing of it counts to what is run next
    return rate


def _copy_rate(device: torch.device, size_bytes: int) -> float:
    block = torch.ones(size_bytes // 4, device=device)
    other = torch.empty_like(block)
    return 2 * size_bytes / best_seconds(lambda: other.copy_(block), device)


def shrink() -> None:
    """Sizes that take no time: what is then measured is true of nothing."""
    small = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8}
    engine_rates._EXPERTS = (small, {**small, "moe_intermediate_size": 64}, small)
    engine_rates._CACHE_BYTES, engine_rates._ROUNDS = 1 << 20, 1
    engine_rates._EXPERT_ROWS, engine_rates._LINEAR_ROWS, engine_rates._LINEAR_SIDES = (1, 4, 16), (1, 16), (64, 128)
    machine_rates._BLOCK_BYTES, machine_rates._READ_BYTES, machine_rates._GATHERED_BYTES = 1 << 20, 1 << 16, 1 << 18
    machine_rates._DISK_BYTES = machine_rates._TEMPORARY_BYTES = 1 << 18
    machine_rates._DISK_SECONDS = 0.0
    machine_rates._PLACED = (2, 64, 64)


def main() -> None:
    desk = Desk()
    if desk.setting.tiny:
        shrink()
    machine = probe(desk.setting.device)
    own = device_memory_bytes_per_s(torch.device(desk.setting.device), (1 << 20) if desk.setting.tiny else (4 << 30))
    desk.note(machine=asdict(machine), device_memory_bytes_per_s=own)


if __name__ == "__main__":
    main()
