"""A tiny geometry of any model: same features, small numbers.

Sizes shrink; everything that changes the mathematics stays (layer kinds and their order, rotary types and head dims,
routing rules, multipliers, biases). Windows, chunks and index budgets shrink to a few tokens, so that short sequences
cross them.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig

_HEADS, _VOCABULARY, _EXPERTS, _MOST_LAYERS = 4, 97, 8, 8
_SMALL = {  # name: largest value kept
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "dense_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "sliding_window": 4,
    "attention_chunk_size": 5,
    "index_topk": 4,
    "index_n_heads": 2,
}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of `config` with a tiny geometry (`config` itself is left alone)."""
    tiny = copy.deepcopy(config)
    text = tiny.get_text_config()
    layers = text.num_hidden_layers
    values: dict[str, Any] = text.to_dict()
    keep = _layers_to_keep(values, layers)
    for name, value in values.items():
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:keep])
        elif name in _SMALL and isinstance(value, int) and value > _SMALL[name]:
            setattr(text, name, _SMALL[name])
        elif name in _EXPERT_COUNTS and isinstance(value, int):
            setattr(text, name, _EXPERTS)
        elif name.endswith("_token_id"):
            setattr(text, name, None)
    text.num_hidden_layers = keep
    text.vocab_size = _VOCABULARY
    _shrink_heads(text)
    return tiny


def _layers_to_keep(values: dict[str, Any], layers: int) -> int:
    """The shortest prefix of the layers that has one of each kind, at least two layers."""
    lists = [v for v in values.values() if isinstance(v, list) and len(v) == layers]
    kinds = [tuple(map(repr, kind)) for kind in zip(*lists, strict=True)]
    last_first = max((kinds.index(kind) for kind in set(kinds)), default=0)
    return min(max(last_first + 1, 2), layers, _MOST_LAYERS)


def _shrink_heads(text: PreTrainedConfig) -> None:
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    text.hidden_size = _HEADS * head_dim if not getattr(text, "kv_lora_rank", None) else 64
    text.num_attention_heads = _HEADS
    if getattr(text, "num_key_value_heads", None):
        text.num_key_value_heads = _HEADS if kv_heads == heads else 1 if kv_heads == 1 else 2
