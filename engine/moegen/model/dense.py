"""Weights outside the experts, through the same CPU kernel: in their stored dtype, same bits in any batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from moegen.ops.expert_weights import PanelMatrix


class PanelWeight(torch.Tensor):
    """A float32 matrix `[O, I]` that lies in panels: the modules that have it multiply with it, or look up in it.

    The kernel is reached through torch's own functions, because routers call `linear` with weights of their own, and a
    head may share the embedding's. torch's BLAS would answer a row differently in a batch of few rows and of many, and
    a router may then choose another expert. Whatever else is done with it is done with a copy, `[O, I]`.
    """

    _matrix: PanelMatrix

    @staticmethod
    def __new__(cls, weight_OI: torch.Tensor, dtype: torch.dtype, rounded: bool = False) -> PanelWeight:
        """Kept in `dtype` where that loses nothing, in float32 otherwise; for `rounded` see `PanelMatrix`."""
        weight_OI = weight_OI.detach()
        out_features, in_features = weight_OI.shape
        if not torch.equal(weight_OI.to(dtype).to(weight_OI.dtype), weight_OI):
            dtype = weight_OI.dtype
        # What torch itself sees has the shape, and shows at once if anything reached it past the functions below.
        self = torch.full((), torch.nan).expand(weight_OI.shape).as_subclass(cls)
        self._matrix = PanelMatrix(1, out_features, in_features, dtype, rounded)
        self._matrix.place(0, 0, weight_OI)
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            match args:
                case [x, PanelWeight() as weight, *bias] if func is F.linear:
                    return weight.times(x, *bias, **kwargs)
                case [ids, PanelWeight() as weight, *_] if func is F.embedding:
                    return weight.look_up(ids)  # the other parameters are of training
                case [PanelWeight() as weight, *dtype] if dtype == _TO_FLOAT.get(func):
                    return weight
            if func not in _METADATA:
                args, kwargs = tree_map_only(PanelWeight, PanelWeight.unpacked, (args, kwargs))
            return func(*args, **kwargs)

    def unpacked(self) -> torch.Tensor:
        """`[O, I]`, made anew at every call."""
        return self._matrix.unpacked(0).float()

    def times(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., O]` of `x[..., I]` and `bias[O]`."""
        x_TI = x.reshape(-1, self._matrix.in_features)
        out_TO = self._matrix.packed_linear(x_TI)
        if bias is not None:
            out_TO += bias
        return out_TO.view(*x.shape[:-1], self._matrix.out_features)

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """`[..., I]`: the features that `ids[...]` name."""
        return self._matrix.looked_up(0, ids.reshape(-1)).float().view(*ids.shape, self._matrix.in_features)


_TO_FLOAT: dict[Callable[..., Any], list[torch.dtype]] = {  # with these arguments
    torch.Tensor.float: [],
    torch.Tensor.type: [torch.float32],
    torch.Tensor.to: [torch.float32],
}
_METADATA = (
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad")),
    torch.Tensor.dim,
)


def panel_weights(model: nn.Module, dtype: torch.dtype, rounded: bool = False) -> None:
    """Puts a `PanelWeight` in the place of every matrix that modules have as their `weight` and multiply with."""
    owners: dict[nn.Parameter, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and weight.dtype == torch.float32:
            owners[weight].append(module)
    while owners:  # one after the other is given up: two copies of all would be beyond what is planned for
        weight, modules = owners.popitem()
        if not all(isinstance(module, nn.Embedding) for module in modules):
            panels = PanelWeight(weight, dtype, rounded)
            for module in modules:
                del module.weight
                module.weight = panels
