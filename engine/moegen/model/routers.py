"""Routers by softmax, through the CPU's kernel: known by what they compute, not by their class."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from moegen.model.dense import PanelWeight
from moegen.ops.router_kernel import top_experts

_TOLERANCE = 1e-5  # of float32
_SIZES = (0.1, 1.0, 5.0)  # of logits: far above and below, shares of the softmax are equal, their order is chance


class RowRouter(nn.Module):
    """Takes the place of a router that gives each token the experts with the highest logits."""

    weight: PanelWeight  # [E, D]

    def __init__(self, router: Any, among_all: bool) -> None:
        """For `among_all` see `top_experts`."""
        super().__init__()
        self.weight, self.top_k, self._among_all = router.weight, router.top_k, among_all

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of tokens `[..., D]`: logits `[T, E]`, weights `[T, K]` and ids `[T, K]`."""
        logits_TE = self.weight.times(hidden_states.reshape(-1, hidden_states.shape[-1]))
        return logits_TE, *top_experts(logits_TE, self.top_k, self._among_all)


def row_routers(model: nn.Module) -> None:
    """Puts a `RowRouter` in the place of every router, with its weights in panels, that one computes the same as."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            for among_all in (False, True):
                if _looks(child) and _does(child, own := RowRouter(child, among_all)):
                    setattr(parent, name, own)
                    break


def _looks(module: Any) -> bool:
    """Only modules that look like one are asked: a matrix in panels is all they have, tokens all they take."""
    return (
        isinstance(getattr(module, "top_k", None), int)
        and isinstance(getattr(module, "weight", None), PanelWeight)
        and not [*module.parameters(), *module.buffers(), *module.children()]
        and len(inspect.signature(module.forward).parameters) == 1
    )


@torch.inference_mode()
def _does(theirs: Any, ours: RowRouter) -> bool:
    """Whether both answer the same to tokens small and large."""
    generator = torch.Generator().manual_seed(0)
    sizes_T = torch.tensor(_SIZES * 8)  # several tokens: what is done may depend on which experts are chosen
    tokens_TD = torch.randn(len(sizes_T), ours.weight.shape[1], generator=generator)
    tokens_TD *= sizes_T[:, None] / ours.weight.times(tokens_TD).std().clamp(min=1e-6)
    own = ours(tokens_TD)
    for same_tokens in (tokens_TD, tokens_TD[None]):  # as blocks hand them over
        try:
            answers = theirs(same_tokens.clone())
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError):  # it takes others
            return False
        if not isinstance(answers, tuple) or len(answers) != len(own) or not all(map(_equal, answers, own)):
            return False
    return True


def _equal(answer: Any, own: torch.Tensor) -> bool:
    same = isinstance(answer, torch.Tensor) and (answer.shape, answer.dtype) == (own.shape, own.dtype)
    return same and torch.allclose(answer, own, rtol=_TOLERANCE, atol=1e-30)
