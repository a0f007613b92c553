"""The machine's rates, by the engine's own probe; and how fast the device reads and writes its own memory."""

from __future__ import annotations

from dataclasses import asdict
from types import ModuleType
from typing import Any

import torch
from moegen.run import engine_rates, machine_rates, timing
from moegen.run.probe import probe
from moegen.run.timing import best_seconds

from benchmarks.gpu_suite.setting import Desk

_GEOMETRY = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8}
SMALL: tuple[tuple[ModuleType, str, Any], ...] = (
    (engine_rates, "_EXPERTS", (_GEOMETRY, {**_GEOMETRY, "moe_intermediate_size": 64})),
    (engine_rates, "_CACHE_BYTES", 1 << 20),
    (engine_rates, "_EXPERT_ROWS", (1, 4, 16)),
    (engine_rates, "_LINEAR_ROWS", (1, 16)),
    (engine_rates, "_LINEAR_SIDES", (64, 128)),
    (machine_rates, "_BLOCK_BYTES", 1 << 20),
    (machine_rates, "_GATHERED_BYTES", 1 << 18),
    (machine_rates, "READ_BYTES", 1 << 16),
    (machine_rates, "_DISK_BYTES", 1 << 18),
    (machine_rates, "_TEMPORARY_BYTES", 1 << 18),
    (machine_rates, "_DISK_SECONDS", 0.0),
    (machine_rates, "_DISK_BURST_SECONDS", 0.0),
    (machine_rates, "_PLACED", (2, 64, 64)),
    (timing, "_ROUNDS", 1),
)
"""What to set of the probe so that it takes no time: what is then measured is true of nothing."""


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


def main() -> None:
    desk = Desk()
    if desk.setting.tiny:
        for module, name, value in SMALL:
            assert hasattr(module, name), name
            setattr(module, name, value)
    machine = probe(desk.setting.device)
    own = device_memory_bytes_per_s(torch.device(desk.setting.device), (1 << 20) if desk.setting.tiny else (4 << 30))
    desk.note(machine=asdict(machine), device_memory_bytes_per_s=own)


if __name__ == "__main__":
    main()
