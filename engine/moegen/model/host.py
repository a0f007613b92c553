"""A transformers model in the engine's hands: built by transformers, entered at its seams."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from moegen.memory.kv_pool import KVShape
from moegen.model.seams import PassContext
from moegen.model.stages import StagedLayer, has_plain_parts
from moegen.ops.attention import AttentionRule
from moegen.schedule.step import AttentionBatch


class ModelHost:
    """A causal language model whose attention and experts run in the engine's functions.

    Attributes:
        kv_shapes: what each attention module keeps per token, found by running one token.
    """

    def __init__(self, model: PreTrainedModel, *, staged: bool, expert_tokens: int) -> None:
        self.model = model.eval().requires_grad_(False)
        for module in model.modules():
            if hasattr(module, "_apply_gate"):  # set by transformers' experts interface on every experts class
                module.moegen_expert_tokens = expert_tokens
        if staged:
            stage_layers(model)
        self.kv_shapes = self._trace()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def logits(
        self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, keep_S: torch.Tensor, context: PassContext
    ) -> torch.Tensor:
        """Logits `[S, V]` of the tokens `keep_S` of a flat batch of T tokens; one forward of the whole model."""
        output = self.model(
            input_ids=token_ids_T[None].to(self.device),
            position_ids=positions_T[None].to(self.device),
            use_cache=False,
            logits_to_keep=keep_S.to(self.device),
            moegen=context,
        )
        return output.logits[0]

    @torch.inference_mode()
    def _trace(self) -> dict[nn.Module, KVShape]:
        trace = _Trace()
        one = torch.zeros(1, dtype=torch.int64)
        self.logits(one, one, one, trace)
        return trace.shapes


class _Trace:
    """One token through the model: records the shape of every layer's keys and values, keeps nothing."""

    def __init__(self) -> None:
        self.shapes: dict[nn.Module, KVShape] = {}
        zero = np.zeros(1, np.int64)
        self.batches = (AttentionBatch(0, 1, (), zero, zero),)
        self.tokens = 1

    def within(self, batch: AttentionBatch) -> _Trace:
        return self

    def attend(
        self, layer: nn.Module, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor,
        rule: AttentionRule,
    ) -> torch.Tensor:  # fmt: skip
        _, kv_heads, key_dim = key_TGD.shape
        self.shapes[layer] = KVShape(kv_heads, key_dim, value_TGD.shape[-1])
        return query_THD.new_zeros(1, query_THD.shape[1], value_TGD.shape[-1])


def stage_layers(model: nn.Module) -> int:
    """Puts a `StagedLayer` in the place of every layer that has the plain parts; how many there were."""
    places = [
        (modules, index)
        for modules in model.modules()
        if isinstance(modules, nn.ModuleList)
        for index, layer in enumerate(modules)
        if has_plain_parts(layer)
    ]
    for modules, index in places:
        modules[index] = StagedLayer(modules[index])
    return len(places)
