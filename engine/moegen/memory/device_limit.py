"""A GPU's memory budget as a promise: torch's allocator refuses what is beyond it."""

from __future__ import annotations

import torch

from moegen.units import MIB

_CONTEXT_BYTES = 512 * MIB  # what the driver and its libraries take beside torch's allocator, about


def limit_allocations(device: torch.device, budget_bytes: int) -> None:
    """From now on, in this process, all that is on the device together stays within the budget; nothing on a CPU."""
    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    _, total = torch.cuda.mem_get_info(index)
    share = max(budget_bytes - _CONTEXT_BYTES, 0) / total
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0), index)
