"""Answers bound to a grammar: always of its form, whatever the batching, and otherwise the model's own."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from moegen.answer.form import Form
from moegen.answer.grammar import Matcher, TokenGrammar
from moegen.row import Status
from moegen.run.engine import Engine
from moegen.run.masks import Masks
from moegen.schedule.scheduler import Scheduler
from moegen.schedule.sequence import Finished, Request
from moegen.spec import JobSpec, Sampling
from moegen.text import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from tests.engine.parts import plan, run

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 48
END_TOKENS = (256, 258)
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["bug", "question", "praise"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "size": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 999}, {"type": "null"}]},
    },
    "required": ["kind", "tags", "size"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", "not sure 😀"]
FORMS: dict[str, dict[str, Any]] = {
    "schema": {"output_schema": SCHEMA},
    "choices": {"choices": CHOICES},
    "regex": {"regex": "[A-Z]{2}-[0-9]{3,6}"},
}
LARGE = {"attention_tokens": 512, "expert_tokens": 4096, "page_tokens": 32, "kv_pages": 512, "pass_tokens": 1024}
SMALL = {"attention_tokens": 9, "expert_tokens": 64, "page_tokens": 4, "kv_pages": 40, "pass_tokens": 40,
         "logit_tokens": 5}  # fmt: skip


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def grammar(form: str, tokenizer: Tokenizer) -> TokenGrammar:
    return grammar_of(tokenizer, **FORMS[form])


def grammar_of(tokenizer: Tokenizer, **fields: Any) -> TokenGrammar:
    base = {"input": {"uri": "in"}, "prompt": {"column": "p"}, "model": {"uri": "m"}, "output": {"uri": "out"}}
    found = Form.of(JobSpec.from_mapping({**base, "sampling": {"max_tokens": 1}, **fields}), tokenizer)
    assert found is not None
    return found.grammar


def requests(grammar: TokenGrammar | None, longest: int = 90, **params: Any) -> list[Request]:
    dice = random.Random(3)
    kinds = ({}, {"temperature": 1.0}, {"temperature": 2.0, "top_k": 5}, {"temperature": 0.8, "top_p": 0.9},
             {"repetition_penalty": 1.4}, {"temperature": 1.3, "min_p": 0.1})  # fmt: skip
    return [
        Request(
            row,
            tuple(dice.randrange(256) for _ in range(1 + dice.randrange(20))),
            Sampling(max_tokens=longest, seed=row, **{**kinds[row % len(kinds)], **params}),
            grammar,
        )
        for row in range(ROWS)
    ]


def answers(checkpoint: Path, tokenizer: Tokenizer, asked: list[Request], sizes: dict[str, int]) -> dict[int, Finished]:
    with Engine.load(checkpoint, plan(**sizes), staged=True, tokenizer=tokenizer) as engine:
        rows, _ = run(engine, asked)
    assert len(rows) == len(asked)
    return rows


def is_of(form: str, text: str) -> bool:
    """By other libraries than the one that made the masks."""
    if form == "choices":
        return text in CHOICES
    if form == "regex":
        return re.fullmatch("[A-Z]{2}-[0-9]{3,6}", text) is not None
    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def check(form: str, rows: dict[int, Finished]) -> None:
    for row in rows.values():
        assert (row.status is Status.OK) == (row.finish_reason == "stop")
        if row.status is Status.OK:
            assert row.token_ids[-1] in END_TOKENS
            assert is_of(form, row.text), row.text
    ended = [row.text for row in rows.values() if row.status is Status.OK]
    assert len(ended) > ROWS // 2
    assert len(set(ended)) > (2 if form == "choices" else ROWS // 4)


@pytest.fixture(scope="module")
def large(form: str, grammar: TokenGrammar, checkpoint: Path, tokenizer: Tokenizer) -> dict[int, Finished]:
    return answers(checkpoint, tokenizer, requests(grammar), LARGE)


def test_every_answer_that_ends_is_of_the_form(form: str, large: dict[int, Finished]) -> None:
    check(form, large)


def test_without_masks_that_test_would_fail(
    form: str, grammar: TokenGrammar, checkpoint: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Masks, "take", lambda self: None)
    monkeypatch.setattr(Masks, "failed", lambda self, sequence: False)
    with pytest.raises(AssertionError):
        check(form, answers(checkpoint, tokenizer, requests(grammar), LARGE))


def test_batching_and_preemption_do_not_change_answers(
    grammar: TokenGrammar,
    large: dict[int, Finished],
    checkpoint: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preempted: list[int] = []
    preempt = Scheduler._preempt

    def counting(self, sequence):  # type: ignore[no-untyped-def]
        preempted.append(len(sequence.answer))
        preempt(self, sequence)

    monkeypatch.setattr(Scheduler, "_preempt", counting)
    asked = requests(grammar)
    random.Random(1).shuffle(asked)
    assert answers(checkpoint, tokenizer, asked, SMALL) == large
    assert any(preempted) or max(len(row.token_ids) for row in large.values()) < 16  # choices are short


class MaskedByHand(LogitsProcessor):
    """The oracle: the mask of every prefix from a matcher made anew."""

    def __init__(self, grammar: TokenGrammar, prompt_tokens: int) -> None:
        self.grammar, self.prompt_tokens = grammar, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = self.grammar.matcher(input_ids[0, self.prompt_tokens :].tolist())
        bits = np.unpackbits(self.grammar.masks([place]), axis=1, bitorder="little")[:, : scores.shape[1]]
        return scores.masked_fill(torch.from_numpy(bits == 0), -torch.inf)


def test_greedy_is_transformers_generate_under_the_same_masks(
    grammar: TokenGrammar, checkpoint: Path, tokenizer: Tokenizer
) -> None:
    asked = requests(grammar, longest=30, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)[:12]
    rows = answers(checkpoint, tokenizer, asked, SMALL)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for request in asked:
        ids = torch.tensor([request.token_ids])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=30, eos_token_id=list(END_TOKENS), pad_token_id=256
            ),
            logits_processor=LogitsProcessorList([MaskedByHand(grammar, ids.shape[1])]),
        )
        assert rows[request.row_index].token_ids == tuple(out[0, ids.shape[1] :].tolist())


def test_free_rows_beside_bound_ones_are_as_they_were(
    form: str, grammar: TokenGrammar, large: dict[int, Finished], checkpoint: Path, tokenizer: Tokenizer
) -> None:
    free, bound = requests(None, longest=20), requests(grammar)
    alone = answers(checkpoint, tokenizer, free, LARGE)
    mixed = answers(checkpoint, tokenizer, [(free, bound)[row % 2][row] for row in range(ROWS)], SMALL)
    assert mixed == {row: (alone, large)[row % 2][row] for row in range(ROWS)}
    assert not any(is_of(form, row.text) for row in alone.values())


def test_a_rows_own_stop_tokens_end_it_only_where_it_is_complete(checkpoint: Path, tokenizer: Tokenizer) -> None:
    asked = requests(grammar_of(tokenizer, **FORMS["regex"]), stop_token_ids=(257,), temperature=3.0)
    rows = answers(checkpoint, tokenizer, asked, LARGE)
    assert all(is_of("regex", row.text) for row in rows.values())
    assert {row.token_ids[-1] for row in rows.values()} == {257, *END_TOKENS}


class LeftAlready(TokenGrammar):
    """Every third answer is outside the grammar before it begins, as if the library had given it up."""

    made = 0

    def matcher(self, answer: Any = ()) -> Matcher:
        matcher = super().matcher(answer)
        self.made += 1
        if self.made % 3 == 0:
            matcher.place.consume_token(0)
        return matcher


def test_an_answer_that_the_library_gives_up_is_a_row_with_an_error(checkpoint: Path, tokenizer: Tokenizer) -> None:
    whole = grammar_of(tokenizer, **FORMS["choices"])
    broken = LeftAlready.__new__(LeftAlready)
    broken.__dict__.update(whole.__dict__)
    rows = answers(checkpoint, tokenizer, requests(broken), LARGE)
    errors = [row for row in rows.values() if row.status is Status.ERROR]
    assert len(errors) == ROWS // 3
    assert {row.error.code for row in errors if row.error} == {"grammar_failed"}
    assert all(is_of("choices", row.text) for row in rows.values() if row.status is Status.OK)
