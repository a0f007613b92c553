"""The two seams through which the engine enters a transformers model: attention and experts.

transformers looks up both functions by name in its registries. Ours do no mathematics of their own beyond
`moegen.ops`; what they need of the pass comes as the keyword argument `moegen`, which transformers models hand through
to the attention function. Any argument that the engine does not know is refused: it would change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moegen.errors import UnsupportedModel
from moegen.model.sparse import Unmasked
from moegen.ops.attention import AttentionRule
from moegen.ops.expert_weights import Counts, ExpertGroup, ExpertSupply
from moegen.ops.experts import grouped_experts
from moegen.ops.micro_batch import MicroBatch
from moegen.schedule.step import AttentionBatch

_NAME = "moegen"
# How transformers' constructors are told to use the engine's functions.
SEAMS: dict[str, Any] = {"attn_implementation": _NAME, "experts_implementation": _NAME}

# Arguments that carry nothing beyond what the engine keeps itself: causality, positions, caching, reporting.
_HARMLESS = frozenset(
    {"dropout", "is_causal", "position_ids", "position_embeddings", "use_cache", "cache_position", "past_key_values",
     "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"}
)  # fmt: skip

Done = TypeVar("Done")  # what a stage hands back


class PassContext(Protocol):
    """What a pass gives to its layers."""

    def in_batches(self, work: Callable[[Sequence[AttentionBatch]], Done]) -> Done:
        """`work` over the attention micro-batches, in the order in which they must run.

        Again, from the first on, over smaller ones where the device has no room: `work` can begin anew.
        """
        ...

    @property
    def tokens(self) -> int:
        """T, the tokens of the pass."""
        ...

    @property
    def kept(self) -> torch.Tensor | None:
        """`[S]` the tokens, at least one, of which something is asked after the last layer; None: all."""
        ...

    def within(self, batch: AttentionBatch) -> PassContext:
        """The same pass, for an attention stage that brings only this micro-batch."""
        ...

    def attend(
        self, layer: nn.Module, query_THD: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor,
        rule: AttentionRule,
    ) -> torch.Tensor:  # fmt: skip
        """Keeps the new keys and values of `layer` and answers the queries: `[T, H, value_dim]`."""
        ...

    def choose(self, layer: Any, given: Mapping[str, Any]) -> torch.Tensor:
        """What `layer`, a `moegen.model.sparse.PagedIndexer`, chooses for each token; its new keys are kept."""
        ...

    def recur(self, layer: Any, hidden_1TD: torch.Tensor) -> Any:
        """What `layer`, a `moegen.model.recurrent.RecurrentModule`, answers; its new states are kept."""
        ...


def attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, G, T, D], or a latent as `moegen.model.latent` keeps it
    value: torch.Tensor,  # [1, G, T, value_dim]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,  # [1, T, K] positions that an indexer chose
    moegen: PassContext | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over the engine's pages -> (`[1, T, H, value_dim]`, None).

    Raises:
        UnsupportedModel: the layer asks for something that the engine does not keep exact.
    """
    layer = type(module).__name__
    if moegen is None:
        raise UnsupportedModel(f"{layer}: does not hand the pass through to its attention function")
    if attention_mask is not None and not isinstance(attention_mask, Unmasked):
        raise UnsupportedModel(f"{layer}: builds an attention mask of its own (a sparse indexer, or a prefix mask)")
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise UnsupportedModel(f"{layer}: attention that is not causal")
    for name, option in options.items():
        if option is not None and name not in _HARMLESS:
            raise UnsupportedModel(f"{layer}: attention argument {name!r} is unknown to the engine")
    rule = AttentionRule(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, s_aux, softcap)
    if (latent := getattr(module, "moegen_latent", None)) is not None:
        if softcap is not None or (s_aux is not None and indices is None):  # chosen tokens are attended span by span
            raise UnsupportedModel(
                f"{layer}: latent attention with sinks or a soft cap; give engine.plan.latent_kv: false"
            )
        rule = replace(rule, latent=latent)
    if indices is not None:
        rule = replace(rule, chosen_TK=indices[0].long())
    query_THD, key_TGD, value_TGD = (x[0].transpose(0, 1) for x in (query, key, value))
    return moegen.attend(module, query_THD, key_TGD, value_TGD, rule)[None], None


class Observer(Protocol):
    """Hears what happens inside a pass."""

    def count(self, layer: str, counts_E: Counts) -> None:
        """Each expert of a layer met so many tokens."""
        ...

    def timed(self, part: Literal["attention", "experts"]) -> AbstractContextManager[None]:
        """The seconds inside are spent on this part."""
        ...


class Unobserved:
    """An `Observer` that keeps nothing."""

    def count(self, layer: str, counts_E: Counts) -> None:
        pass

    def timed(self, part: Literal["attention", "experts"]) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True, slots=True)
class ExpertStage:
    """How one experts module is run."""

    layer: str  # the module's name in the model
    supply: ExpertSupply
    expert_tokens: MicroBatch
    observer: Observer

    def lend(self, counts_E: Counts) -> Iterator[ExpertGroup]:
        """The supply's groups; tells the observer what they are wanted for."""
        self.observer.count(self.layer, counts_E)
        return self.supply.lend(counts_E)


def experts(
    module: Any, hidden_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface over `grouped_experts`; the host gives each module its `ExpertStage`."""
    stage: ExpertStage = module.moegen
    with stage.observer.timed("experts"):
        return grouped_experts(module, stage, hidden_TD, expert_ids_TK, weights_TK, expert_tokens=stage.expert_tokens)


ALL_ATTENTION_FUNCTIONS.register(_NAME, attention)
ALL_EXPERTS_FUNCTIONS.register(_NAME, experts)
