from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from moegen.ops.sampling import sample, uniform, unpacked
from moegen.schedule.sequence import Request, Sequence
from moegen.spec import Sampling
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCABULARY = 50


def sequence(row: int, tokens: list[int], **params) -> Sequence:
    return Sequence(Request(row, tuple(tokens), Sampling(max_tokens=9, **params)), row, list(tokens))


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def warped(row_V: torch.Tensor, s: Sequence) -> torch.Tensor:
    """The distribution by transformers' own processors, in vLLM's order."""
    p, ids, scores = s.request.params, torch.tensor([s.tokens]), row_V[None].clone()
    if p.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(ids, scores)
    scores = TemperatureLogitsWarper(p.temperature)(ids, scores)
    if p.min_p:
        scores = MinPLogitsWarper(p.min_p)(ids, scores)
    if p.top_k:
        scores = TopKLogitsWarper(p.top_k)(ids, scores)
    if p.top_p < 1:
        scores = TopPLogitsWarper(p.top_p)(ids, scores)
    return scores.softmax(-1)[0].double()


def inverse_cdf(probs_V: torch.Tensor, s: Sequence) -> int:
    draw = uniform(s.request.params.seed, s.request.row_index, len(s.tokens), s.request.sample)
    total = 0.0
    for token, p in enumerate(probs_V.tolist()):
        total += p
        if total > draw:
            return token
    raise AssertionError("the distribution does not sum to 1")


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.4},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.2, "repetition_penalty": 1.7},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
    ],
)
def test_a_draw_is_the_inverse_of_the_distribution_that_transformers_makes(params):
    rows = [sequence(i, [1, 2, 3 + i], seed=i, **params) for i in range(40)]
    given = logits(40)
    expected = [inverse_cdf(warped(given[i], s), s) for i, s in enumerate(rows)]
    assert sample(given.clone(), rows) == expected
    assert len(set(expected)) > 3


def test_a_row_does_not_depend_on_its_neighbours():
    kinds = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}, {"temperature": 0.7, "top_p": 0.5}]
    rows = [sequence(i, [i], **kinds[i % 4]) for i in range(12)]
    given = logits(12)
    together = sample(given.clone(), rows)
    alone = [sample(given[i : i + 1].clone(), [s])[0] for i, s in enumerate(rows)]
    backwards = sample(given.flip(0).clone(), rows[::-1])[::-1]
    assert together == alone == backwards


def test_greedy_takes_the_largest_and_the_penalty_counts_prompt_and_answer():
    given = torch.zeros(2, VOCABULARY)
    given[:, 7], given[:, 8] = 2.0, 1.9
    free, penalised = sequence(0, [7]), sequence(1, [7], repetition_penalty=1.5)
    assert sample(given, [free, penalised]) == [7, 8]


def test_the_draw_is_a_pure_and_even_function_of_its_coordinates():
    draws = [uniform(1, row, position) for row in range(40) for position in range(50)]
    assert draws == [uniform(1, row, position) for row in range(40) for position in range(50)]
    assert len(set(draws)) == 2000
    assert all(0 <= draw < 1 for draw in draws)
    assert math.isclose(sum(draws) / 2000, 0.5, abs_tol=0.03)
    assert uniform(1, 2, 3) != uniform(1, 3, 2) != uniform(2, 1, 3)
    assert len({uniform(1, 2, 3, sample) for sample in range(50)} | {uniform(1, 2, 3)}) == 50


def masks(rows: int, seed: int = 1) -> tuple[np.ndarray, torch.Tensor]:
    """Random ones as bits, and which of the tokens they forbid; the last two tokens have no bit."""
    allowed = np.random.default_rng(seed).random((rows, VOCABULARY - 2)) < 0.3
    allowed[:, 5] = True
    forbidden = torch.ones(rows, VOCABULARY, dtype=torch.bool)
    forbidden[:, : VOCABULARY - 2] = torch.from_numpy(~allowed)
    return np.packbits(allowed, axis=1, bitorder="little"), forbidden


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.8},
                                    {"temperature": 2.0, "min_p": 0.2, "repetition_penalty": 1.4}])  # fmt: skip
def test_masked_tokens_are_out_before_anything_else_is_done(params):
    rows = [sequence(i, [1, 2, 3 + i], seed=i, **params) for i in range(40)]
    given = logits(40)
    packed, forbidden = masks(40)
    expected = sample(given.masked_fill(forbidden, -torch.inf), rows)
    assert sample(given.clone(), rows, packed) == expected != sample(given.clone(), rows)
    assert not any(forbidden[i, token] for i, token in enumerate(expected))


def test_bits_are_unpacked_alike_on_the_host_and_on_a_device():
    bits, forbidden = masks(7)
    assert torch.equal(unpacked(torch.from_numpy(bits), VOCABULARY) == 0, forbidden)
    wide, narrow = unpacked(torch.from_numpy(bits), 64), unpacked(torch.from_numpy(bits), 9)
    assert (wide.shape, narrow.shape) == ((7, 64), (7, 9))
    assert not wide[:, VOCABULARY:].any()


def test_no_rows_is_no_tokens():
    assert sample(torch.zeros(0, VOCABULARY), []) == []


@pytest.mark.parametrize("vocabulary", [64, 640, 650])
def test_the_highest_is_found_wherever_it_is(vocabulary: int) -> None:
    """The first of several that are as high; what is not a number is above all; nothing but the lowest there is."""
    given = torch.randn(30, vocabulary, generator=torch.Generator().manual_seed(0))
    given[0, [3, 60]], given[1, [vocabulary - 70, -1]], given[2, 11] = 99, 99, torch.nan
    given[3] = -torch.inf
    expected = given.argmax(dim=-1)
    assert expected[[0, 2, 3]].tolist() == [3, 11, 0]
    assert sample(given, [sequence(i, [1]) for i in range(30)]) == expected.tolist()
    assert sample(given.T.contiguous().T, [sequence(i, [1]) for i in range(30)]) == expected.tolist()
