"""Rotary positions through the CPU's kernel: known by what a family's function computes.

transformers has no registry for this function: every family's file has one of the same name, which its attention's
`forward` finds among the globals. A module gets its own `forward` with globals in which that name means ours; the
family's file, and every other model, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from moegen.ops.rotary_kernel import rotated

_NAME = "apply_rotary_pos_emb"

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""Queries `[1, H, T, D]`, keys `[1, G, T, D]`, cosines and sines `[1, T, E]` -> both, rotated."""


class RowRotation:
    """Does what a family's function does; by the kernel where both are the same."""

    def __init__(self, theirs: Rotate) -> None:
        self._theirs = theirs
        self._whole, self._part = _is_plain(theirs, 16), _is_plain(theirs, 8)

    @property
    def is_plain(self) -> bool:
        """Of heads that are rotated whole, or in part."""
        return self._whole or self._part

    def __call__(self, *given: Any, **options: Any) -> Any:
        if len(given) == 4 and not options and self._serves(*given):
            q, k, cos, sin = given
            return rotated(q, cos, sin), rotated(k, cos, sin)
        return self._theirs(*given, **options)

    def _serves(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        plain = self._whole if cos.shape[-1] == q.shape[-1] else self._part
        of_rows = cos.dim() == 3 and len(cos) == len(q) == 1
        return plain and of_rows and q.dtype == k.dtype == cos.dtype == torch.float32


def _is_plain(theirs: Rotate, rotary_dims: int) -> bool:
    """Whether a function rotates the first dims of heads of 16 as the kernel does: asked on numbers of no pattern."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 16, generator=generator) for heads in (3, 2))
    cos, sin = torch.randn(2, 1, 5, rotary_dims, generator=generator)
    try:
        answers = theirs(q.clone(), k.clone(), cos, sin)
        return all(map(torch.equal, answers, (rotated(q, cos, sin), rotated(k, cos, sin))))
    except (RuntimeError, TypeError, ValueError):  # it takes other arguments
        return False


def row_rotations(model: nn.Module) -> None:
    """Gives the modules whose families rotate plainly a `RowRotation`."""
    made: dict[Rotate, RowRotation] = {}
    for module in model.modules():
        forward = getattr(module.forward, "__func__", None)
        if not isinstance(forward, FunctionType) or _NAME not in forward.__code__.co_names:
            continue
        theirs: Rotate = forward.__globals__[_NAME]
        if theirs not in made:
            made[theirs] = RowRotation(theirs)
        rotation = made[theirs]
        if rotation.is_plain:
            own = FunctionType(
                forward.__code__, {**forward.__globals__, _NAME: rotation}, forward.__name__, forward.__defaults__,
                forward.__closure__,
            )  # fmt: skip
            own.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(own, module)
