"""The norm kernel beside transformers' norms, and which modules are norms."""

from __future__ import annotations

import pytest
import torch
from moegen.model.norms import RowNorm, is_plain_norm, row_norms
from moegen.ops.expert_weights import laid_out
from torch import nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm, Qwen3NextRMSNormGated


def with_weights(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        norm.weight.normal_()
    return norm.requires_grad_(False)


@pytest.mark.parametrize("norm", [Qwen3MoeRMSNorm, MixtralRMSNorm])
@pytest.mark.parametrize("shape", [(1, 1, 16), (1, 300, 512), (1, 37, 4, 48), (2, 3, 2049)])
def test_the_kernel_computes_what_transformers_does(norm, shape):
    theirs = with_weights(norm(shape[-1]))
    assert is_plain_norm(theirs)
    for size in (1e-3, 1.0, 100.0):
        x = torch.randn(shape) * size
        assert torch.allclose(RowNorm(theirs)(x), theirs(x), rtol=1e-5, atol=1e-7)


def test_a_row_does_not_depend_on_the_rows_beside_it_nor_on_how_they_lie():
    norm, x = RowNorm(with_weights(Qwen3MoeRMSNorm(768))), torch.randn(1, 515, 768)
    whole = norm(x)
    for row in (0, 7, 514):
        assert torch.equal(norm(x[:, row : row + 1])[0, 0], whole[0, row])
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(norm(turned), whole)


def test_tokens_lie_as_the_next_product_reads_them():
    out = RowNorm(with_weights(Qwen3MoeRMSNorm(512)))(torch.randn(1, 9, 512))
    assert laid_out(out[0]).data_ptr() == out.data_ptr()


def test_what_computes_something_else_is_left_alone():
    """A weight around 0, a mean that is subtracted, a gate, a norm without weights."""
    others = [
        with_weights(Qwen3NextRMSNorm(64)),
        with_weights(nn.LayerNorm(64, bias=False)),
        with_weights(Qwen3NextRMSNormGated(64)),
        Gemma4RMSNorm(64, with_scale=False),
        nn.Linear(64, 1, bias=False),
    ]
    model = nn.Sequential(*others, with_weights(Qwen3MoeRMSNorm(64)))
    row_norms(model)
    assert [type(module) for module in model] == [*map(type, others), RowNorm]
