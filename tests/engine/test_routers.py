"""The router kernel beside transformers' routers, and which modules it may stand for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from moegen.model.dense import panel_weights
from moegen.model.routers import RowRouter, row_routers
from moegen.ops.router_kernel import top_experts
from torch import nn
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

HIDDEN = 48
SIZES = {"hidden_size": HIDDEN, "num_experts_per_tok": 3}


def of_random_weights(router: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for weights in router.parameters():
        nn.init.normal_(weights, std=HIDDEN**-0.5)
    return router.requires_grad_(False)


SAME = {
    "qwen3, shares of the chosen": lambda: Qwen3MoeTopKRouter(Qwen3MoeConfig(**SIZES, norm_topk_prob=True)),
    "qwen3, shares of all": lambda: Qwen3MoeTopKRouter(Qwen3MoeConfig(**SIZES, norm_topk_prob=False)),
    "mixtral": lambda: MixtralTopKRouter(MixtralConfig(**SIZES, num_local_experts=7)),
    "olmoe": lambda: OlmoeTopKRouter(OlmoeConfig(**SIZES, num_experts=60)),
}


@pytest.mark.parametrize("router", SAME.values(), ids=SAME)
@pytest.mark.parametrize("tokens", [1, 7, 700])
def test_the_kernel_computes_what_transformers_does(router: Any, tokens: int) -> None:
    model = nn.ModuleList([of_random_weights(router())])
    panel_weights(model, torch.float32)
    theirs = model[0]
    row_routers(model)
    assert type(model[0]) is RowRouter
    for size in (0.1, 1.0, 5.0):
        x_TD = torch.randn(tokens, HIDDEN) * size
        wanted, got = theirs(x_TD), model[0](x_TD)
        assert torch.equal(got[0], wanted[0])
        assert torch.allclose(got[1], wanted[1], rtol=1e-5, atol=1e-30)
        assert torch.equal(got[2], wanted[2])


def test_what_computes_something_else_is_left_alone() -> None:
    """Biases, sigmoids, factors; a rule that shows for some tokens only; other answers, other shapes."""

    class Halved(Qwen3MoeTopKRouter):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits, weights, ids = super().forward(hidden_states)
            return logits, torch.where(ids[:, :1] % 2 == 0, weights, weights / 2), ids

    class Scaled(Qwen3MoeTopKRouter):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits, weights, ids = super().forward(hidden_states)
            return logits, weights * 2.5, ids

    class Sigmoids(Qwen3MoeTopKRouter):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits, _, ids = super().forward(hidden_states)
            return logits, logits.gather(1, ids).sigmoid(), ids

    class Limited(Qwen3MoeTopKRouter):
        """To half of the experts: those of the group with the highest one."""

        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits, _, _ = super().forward(hidden_states)
            group_T = logits.argmax(-1) // (self.num_experts // 2)
            elsewhere = torch.arange(self.num_experts) // (self.num_experts // 2) != group_T[:, None]
            weights, ids = logits.masked_fill(elsewhere, -torch.inf).softmax(-1).topk(self.top_k)
            return logits, weights / weights.sum(-1, keepdim=True), ids

    class Turned(Qwen3MoeTopKRouter):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits, weights, ids = super().forward(hidden_states)
            return logits, ids, weights

    class Unflattened(Qwen3MoeTopKRouter):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(x.view(*hidden_states.shape[:-1], -1) for x in super().forward(hidden_states))

    kinds = (Halved, Scaled, Sigmoids, Limited, Turned, Unflattened)
    others = [
        *(kind(Qwen3MoeConfig(**SIZES, norm_topk_prob=True)) for kind in kinds),
        GptOssTopKRouter(GptOssConfig(**SIZES)),
        DeepseekV3TopkRouter(DeepseekV3Config(**SIZES)),
        nn.Linear(HIDDEN, 8, bias=False),
    ]
    model = nn.ModuleList([of_random_weights(router) for router in others])
    panel_weights(model, torch.float32)
    before = [type(module) for module in model]
    row_routers(model)
    assert [type(module) for module in model] == before


@pytest.mark.parametrize("among_all", [False, True])
def test_a_row_does_not_depend_on_the_rows_beside_it_nor_on_how_they_lie(among_all: bool) -> None:
    logits_TE = torch.randn(900, 70)
    whole = top_experts(logits_TE, 5, among_all)
    for token in (0, 7, 899):
        alone = top_experts(logits_TE[token : token + 1], 5, among_all)
        assert all(torch.equal(one[0], all_rows[token]) for one, all_rows in zip(alone, whole, strict=True))
    with_gaps = torch.nn.functional.pad(logits_TE, (0, 10))[:, :70]
    assert all(map(torch.equal, top_experts(with_gaps, 5, among_all), whole))


def test_of_equal_logits_the_lower_ids_are_taken() -> None:
    weights_TK, ids_TK = top_experts(torch.tensor([[1.0, 3, 3, 2, 3, 2]]), 4, False)
    assert ids_TK.tolist() == [[1, 2, 4, 3]]
    assert weights_TK[0, 0] == weights_TK[0, 2] > weights_TK[0, 3]
    assert top_experts(torch.zeros(1, 8), 8, False)[1].tolist() == [[*range(8)]]


@pytest.mark.parametrize(("place", "among_all"), [*itertools.product([0, 3, 7], [False, True])])
def test_what_is_not_a_number_shows_and_harms_nobody_else(place: int, among_all: bool) -> None:
    logits_TE = torch.randn(3, 8)
    sound = top_experts(logits_TE, 2, among_all)
    for value in (torch.nan, torch.inf):
        logits_TE[1, place] = value
        weights_TK, ids_TK = top_experts(logits_TE, 2, among_all)
        assert weights_TK[1].isnan().all()
        assert set(ids_TK[1].tolist()) <= {*range(8)}
        assert torch.equal(weights_TK[::2], sound[0][::2])
    logits_TE[1] = torch.nan
    assert top_experts(logits_TE, 2, among_all)[1][1].tolist() == [0, 1]
    logits_TE[1], logits_TE[1, place] = -torch.inf, 0.5  # what is ruled out
    weights_TK, ids_TK = top_experts(logits_TE, 3, among_all)
    assert weights_TK[1].tolist() == [1.0, 0.0, 0.0]
    assert (ids_TK[1, 0], len(set(ids_TK[1].tolist()))) == (place, 3)
    assert [part.shape for part in top_experts(logits_TE[:0], 3, among_all)] == [(0, 3)] * 2
