"""A tiny geometry of any model: same features, small numbers.

Sizes shrink; everything that changes the mathematics stays (layer kinds and their order, rotary types and head dims,
routing rules, multipliers, biases). Windows, chunks and index budgets shrink to a few tokens, so that short sequences
cross them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

_HEADS, _VOCABULARY, _EXPERTS, _LEAST_LAYERS = 4, 97, 8, 2
_SMALL = {  # name: largest value kept
    "intermediate_size": 64,  # whole panels of any processor, so that gates and ups are one product
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "dense_intermediate_size": 64,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 3,
    "moe_topk": 3,
    "moe_k": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 232,  # over half of what a head multiplies, so that prompts expand it and single tokens absorb
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_heads": 2,
    "linear_key_head_dim": 64,  # keys of few dims are alike, which amplifies rounding
    "linear_value_head_dim": 48,
    "linear_head_dim": 64,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "mamba_dt_rank": 16,
    "n_groups": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 97,
    "top_k_experts": 3,
    "sliding_window": 4,
    "sliding_window_size": 4,
    "attention_chunk_size": 5,
    "index_topk": 4,
    "index_n_heads": 16,  # enough that no key scores exactly nothing: the order of equal scores is not defined
}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of layers that holds most of the model's parameters."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def layers_of_every_kind(layers: nn.ModuleList) -> int:
    """The shortest prefix of `layers` that has one of each kind, at least two layers.

    Layers are of one kind when they are made of the same modules with the same plain attributes (numbers, flags,
    names). An attribute that is another number in every layer that has it counts layers and makes no kinds.
    """
    facts = [dict(_facts(layer)) for layer in layers]
    keys = {key for fact in facts for key in fact}
    counters = {key for key in keys if _counts([fact[key] for fact in facts if key in fact])}
    kinds = [{key: value for key, value in fact.items() if key not in counters} for fact in facts]
    last_first = max(index for index, kind in enumerate(kinds) if kind not in kinds[:index])
    return min(max(last_first + 1, _LEAST_LAYERS), len(layers))


def _facts(layer: nn.Module) -> Iterator[tuple[tuple[str, str], object]]:
    for name, module in layer.named_modules():
        yield (name, "class"), type(module)
        for key, value in vars(module).items():
            if not key.startswith("_") and isinstance(value, bool | int | float | str | None):
                yield (name, key), value


def _counts(values: list[object]) -> bool:
    return all(type(value) is int for value in values) and len(set(values)) == len(values)


def tiny_config(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """A copy of `config` with its first `layers` layers and a tiny geometry (`config` itself is left alone)."""
    tiny = copy.deepcopy(config)
    text = tiny.get_text_config()
    single = _single_layers(text, layers)
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:layers])
        elif name.endswith("_token_id"):  # vocabularies are small; some models put the padding where images were
            setattr(text, name, 0 if name == "pad_token_id" and value is not None else None)
    for name, most in _SMALL.items():  # by attribute: a config may store it under another name
        value = getattr(text, name, None)
        if isinstance(value, int) and value > most:
            setattr(text, name, most)
    for name in _EXPERT_COUNTS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, _EXPERTS)
    text.num_hidden_layers = layers
    text.vocab_size = _VOCABULARY
    _shrink_heads(text)
    if single:
        text.per_layer_config = {
            layer: {name: _shrunk(name, value, text) for name, value in values.items()}
            for layer, values in single.items()
        }
    return tiny


def _single_layers(text: PreTrainedConfig, layers: int) -> dict[int, dict[str, Any]]:
    """What the config says for single layers of the first `layers`, taken out of it; what it says for all is left."""
    if not getattr(text, "is_heterogeneous", False):
        return {}
    said = text.to_dict()["per_layer_config"]
    text.per_layer_config = None
    return {int(layer): values for layer, values in said.items() if int(layer) < layers}


def _shrunk(name: str, value: Any, text: PreTrainedConfig) -> Any:
    """A single layer's size, as small as that of all layers may be."""
    if name in _EXPERT_COUNTS and value:
        return _EXPERTS
    if name in ("num_attention_heads", "num_key_value_heads"):
        return getattr(text, name)
    return min(value, _SMALL[name]) if name in _SMALL and isinstance(value, int) else value


def _shrink_heads(text: PreTrainedConfig) -> None:
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    text.hidden_size = _HEADS * head_dim if not getattr(text, "kv_lora_rank", None) else 64
    text.num_attention_heads = _HEADS
    if getattr(text, "num_key_value_heads", None):
        text.num_key_value_heads = _HEADS if kv_heads == heads else 1 if kv_heads == 1 else 2
    if getattr(text, "mamba_n_heads", None):
        text.mamba_n_heads = text.mamba_expand * text.hidden_size // text.mamba_d_head
