"""The rotary kernel beside transformers' functions, and whose functions it takes the place of."""

from __future__ import annotations

import importlib

import pytest
import torch
from moegen.model.rotary import RowRotation, row_rotations
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, Qwen3MoeRotaryEmbedding

PLAIN = ["qwen3_moe", "mixtral", "glm4_moe", "minimax_m2", "qwen3_next", "granitemoe", "olmoe"]
OTHERS = ["gpt_oss", "ernie4_5_moe"]  # halves of cosines; neighbours that turn together


def theirs(family: str):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}").apply_rotary_pos_emb


def inputs(dim: int, rotary: int, tokens: int = 37) -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k = (torch.randn(1, tokens, heads, dim).transpose(1, 2) for heads in (6, 2))
    return [q, k, torch.randn(1, tokens, rotary), torch.randn(1, tokens, rotary)]


@pytest.mark.parametrize("family", PLAIN)
def test_bits_are_those_of_the_family(family):
    rotation = RowRotation(theirs(family))
    assert rotation.is_plain
    for dim, rotary in ((64, 64), (128, 128), (24, 24), (64, 16)):
        given = inputs(dim, rotary)
        try:
            wanted = theirs(family)(*given)
        except RuntimeError:  # heads are rotated whole in this family
            assert rotary != dim
            continue
        assert all(map(torch.equal, rotation(*given), wanted))


@pytest.mark.parametrize("family", OTHERS)
def test_others_keep_their_own(family):
    assert not RowRotation(theirs(family)).is_plain


def test_what_the_kernel_does_not_read_goes_to_the_family():
    rotation = RowRotation(theirs("qwen3_moe"))
    for given in (
        [x.bfloat16() for x in inputs(64, 64)],
        [x.expand(2, *x.shape[1:]) for x in inputs(64, 64)],
    ):
        assert all(map(torch.equal, rotation(*given), theirs("qwen3_moe")(*given)))
    q, k, cos, sin = inputs(64, 64)
    wanted = theirs("qwen3_moe")(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    assert all(map(torch.equal, rotation(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2), wanted))


def test_a_module_is_given_its_own_and_the_family_keeps_its_function(monkeypatch):
    config = Qwen3MoeConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config._attn_implementation = "eager"
    ours, untouched = (Qwen3MoeAttention(config, 0).requires_grad_(False) for _ in range(2))
    untouched.load_state_dict(ours.state_dict())
    before = modeling_qwen3_moe.apply_rotary_pos_emb
    calls = []
    called = RowRotation.__call__
    monkeypatch.setattr(RowRotation, "__call__", lambda self, *given: calls.append(1) or called(self, *given))
    row_rotations(nn.ModuleList([ours]))
    assert modeling_qwen3_moe.apply_rotary_pos_emb is before
    x = torch.randn(1, 9, 64)
    angles = Qwen3MoeRotaryEmbedding(config)(x, torch.arange(9)[None])
    assert torch.equal(ours(x, angles, None)[0], untouched(x, angles, None)[0])
    assert calls == [1]
