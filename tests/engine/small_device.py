"""A device with little memory: whatever torch is asked to allocate beyond it is refused, as a full GPU refuses it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class SmallDevice(TorchDispatchMode):
    """Inside, no single tensor may be newly allocated with more than `most_bytes`.

    Attributes:
        refusals: how often that has happened.
    """

    def __init__(self, most_bytes: int) -> None:
        super().__init__()
        self.most_bytes, self.refusals = most_bytes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_memory(x) for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_flatten(result)[0]:
            if not isinstance(made, torch.Tensor) or made.is_meta:
                continue
            if made.nbytes > self.most_bytes and _memory(made) not in given:
                self.refusals += 1
                raise torch.OutOfMemoryError(f"Tried to allocate {made.nbytes} bytes in {func}")
        return result


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
