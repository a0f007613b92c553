"""Routed pairs sorted by expert: by counting on a CPU, by torch elsewhere; and what their answers add up to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from moegen.ops.expert_kernel import add_weighted_rows
from moegen.ops.routing import Routing


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("tokens", [0, 1, 7, 500])
def test_pairs_are_sorted_by_expert_then_by_token(tokens: int, top_k: int) -> None:
    experts = 16
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, experts + 2, generator=generator)  # of two ids that are no expert's, too
    weights_TK, ids_TK = scores.topk(top_k)
    routing = Routing.of(ids_TK, weights_TK, experts)
    expert_of_TK = ids_TK.clamp(max=experts)
    order = np.argsort(expert_of_TK.flatten().numpy(), kind="stable")
    assert routing.ids_S.tolist() == ids_TK.flatten()[order].tolist()
    assert routing.tokens_S.tolist() == (order // top_k).tolist()
    assert torch.equal(routing.weights_S, weights_TK.flatten()[order])
    assert routing.counts_E.tolist() == [int((ids_TK == expert).sum()) for expert in range(experts)]
    assert routing.starts_E1.tolist() == [0, *np.cumsum(routing.counts_E)]
    assert torch.equal(routing.ids_S.clamp(max=experts)[routing.places_TK], expert_of_TK.sort(dim=1).values)
    assert torch.equal(routing.tokens_S[routing.places_TK], torch.arange(tokens)[:, None].expand(-1, top_k))

    by_torch, pairs = Routing._by_torch(ids_TK, weights_TK, experts), sum(routing.counts_E)
    assert by_torch.counts_E.tolist() == routing.counts_E.tolist()
    assert by_torch.starts_E1.tolist() == routing.starts_E1.tolist()
    for name in ("tokens_S", "ids_S", "weights_S"):
        assert torch.equal(getattr(by_torch, name)[:pairs], getattr(routing, name)[:pairs])
    assert torch.equal(by_torch.places_TK.clamp(max=pairs), routing.places_TK.clamp(max=pairs))


def test_a_token_may_name_an_expert_twice() -> None:
    routing = Routing.of(torch.tensor([[2, 0, 2], [0, 2, 2]]), torch.arange(6.0).view(2, 3), 3)
    assert routing.counts_E.tolist() == [2, 0, 4]
    assert routing.weights_S.tolist() == [1, 3, 0, 2, 4, 5]
    assert routing.places_TK.tolist() == [[0, 2, 3], [1, 4, 5]]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_tokens_answers_add_up_to_the_same_bits_however_they_come(threads: int) -> None:
    """All at once, or some at a time: they are added one after another."""
    tokens, top_k, width = 9, 7, 20
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(tokens * top_k, generator=generator).view(tokens, top_k).sort(dim=1).values.numpy()
    weights = torch.rand(tokens * top_k, generator=generator).numpy()
    answers = torch.randn(tokens * top_k, width, generator=generator).numpy()
    whole = np.full((tokens, width), np.nan, np.float32)
    add_weighted_rows(whole, width, places, weights, answers, 0, threads)
    expected = (weights[places, None].astype(np.float64) * answers[places]).sum(1)
    assert np.allclose(whole, expected, atol=1e-5)
    for size in (1, 5, 30):
        parts = np.full_like(whole, np.nan)
        for first in range(0, len(answers), size):
            some = np.ascontiguousarray(answers[first : first + size])
            add_weighted_rows(parts, width, places, weights, some, first, threads)
        assert np.array_equal(parts, whole)
