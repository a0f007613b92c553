"""Weights outside the experts, through the same CPU kernel: in their stored dtype, same bits in any batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from moegen.ops.expert_kernel import PANEL
from moegen.ops.expert_weights import PanelMatrix


class PanelWeight(torch.Tensor):
    """A float32 matrix `[O, I]` that lies in panels: the modules that have it multiply with it, or look up in it.

    The kernel is reached through torch's own functions, because routers call `linear` with weights of their own, and a
    head may share the embedding's. torch's BLAS would answer a row differently in a batch of few rows and of many, and
    a router may then choose another expert. Whatever else is done with it is done with a copy, `[O, I]`.
    """

    _matrix: PanelMatrix

    @staticmethod
    def __new__(
        cls, weight_OI: torch.Tensor, dtype: torch.dtype, rounded: bool = False, matrix: PanelMatrix | None = None
    ) -> PanelWeight:
        """Kept as `exact_dtype` says; for `rounded` see `PanelMatrix`. `matrix`: where it is to lie, of that dtype."""
        weight_OI = weight_OI.detach()
        # What torch itself sees has the shape, and shows at once if anything reached it past the functions below.
        self = torch.full((), torch.nan).expand(weight_OI.shape).as_subclass(cls)
        out_features, in_features = weight_OI.shape
        self._matrix = matrix or PanelMatrix(1, out_features, in_features, exact_dtype(weight_OI, dtype), rounded)
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


class PanelLinear(nn.Linear):
    """A linear module whose weight is a `PanelWeight`, with no detour through torch's functions.

    Attributes:
        joint: the product of its siblings and itself, and which of them it is; None: it is multiplied alone.
    """

    joint: tuple[JointProduct, int] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        if self.joint is None or (out := self.joint[0].answer(self.joint[1], x)) is None:
            return cast(torch.Tensor, weight.times(x, self.bias))
        return out if self.bias is None else out.add_(self.bias)


class JointProduct:
    """Linear modules that meet the same rows, one after another: whichever is asked first multiplies for all.

    Modules that are seen to meet other rows than their siblings, and not just because a pass broke off between them,
    are multiplied alone from then on. Rows must not be written to between the first's answer and the last's.
    """

    def __init__(self, matrix: PanelMatrix, features: Sequence[int]) -> None:
        """`matrix` is made of theirs, with so many output features each, side by side."""
        self._matrix, self._features = matrix, tuple(features)
        self._x: torch.Tensor | None = None
        self._answers: dict[int, torch.Tensor] = {}  # that nobody has asked for yet
        self._missed = 0  # times that other rows came before all answers were asked for

    def answer(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """Module `index`'s product with `x`, `[..., O]`; None: it is to be multiplied alone."""
        if self._answers and self._x is not x:
            self._missed += 1
            self._x, self._answers = None, {}
        if self._missed > _MISSES:
            return None
        if index not in self._answers:
            x_TI = x.reshape(-1, self._matrix.in_features)
            self._x, self._answers = x, dict(enumerate(self._matrix.packed_linears(x_TI, self._features)))
        out_TO = self._answers.pop(index)
        if not self._answers:
            self._x = None
        return out_TO.view(*x.shape[:-1], self._features[index])


_MISSES = 2  # that are forgiven
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by the names that families have for them


def exact_dtype(weight: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, where that loses nothing of the weight; else its own."""
    return dtype if torch.equal(weight.to(dtype).to(weight.dtype), weight) else weight.dtype


def panel_weights(model: nn.Module, dtype: torch.dtype, rounded: bool = False) -> None:
    """Puts a `PanelWeight` in the place of every matrix that modules have as their `weight` and multiply with."""
    owners = _owners(model)
    for siblings, own_dtype in _siblings(model, owners, dtype):
        for one in siblings:
            del owners[one.weight]
        _join(siblings, own_dtype, rounded)
    while owners:  # one after the other is given up: two copies of all would be beyond what is planned for
        weight, modules = owners.popitem()
        if not all(isinstance(module, nn.Embedding) for module in modules):
            panels = PanelWeight(weight, dtype, rounded)
            for module in modules:
                _give(module, panels)


_Owners = dict[torch.Tensor, list[nn.Module]]  # the modules that have a matrix


def _owners(model: nn.Module) -> _Owners:
    owners: _Owners = defaultdict(list)
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and weight.dtype == torch.float32:
            owners[weight].append(module)
    return owners


def _give(module: nn.Module, panels: PanelWeight) -> None:
    del module.weight
    module.weight = panels
    if type(module) is nn.Linear:
        module.__class__ = PanelLinear


def _siblings(model: nn.Module, owners: _Owners, dtype: torch.dtype) -> Iterator[tuple[list[nn.Linear], torch.dtype]]:
    """Modules whose weights can lie side by side: nobody else's, whole panels, of one `exact_dtype`, which is told."""
    for parent in list(model.modules()):
        for names in _SIBLINGS:
            found = [child for name in names if type(child := getattr(parent, name, None)) is nn.Linear]
            if len(found) == len(names) and all(owners.get(child.weight) == [child] for child in found):
                kinds = {(child.in_features, exact_dtype(child.weight, dtype)) for child in found}
                if len(kinds) == 1 and not any(child.out_features % PANEL for child in found):
                    ((_, own_dtype),) = kinds
                    yield found, own_dtype


def _join(siblings: Sequence[nn.Linear], dtype: torch.dtype, rounded: bool) -> None:
    """Gives each its `PanelWeight`, of that dtype, and all their `JointProduct`."""
    features = [module.out_features for module in siblings]
    whole = PanelMatrix(1, sum(features), siblings[0].in_features, dtype, rounded)
    joint = JointProduct(whole, features)
    for index, (module, own) in enumerate(zip(siblings, whole.beside(features), strict=True)):
        _give(module, PanelWeight(module.weight, own.dtype, rounded, own))
        cast(PanelLinear, module).joint = joint, index
