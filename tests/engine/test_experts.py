"""The grouped experts against transformers' own eager loop over experts."""

from __future__ import annotations

import pytest
import torch
from moegen.ops.experts import grouped_experts
from torch import nn
from transformers import GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

EXPERTS, HIDDEN, WIDTH, TOP_K = 8, 24, 16, 3


def _filled(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return module.to(dtype).requires_grad_(False)


def _gated() -> nn.Module:
    config = Qwen3MoeConfig(
        num_local_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "eager"
    return _filled(Qwen3MoeExperts(config))


def _transposed_with_bias() -> nn.Module:
    config = GptOssConfig(num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=WIDTH)
    config._experts_implementation = "eager"
    return _filled(GptOssExperts(config))


def _without_gate() -> nn.Module:
    config = NemotronHConfig(n_routed_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=WIDTH)
    config._experts_implementation = "eager"
    return _filled(NemotronHExperts(config))


KINDS = {"gated": _gated, "transposed with bias": _transposed_with_bias, "without gate": _without_gate}


def _routed(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, expert ids (distinct per token, skewed to the low ones) and weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    scores = torch.randn(tokens, EXPERTS, generator=generator) - torch.arange(EXPERTS) / 2
    weights, ids = scores.softmax(-1).topk(TOP_K)
    return hidden, ids, weights


def test_kinds_are_what_they_say() -> None:
    gated, biased, plain = (make() for make in KINDS.values())
    assert (gated.has_gate, gated.has_bias, gated.is_transposed) == (True, False, False)
    assert (biased.has_gate, biased.has_bias, biased.is_transposed) == (True, True, True)
    assert not plain.has_gate


@pytest.mark.parametrize("expert_tokens", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("tokens", [1, 5, 90])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_transformers(kind: str, tokens: int, expert_tokens: int) -> None:
    module = KINDS[kind]()
    hidden, ids, weights = _routed(tokens)
    expected = module(hidden, ids, weights)
    assert torch.allclose(
        grouped_experts(module, hidden, ids, weights, expert_tokens=expert_tokens), expected, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_does_not_see_the_batch(kind: str) -> None:
    module = KINDS[kind]()
    hidden, ids, weights = _routed(60)
    together = grouped_experts(module, hidden, ids, weights, expert_tokens=1 << 20)
    for i in range(0, 60, 7):
        own = slice(i, i + 1)
        alone = grouped_experts(module, hidden[own], ids[own], weights[own], expert_tokens=5)
        assert torch.allclose(alone[0], together[i], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_past_the_last_expert_add_nothing(kind: str) -> None:
    """transformers marks experts of another device so."""
    module = KINDS[kind]()
    hidden, ids, weights = _routed(40)
    elsewhere = ids >= EXPERTS // 2
    expected = grouped_experts(module, hidden, ids, weights.masked_fill(elsewhere, 0), expert_tokens=64)
    sentinel = ids.masked_fill(elsewhere, EXPERTS)
    for expert_tokens in (3, 64):
        out = grouped_experts(module, hidden, sentinel, weights, expert_tokens=expert_tokens)
        assert torch.allclose(out, expected, atol=1e-6)
    assert not grouped_experts(module, hidden, torch.full_like(ids, EXPERTS), weights, expert_tokens=9).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    module = _gated()
    hidden, ids, weights = _routed(50)
    expected = module(hidden, ids, weights)
    out = grouped_experts(module.to(dtype), hidden.to(dtype), ids, weights.to(dtype), expert_tokens=16)
    assert out.dtype is dtype
    assert torch.allclose(out.float(), expected, atol=0.05 * expected.abs().max())
