"""The same rows through every way of batching them: the answers must not know."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from moegen.row import Status
from moegen.run.engine import Engine
from moegen.schedule.scheduler import Scheduler
from moegen.schedule.sequence import Finished, Request
from moegen.spec import Sampling
from moegen.text import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.engine.parts import plan, run

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 60
END_TOKENS = [256, 258]
# Each size over more than an order of magnitude; the pool from little more than the longest row to all rows at once.
SIZES = [
    {
        "attention_tokens": 512,
        "expert_tokens": 4096,
        "page_tokens": 32,
        "kv_pages": 512,
        "pass_tokens": 1024,
        "level_tokens": 16,
    },
    {"attention_tokens": 1, "expert_tokens": 1, "page_tokens": 1, "kv_pages": 96, "pass_tokens": 7},
    {"attention_tokens": 3, "expert_tokens": 17, "page_tokens": 4, "kv_pages": 24, "pass_tokens": 64},
    {"attention_tokens": 33, "expert_tokens": 100, "page_tokens": 5, "kv_pages": 16, "pass_tokens": 200},
    {
        "attention_tokens": 9,
        "expert_tokens": 256,
        "page_tokens": 2,
        "kv_pages": 300,
        "pass_tokens": 20,
        "level_tokens": 2,
    },
]


def _params(row: int, greedy: bool) -> Sampling:
    length = {"max_tokens": 1 + row * 7 % 24}
    if greedy:
        return Sampling(**length)
    kinds = (
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 12},
        {"temperature": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
        {"temperature": 2.0, "top_p": 0.95, "top_k": 40, "min_p": 0.001},
        {"repetition_penalty": 1.5},
        {"temperature": 1.2, "stop": ("e", "a", " t")},
        {"temperature": 1.1, "stop_token_ids": tuple(range(0, 200, 9)), "ignore_eos": True},
    )
    return Sampling(**length, **kinds[row % len(kinds)], seed=row // 3)


def _requests(greedy: bool) -> list[Request]:
    dice = random.Random(11)
    lengths = [1 + dice.randrange(8) ** 2 for _ in range(ROWS)]  # 1 to 50 tokens, most of them few
    return [
        Request(row, tuple(dice.randrange(256) for _ in range(length)), _params(row, greedy))
        for row, length in enumerate(lengths)
    ]


def _run(checkpoint: Path, tokenizer: Tokenizer, requests: list[Request], **sizes: int) -> dict[int, Finished]:
    sizes_plan = plan(**sizes)
    with Engine.load(checkpoint, sizes_plan, staged=True, tokenizer=tokenizer) as engine:
        rows, passes = run(engine, requests)
    assert len(rows) == len(requests)
    assert all(report.tokens <= sizes_plan.pass_tokens for report in passes)
    assert any(report.traffic.disk_bytes for report in passes) == (sizes_plan.stream_slots > 0)
    return rows


@pytest.fixture(scope="module", params=["greedy", "sampled"])
def expected(
    request: pytest.FixtureRequest, checkpoint: Path, tokenizer: Tokenizer
) -> tuple[bool, dict[int, Finished]]:
    greedy = request.param == "greedy"
    return greedy, _run(checkpoint, tokenizer, _requests(greedy), **SIZES[0])


@pytest.fixture
def preempted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row of each preemption."""
    rows: list[int] = []
    preempt = Scheduler._preempt

    def counting(self, sequence):  # type: ignore[no-untyped-def]
        rows.append(sequence.request.row_index)
        preempt(self, sequence)

    monkeypatch.setattr(Scheduler, "_preempt", counting)
    return rows


@pytest.mark.parametrize("sizes", SIZES[1:], ids=lambda sizes: "-".join(map(str, sizes.values())))
def test_sizes_do_not_change_answers(expected, sizes, preempted, checkpoint: Path, tokenizer: Tokenizer) -> None:
    greedy, answers = expected
    rows = _run(checkpoint, tokenizer, _requests(greedy), **sizes)
    if sizes["kv_pages"] * sizes["page_tokens"] < 100:
        assert preempted
    assert rows == answers


def test_order_does_not_change_answers(expected, preempted, checkpoint: Path, tokenizer: Tokenizer) -> None:
    greedy, answers = expected
    requests = _requests(greedy)
    random.Random(2).shuffle(requests)
    assert _run(checkpoint, tokenizer, requests, **SIZES[3]) == answers
    assert preempted


# Where experts live and how they come: all resident, some, none; read when needed, or ahead by several readers.
HOMES = [
    {"group_experts": 1, "resident_groups": 2, "stream_slots": 2, "stream_depth": 1, "reader_threads": 1},
    {"group_experts": 1, "resident_groups": 0, "stream_slots": 4, "stream_depth": 3, "reader_threads": 3},
    {"group_experts": 3, "resident_groups": 0, "stream_slots": 1, "stream_depth": 0, "reader_threads": 0},
]


@pytest.mark.parametrize("homes", HOMES, ids=lambda homes: "-".join(map(str, homes.values())))
def test_homes_do_not_change_answers(expected, homes, checkpoint: Path, tokenizer: Tokenizer) -> None:
    greedy, answers = expected
    assert _run(checkpoint, tokenizer, _requests(greedy), **SIZES[2], **homes, logit_tokens=5) == answers


def test_the_last_layer_answers_only_what_the_head_is_asked(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """Of a prompt's tokens that is the last one; every other layer's keys and values need them all."""
    requests = _requests(greedy=True)
    with Engine.load(checkpoint, plan(**SIZES[0]), staged=True, tokenizer=tokenizer) as engine:
        _, passes = run(engine, requests)
    assert sum(report.prefill_tokens for report in passes) > 5 * ROWS
    for report in passes:
        *earlier, last = (int(counts.sum()) for counts in (report.expert_counts or {}).values())
        routed = earlier[0] // report.tokens  # experts of a token
        assert earlier == [routed * report.tokens] * len(earlier)
        assert last == routed * max(report.generated_tokens, 1)


def test_the_rows_are_varied(expected) -> None:
    """Otherwise equality would say little."""
    greedy, answers = expected
    reasons = [answer.finish_reason for answer in answers.values()]
    assert len({answer.token_ids for answer in answers.values()}) > ROWS // 2
    assert reasons.count("length") > 5
    if not greedy:
        assert reasons.count("stop") > 5


def test_greedy_is_transformers_generate(checkpoint: Path, tokenizer: Tokenizer) -> None:
    requests = _requests(greedy=True)
    rows = _run(checkpoint, tokenizer, requests, **SIZES[2])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for request in requests:
        ids = torch.tensor([request.token_ids])
        config = GenerationConfig(
            do_sample=False, max_new_tokens=request.params.max_tokens, eos_token_id=END_TOKENS, pad_token_id=256
        )
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert rows[request.row_index].token_ids == tuple(out[0, ids.shape[1] :].tolist()), request
    ended = [r for r in rows.values() if r.finish_reason == "stop"]
    assert all(r.token_ids[-1] in END_TOKENS and r.status is Status.OK for r in ended)


def test_eos_ends_an_answer_unless_ignored(checkpoint: Path, tokenizer: Tokenizer) -> None:
    prompt = tuple(b"when does it end?")
    sampling = {"max_tokens": 200, "temperature": 3.0}  # nearly uniform over 264 tokens, of which two end it
    ends, goes_on = Request(0, prompt, Sampling(**sampling)), Request(0, prompt, Sampling(**sampling, ignore_eos=True))
    ended, whole = (_run(checkpoint, tokenizer, [request], **SIZES[0])[0] for request in (ends, goes_on))
    length = len(ended.token_ids)
    assert ended.finish_reason == "stop"
    assert ended.token_ids[-1] in END_TOKENS
    assert (whole.finish_reason, len(whole.token_ids)) == ("length", 200)
    assert whole.token_ids[:length] == ended.token_ids


def test_row_as_large_as_the_pool_and_one_larger(checkpoint: Path, tokenizer: Tokenizer) -> None:
    sizes = {"attention_tokens": 8, "expert_tokens": 64, "page_tokens": 4, "kv_pages": 12, "pass_tokens": 16}
    prompt = tuple(range(40))
    fits, exceeds = Sampling(max_tokens=8, ignore_eos=True), Sampling(max_tokens=9)
    small = [Request(row, (row,) * 5, Sampling(max_tokens=6, ignore_eos=True)) for row in range(2, 8)]
    requests = [*small[:3], Request(0, prompt, fits), Request(1, prompt, exceeds), *small[3:]]
    rows = _run(checkpoint, tokenizer, requests, **sizes)
    assert (rows[0].status, len(rows[0].token_ids)) == (Status.LENGTH, 8)
    assert rows[1].status is Status.TOO_LONG
    assert rows[1].error is not None
    assert "need 49 tokens of KV and the pool holds 48" in rows[1].error.message
    assert all(rows[request.row_index].status is Status.LENGTH for request in small)


def test_pages_are_all_free_at_the_end(checkpoint: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    ledgers = []
    init = Scheduler.__init__

    def keep(self, requests, ledger, *sizes):  # type: ignore[no-untyped-def]
        ledgers.append(ledger)
        init(self, requests, ledger, *sizes)

    monkeypatch.setattr(Scheduler, "__init__", keep)
    _run(checkpoint, tokenizer, _requests(greedy=False), **SIZES[3])
    (ledger,) = ledgers
    assert ledger.free == ledger.pages
    assert sorted(ledger._free) == list(range(ledger.pages))


def test_engine_opens_a_checkpoint(checkpoint: Path, tokenizer: Tokenizer, expected) -> None:
    """The whole way: certify, load, generate."""
    greedy, answers = expected
    with Engine.open(str(checkpoint), plan(**SIZES[4]), tokenizer=tokenizer) as engine:
        rows, _ = run(engine, _requests(greedy)[:10])
    assert rows == {row: answers[row] for row in range(10)}
