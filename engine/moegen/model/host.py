"""A transformers model in the engine's hands: built by transformers, entered at its seams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from moegen.memory.kv_pool import KVShape
from moegen.memory.state_pool import StateShape
from moegen.model.dense import panel_weights
from moegen.model.gates import row_gates
from moegen.model.latent import keep_latents
from moegen.model.norms import row_norms
from moegen.model.recurrent import RecurrentModule, StateView, hear_of_passes, place_recurrent
from moegen.model.rotary import row_rotations
from moegen.model.routers import row_routers
from moegen.model.seams import Done, ExpertStage, Observer, PassContext, Unobserved
from moegen.model.sparse import PagedIndexer, place_indexers, unmask
from moegen.model.stages import StagedLayer, plain_parts
from moegen.ops.attention import AttentionRule
from moegen.ops.expert_weights import ExpertSupply, resident_experts
from moegen.ops.micro_batch import MicroBatch
from moegen.schedule.step import AttentionBatch


class ModelHost:
    """A causal language model whose attention and experts run in the engine's functions.

    Attributes:
        kv_shapes: what each attention module keeps per token, found by running one token.
        state_shapes: what each recurrent module keeps per sequence, found likewise.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        staged: bool,
        expert_tokens: int,
        latent_kv: bool = True,
        supplies: Mapping[str, ExpertSupply] | None = None,
        stored_dtype: torch.dtype | None = None,
        rounded: bool = False,
        observer: Observer | None = None,
    ) -> None:
        """Takes the model over.

        Args:
            latent_kv: layers with latent attention keep latents; else, as any other, keys and values of all heads.
            supplies: where each experts module, by its name, has its weights from; None: they are in the model.
            stored_dtype: in which matrices (and experts that are in the model) are kept where the CPU's kernel widens
                them as it reads; None: the model's.
            rounded: activations are rounded to bfloat16 where such a matrix, or the pages, are that too: see
                `PanelMatrix` and `paged_attention`.
            observer: hears of every pass.
        """
        self.model = model.eval().requires_grad_(False)
        self.observer, self.rounded = observer or Unobserved(), rounded
        stored, experts_at_once = stored_dtype or model.dtype, MicroBatch(expert_tokens, "expert")
        for name, module in list(model.named_modules()):
            if is_experts(module):
                supply = resident_experts(module, stored, rounded) if supplies is None else supplies[name]
                module.moegen = ExpertStage(name, supply, experts_at_once, self.observer)
        if latent_kv:
            keep_latents(model, stored)
        if model.device.type == "cpu" and model.dtype == torch.float32:
            panel_weights(model, stored, rounded)
            row_norms(model)
            row_rotations(model)
            row_gates(model)
            row_routers(model)
        unmask(model)
        hear_of_passes(model, [*place_recurrent(model), *place_indexers(model)])
        if staged:
            stage_layers(model)
        self._trunk = _Trunk(model.base_model) if model.base_model is not model else None
        self.kv_shapes, self.state_shapes = self._trace()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def logits(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        keep_S: torch.Tensor,
        context: PassContext,
        logit_tokens: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Logits `[s, V]` of the tokens `keep_S` of a flat batch of T tokens, at most `logit_tokens` at a time.

        One forward of the whole model; only what comes after its last layer is done piece by piece.
        """
        token_ids_1T, positions_1T = token_ids_T[None].to(self.device), positions_T[None].to(self.device)
        pieces = keep_S.to(self.device).split(logit_tokens or max(len(keep_S), 1) if self._trunk else len(keep_S) or 1)
        with self._trunk or nullcontext():
            for keep_s in pieces:
                output = self.model(
                    input_ids=token_ids_1T,
                    position_ids=positions_1T,
                    use_cache=False,
                    logits_to_keep=keep_s,
                    moegen=context,
                )
                yield output.logits[0]

    @torch.inference_mode()
    def _trace(self) -> tuple[dict[nn.Module, KVShape], dict[nn.Module, StateShape]]:
        trace = _Trace()
        one = torch.zeros(1, dtype=torch.int64)
        for _ in self.logits(one, one, one, trace):
            pass
        return trace.shapes, trace.states


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' experts interface serves the module: it gives each such class a `_apply_gate`."""
    return hasattr(module, "_apply_gate")


class _Trunk:
    """The model below its head, run once inside a `with`: asked again, it gives the same answer."""

    def __init__(self, base: nn.Module) -> None:
        self._forward = base.forward
        self._answer: Any = None
        base.forward = self._run

    def __enter__(self) -> None:
        self._answer = None

    def __exit__(self, *exception: object) -> None:
        self._answer = None

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self._answer is None:
            self._answer = self._forward(*args, **kwargs)
        return self._answer


class _Trace:
    """One token through the model: records the shape of what every layer keeps, keeps nothing."""

    def __init__(self) -> None:
        self.shapes: dict[nn.Module, KVShape] = {}
        self.states: dict[nn.Module, StateShape] = {}
        zero = np.zeros(1, np.int64)
        self._batches = (AttentionBatch(0, 1, (), zero, zero),)
        self.tokens, self.kept = 1, None

    def in_batches(self, work: Callable[[Sequence[AttentionBatch]], Done]) -> Done:
        return work(self._batches)

    def within(self, batch: AttentionBatch) -> _Trace:
        return self

    def attend(
        self, layer: nn.Module, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor,
        rule: AttentionRule,
    ) -> torch.Tensor:  # fmt: skip
        _, kv_heads, key_dim = key_TGD.shape
        latent, window = rule.latent is not None, rule.sliding_window
        self.shapes[layer] = KVShape(kv_heads, key_dim, value_TGD.shape[-1], latent, window)
        return query_THD.new_zeros(1, query_THD.shape[1], rule.value_dim(value_TGD))

    def choose(self, layer: PagedIndexer, given: Mapping[str, Any]) -> torch.Tensor:
        self.shapes[layer], chosen = layer.one_token(given)
        return chosen

    def recur(self, layer: RecurrentModule, hidden_1TD: torch.Tensor) -> Any:
        self.states[layer] = layer.find_out(hidden_1TD)
        return layer.answer(layer.call(hidden_1TD, StateView()))


def stage_layers(model: nn.Module) -> None:
    """Puts a `StagedLayer` in the place of every layer that has the plain parts."""
    places = [
        (modules, index)
        for modules in model.modules()
        if isinstance(modules, nn.ModuleList)
        for index, layer in enumerate(modules)
        if plain_parts(layer)
    ]
    one_list = len({modules for modules, _ in places}) == 1  # else which of them comes last is not known
    for modules, index in places:
        modules[index] = StagedLayer(modules[index], last=one_list and index == len(modules) - 1)
