"""Linear layers outside the experts, through the same CPU kernel: in their stored dtype, same bits in any batch."""

from __future__ import annotations

import torch
from torch import nn

from moegen.ops.expert_weights import PanelMatrix


class PanelLinear(nn.Module):
    """Takes a `nn.Linear`'s place; its weights are kept in `dtype` where that loses nothing, in float32 otherwise."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        weight_OI = linear.weight.detach()
        if not torch.equal(weight_OI.to(dtype).to(weight_OI.dtype), weight_OI):
            dtype = weight_OI.dtype
        self.out_features, self.in_features = weight_OI.shape
        self.bias = linear.bias
        self._matrix = PanelMatrix(1, self.out_features, self.in_features, dtype)
        self._matrix.place(0, 0, weight_OI)

    @property
    def weight(self) -> torch.Tensor:
        """For models that multiply with it themselves, as some do with their router's."""
        return self._matrix.unpacked(0).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TI = x.reshape(-1, self.in_features)
        out_TO = self._matrix.linear(x_TI, [x_TI.shape[0]])
        if self.bias is not None:
            out_TO += self.bias
        return out_TO.view(*x.shape[:-1], self.out_features)


def panel_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts a `PanelLinear` in the place of every linear layer, except one that shares its weights (a tied head)."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and owners[id(child.weight)] == 1:
                setattr(parent, name, PanelLinear(child, dtype))
