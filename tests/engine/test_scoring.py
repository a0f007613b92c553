"""Continuations rated after a prompt, and log-probabilities of generated tokens: as transformers has them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from moegen.run.engine import Engine
from moegen.schedule.pages import PageLedger
from moegen.schedule.scheduler import Scheduler
from moegen.schedule.scoring import Scoring
from moegen.schedule.sequence import Finished, Request
from moegen.schedule.step import Step
from moegen.spec import Sampling
from moegen.text import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.engine.parts import plan, run

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [
    {"attention_tokens": 512, "expert_tokens": 4096, "page_tokens": 32, "kv_pages": 512, "pass_tokens": 1024},
    {"attention_tokens": 3, "expert_tokens": 17, "page_tokens": 4, "kv_pages": 24, "pass_tokens": 7, "logit_tokens": 2},
    {"attention_tokens": 9, "expert_tokens": 64, "page_tokens": 1, "kv_pages": 72, "pass_tokens": 33},
]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def rated(rows: int) -> list[Request]:
    """One to five continuations of 1 to 12 tokens; some begin alike, some are given twice."""
    dice = random.Random(4)

    def tokens(longest: int) -> tuple[int, ...]:
        return tuple(dice.randrange(256) for _ in range(1 + dice.randrange(longest)))

    made = []
    for row in range(rows):
        continuations = [tokens(12) for _ in range(1 + row % 5)]
        if row % 5 == 4:
            continuations[1] = continuations[0][:1] + tokens(4)
            continuations[2] = continuations[0]
        longest = max(map(len, continuations))
        made.append(Request(row, tokens(40), Sampling(max_tokens=longest), continuations=tuple(continuations)))
    return made


@torch.no_grad()
def by_transformers(model: PreTrainedModel, prompt: tuple[int, ...], continuation: tuple[int, ...]) -> float:
    """The continuation alone after the prompt, in one forward of the whole."""
    log_probs = model(torch.tensor([[*prompt, *continuation]])).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(continuation))


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes.values())))
def test_log_likelihoods_are_transformers(
    sizes: dict[str, int], checkpoint: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempted: list[int] = []
    preempt = Scheduler._preempt

    def counting(self, sequence):  # type: ignore[no-untyped-def]
        preempted.append(sequence.computed)
        preempt(self, sequence)

    monkeypatch.setattr(Scheduler, "_preempt", counting)
    asked = rated(40)
    with Engine.load(checkpoint, plan(**sizes), staged=True, tokenizer=Tokenizer(checkpoint)) as engine:
        rows, reports = run(engine, asked)
    assert len(rows) == len(asked)
    for request in asked:
        expected = [by_transformers(model, request.token_ids, c) for c in request.continuations]
        assert rows[request.row_index].log_likelihoods == pytest.approx(expected, abs=2e-4)
        assert (rows[request.row_index].token_ids, rows[request.row_index].finish_reason) == ((), None)
    assert sum(report.generated_tokens for report in reports) == 0
    if sizes["kv_pages"] > 100:  # each token once: the prompt, and all but the last token of each continuation
        once = sum(len(r.token_ids) + sum(len(c) - 1 for c in r.continuations) for r in asked)
        assert sum(report.tokens for report in reports) == once
    if sizes["page_tokens"] == 1:
        assert any(preempted)


def test_rated_and_generated_rows_share_passes(checkpoint: Path, model: PreTrainedModel) -> None:
    some = rated(20)
    others = [Request(100 + row, (row, 7), Sampling(max_tokens=9, temperature=1.0)) for row in range(20)]
    mixed = [request for pair in zip(some, others, strict=True) for request in pair]

    def rows(asked: list[Request]) -> dict[int, Finished]:
        with Engine.load(checkpoint, plan(**SIZES[2]), staged=True, tokenizer=Tokenizer(checkpoint)) as engine:
            return run(engine, asked)[0]

    together, alone = rows(mixed), rows(some) | rows(others)
    assert together.keys() == alone.keys()
    for row, finished in together.items():
        assert finished.token_ids == alone[row].token_ids
        assert finished.log_likelihoods == pytest.approx(alone[row].log_likelihoods, abs=1e-4)


def test_nothing_is_counted_twice_when_a_continuation_begins_again() -> None:
    scoring = Scoring((1, 2, 3), [(7,), (8, 9, 10), (8, 11)])
    assert list(scoring.positions(0, 2)) == []
    assert list(scoring.positions(0, 3)) == [2]
    assert list(scoring.targets(2)) == [(0, 7), (1, 8), (2, 8)]
    for index, _ in list(scoring.targets(2)):
        scoring.add(2, index, -1.0)
    assert scoring.next_tokens() == [1, 2, 3, 8, 9]
    assert list(scoring.positions(3, 4)) == [3]
    assert list(scoring.targets(3)) == [(1, 9)]
    scoring.add(3, 1, -1.0)
    assert list(scoring.positions(0, 5)) == [4]  # preempted, and computed again from the beginning
    scoring.add(4, 1, -1.0)
    assert scoring.next_tokens() == [1, 2, 3, 8]
    assert list(scoring.positions(0, 4)) == [3]
    scoring.add(3, 2, -1.0)
    assert scoring.next_tokens() is None
    assert scoring.log_likelihoods == [-1.0, -3.0, -2.0]


def test_a_step_keeps_logits_of_sampled_tokens_first() -> None:
    rate = Request(0, (1, 2, 3), Sampling(max_tokens=2), continuations=((4, 5), (6, 7)))
    write = Request(1, (8, 9), Sampling(max_tokens=2))
    scheduler = Scheduler([rate, write], PageLedger(10, 4), 100)
    step = scheduler.next_step()
    assert isinstance(step, Step)
    assert step.token_ids.tolist() == [1, 2, 3, 8, 9]
    assert [s.request.row_index for s in step.sampled] == [1]
    assert (step.last_tokens.tolist(), step.kept.tolist()) == ([4], [4, 2])
    assert [(s.request.row_index, position) for s, position in step.scored] == [(0, 2)]


def test_logprobs_are_the_models_own_whatever_was_done_to_draw(checkpoint: Path, model: PreTrainedModel) -> None:
    kinds = ({}, {"temperature": 2.0, "top_k": 3}, {"temperature": 0.5, "repetition_penalty": 1.5})
    asked = [
        Request(row, tuple(b"row %d" % row), Sampling(max_tokens=6, ignore_eos=True, **kinds[row % 3]), logprobs=k)
        for row, k in enumerate([None, 0, 3, 20, None, 5, 1, 2, 4])
    ]
    with Engine.load(checkpoint, plan(**SIZES[0]), staged=True, tokenizer=Tokenizer(checkpoint)) as engine:
        rows, _ = run(engine, asked)
    for request in asked:
        row = rows[request.row_index]
        if request.logprobs is None:
            assert row.logprobs == ()
            continue
        assert [each.token_id for each in row.logprobs] == list(row.token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([[*request.token_ids, *row.token_ids]])).logits[0]
        log_probs = logits.log_softmax(-1)[len(request.token_ids) - 1 : -1]
        for each, expected_V in zip(row.logprobs, log_probs, strict=True):
            assert each.logprob == pytest.approx(float(expected_V[each.token_id]), abs=1e-4)
            best = expected_V.topk(request.logprobs)
            assert [token for token, _ in each.top] == best.indices.tolist()
            assert [value for _, value in each.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_each_of_a_rows_answers_has_its_own_noise(checkpoint: Path) -> None:
    def rows(samples: range, rows: range) -> dict[tuple[int, int], tuple[int, ...]]:
        params = Sampling(max_tokens=12, temperature=1.5, ignore_eos=True, seed=3)
        asked = [Request(row, (5, 6, 7), params, sample=sample) for row in rows for sample in samples]
        with Engine.load(checkpoint, plan(**SIZES[2]), staged=True, tokenizer=Tokenizer(checkpoint)) as engine:
            finished = [item for item in engine.generate(asked) if isinstance(item, Finished)]
        return {(item.row_index, item.sample): item.token_ids for item in finished}

    several, one = rows(range(4), range(5)), rows(range(1), range(5))
    assert len(set(several.values())) == len(several) == 20
    assert {key: several[key] for key in one} == one  # the first answer is the only one of a job that asks for one
