"""The SiLU kernel beside torch, and which modules compute it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from moegen.model.gates import RowSilu, row_gates
from moegen.ops.expert_weights import laid_out
from moegen.ops.gate_kernel import silu, silu_gated
from moegen.ops.threads import use_threads
from moegen.ops.vector_ir import DOTS
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts


def rows(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(shape) * torch.logspace(-3, 2, shape[-1])


@pytest.mark.parametrize("features", [1, 15, 16, 48, 100, 384])
def test_the_kernel_computes_what_torch_does(features):
    x = rows(37, 2 * features)
    gate, up = x.chunk(2, dim=-1)
    assert torch.allclose(silu_gated(x), F.silu(gate) * up, rtol=1e-6, atol=1e-35)
    assert torch.allclose(silu(x[None]), F.silu(x)[None], rtol=1e-6, atol=1e-35)


def test_rows_may_lie_apart_and_their_answers_lie_as_the_next_product_reads_them():
    x = rows(9, 2 * 512)
    apart = torch.full((9, 1100), torch.nan)[:, :1024].copy_(x)
    out = silu_gated(apart)
    assert torch.equal(out, silu_gated(x))
    assert laid_out(out).data_ptr() == out.data_ptr()
    assert torch.equal(silu_gated(x.T.contiguous().T), out)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_answer_depends_neither_on_its_neighbours_nor_on_threads(threads):
    x = rows(515, 2 * 100)
    whole = silu_gated(x)
    torch.testing.assert_close(silu(x[:, :100]) * x[:, 100:], whole, rtol=0, atol=0)
    before = torch.get_num_threads()
    try:
        use_threads(threads)
        for row in (0, 7, 514):
            assert torch.equal(silu_gated(x[row : row + 1])[0], whole[row])
        assert torch.equal(silu_gated(x), whole)
        assert torch.equal(torch.cat([silu(x[:, :37]), silu(x[:, 37:])], dim=1), silu(x))
    finally:
        use_threads(before)


def test_extremes():
    x = torch.tensor([[0.0, -0.0, 1e4, -1e4, 88.0, -88.0, torch.inf, torch.nan]])
    out = silu(x)[0]
    assert torch.allclose(out[:6], F.silu(x)[0, :6], rtol=1e-6, atol=1e-30)
    assert out[6] == torch.inf
    assert out[7].isnan()


@pytest.mark.skipif(not DOTS, reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize("features", [7, 64, 100])
def test_rounded_as_torch_rounds(features):
    x = rows(21, 2 * features)
    out = silu_gated(x, torch.bfloat16)
    assert torch.equal(out, silu_gated(x).to(torch.bfloat16))
    assert laid_out(out, torch.bfloat16).data_ptr() == out.data_ptr()


def experts(kind: type[nn.Module], activation: str) -> nn.Module:
    config = SimpleNamespace(
        num_local_experts=2, hidden_size=8, intermediate_size=8, hidden_act=activation, swiglu_alpha=1.7,
        swiglu_limit=7.0, _experts_implementation="eager",
    )  # fmt: skip
    return kind(config)


def test_what_computes_something_else_is_left_alone():
    plain, gelu, clamped = experts(MixtralExperts, "silu"), experts(MixtralExperts, "gelu"), experts(GptOssExperts, "")
    model = nn.Sequential(nn.SiLU(), nn.GELU(), nn.Identity(), nn.Sigmoid(), nn.Linear(64, 64), plain, gelu, clamped)
    row_gates(model)
    assert [type(module) for module in model[:5]] == [RowSilu, nn.GELU, nn.Identity, nn.Sigmoid, nn.Linear]
    assert plain._apply_gate is silu_gated
    assert silu_gated not in (gelu._apply_gate, clamped._apply_gate)
    assert isinstance(plain.act_fn, RowSilu)
