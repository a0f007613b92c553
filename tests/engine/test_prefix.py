"""Prompts that begin alike: computed once, and the answers must not know."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from moegen.job.lengths import common_prefix
from moegen.ops.gathered_decode import gathered_decode
from moegen.ops.hosted_attention import HostedAttention
from moegen.ops.link import Link
from moegen.plan.predict import simulate
from moegen.plan.workload import Workload
from moegen.run.engine import Engine
from moegen.run.stats import PassReport
from moegen.schedule.pages import PageLedger, Windows
from moegen.schedule.scheduler import Scheduler
from moegen.schedule.sequence import Finished, Request
from moegen.spec import Sampling
from moegen.text import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.engine.parts import plan
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, PREFIX = 25, 45
COMMON = tuple(random.Random(4).randrange(256) for _ in range(PREFIX))


def _requests(sampled: bool) -> list[Request]:
    """Most begin with `COMMON`; of the others some are it, or part of it, or something else."""
    dice = random.Random(3)
    asked = []
    for row in range(ROWS):
        own = tuple(dice.randrange(256) for _ in range(1 + dice.randrange(5) ** 2))
        prompt = {4: own, 9: COMMON, 14: COMMON[:20], 19: COMMON[:40] + own}.get(row % 20, COMMON + own)
        params = {"temperature": 1.0, "top_p": 0.9, "seed": row // 5} if sampled and row % 3 else {}
        continuations = ((1, 2, 3), (4,), (5, 6)) if row % 10 == 7 else ()
        asked.append(Request(row, prompt, Sampling(max_tokens=1 + row * 5 % 17, **params), continuations=continuations))
    return asked


def _same(rows: dict[int, Finished], others: dict[int, Finished]) -> bool:
    """Equal, but for the last digits of likelihoods: tokens were computed in other company."""
    bare = [{row: replace(one, log_likelihoods=()) for row, one in each.items()} for each in (rows, others)]
    likelihoods = [[one.log_likelihoods for one in each.values()] for each in (rows, others)]
    close = all(a == pytest.approx(b, abs=1e-4) for a, b in zip(*likelihoods, strict=True))
    return bare[0] == bare[1] and close


def _run(engine: Engine, sampled: bool, prefix: bool) -> tuple[dict[int, Finished], list[PassReport]]:
    finished, reports = [], []
    for item in engine.generate(_requests(sampled), prefix=COMMON if prefix else ()):
        finished += [item] if isinstance(item, Finished) else []
        reports += [item] if isinstance(item, PassReport) else []
    assert len(finished) == ROWS
    return {one.row_index: one for one in sorted(finished, key=lambda one: one.row_index)}, reports


@pytest.fixture(scope="module")
def alone(checkpoint: Path, tokenizer: Tokenizer) -> dict[bool, dict[int, Finished]]:
    """Every row's answer without sharing, greedy and sampled."""
    with Engine.load(checkpoint, plan(kv_pages=400), staged=True, tokenizer=tokenizer) as engine:
        return {sampled: _run(engine, sampled, prefix=False)[0] for sampled in (False, True)}


SIZES = [
    {"page_tokens": 8, "kv_pages": 400, "pass_tokens": 256, "attention_tokens": 200},
    {"page_tokens": 1, "kv_pages": 96, "pass_tokens": 15, "attention_tokens": 7},  # the prefix takes three passes
    {"page_tokens": 4, "kv_pages": 26, "pass_tokens": 64, "attention_tokens": 5},  # little more than one row's pages
    {"page_tokens": 32, "kv_pages": 9, "pass_tokens": 100, "attention_tokens": 33},
    {"page_tokens": 64, "kv_pages": 20, "pass_tokens": 64, "attention_tokens": 64},  # larger than the prefix
]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes.values())))
def test_sharing_does_not_change_answers(
    alone, checkpoint: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, sampled: bool, sizes: dict[str, int]
) -> None:
    preempted: list[int] = []
    preempt = Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda self, one: (preempted.append(one.shared), preempt(self, one)))
    page = sizes["page_tokens"]
    shared = PREFIX // page * page
    with Engine.load(checkpoint, plan(**sizes, prefix_tokens=shared), staged=True, tokenizer=tokenizer) as engine:
        rows, reports = _run(engine, sampled, prefix=True)
    assert _same(rows, alone[sampled])
    computed = sum(report.tokens for report in reports)
    if not preempted and shared:
        assert computed < sum(len(request.token_ids) for request in _requests(sampled))
    if sizes["kv_pages"] * page < 110:
        assert any(preempted), "no row that shares was preempted"


def test_greedy_is_transformers_generate(alone, checkpoint: Path) -> None:
    """What sharing is equal to above."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for request in _requests(sampled=False)[::2]:
        if request.continuations:
            continue
        ids = torch.tensor([request.token_ids])
        config = GenerationConfig(
            do_sample=False, max_new_tokens=request.params.max_tokens, eos_token_id=[256, 258], pad_token_id=256
        )
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert alone[False][request.row_index].token_ids == tuple(out[0, ids.shape[1] :].tolist()), request


def test_windows_see_the_prefix_only_as_far_as_they_reach(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> None:
    folder = tmp_path_factory.mktemp("windows")
    tiny_checkpoint(folder, seed=6, use_sliding_window=True, sliding_window=11, max_window_layers=1)
    sizes = {"page_tokens": 4, "kv_pages": 60, "pass_tokens": 50}
    with Engine.load(folder, plan(**sizes, prefix_tokens=44), staged=True, tokenizer=tokenizer) as engine:
        expected, _ = _run(engine, sampled=False, prefix=False)
        rows, _ = _run(engine, sampled=False, prefix=True)
        windows = {layer.self_attn.sliding_window for layer in engine.host.model.model.layers}
    assert 11 in windows
    assert _same(rows, expected)


@pytest.mark.parametrize("on_host", [0.0, 0.5, 1.0, None], ids=["device", "both", "host", "torch"])
def test_the_ways_of_a_device_see_the_prefix(
    alone, checkpoint: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, on_host: float | None
) -> None:
    """Hosted attention and gathered decode, here with the CPU as the device."""
    sizes = {"page_tokens": 8, "kv_pages": 90, "pass_tokens": 70, "prefix_tokens": 40}
    gathers: list[int] = []

    def counting(*args):  # type: ignore[no-untyped-def]
        gathers.append(len(args[4].rows))
        gathered_decode(*args)

    monkeypatch.setattr("moegen.ops.hosted_attention.gathered_decode", counting)
    with Engine.load(checkpoint, plan(**sizes), staged=True, tokenizer=tokenizer) as engine:
        engine.pool.hosted = HostedAttention(Link(torch.device("cpu")), on_host or 0.0)
        if on_host is None:
            monkeypatch.setattr("moegen.ops.attention.kernel_reads", lambda *_: False)
            engine.pool.hosted = None
        rows, _ = _run(engine, sampled=False, prefix=True)
    assert _same(rows, alone[False])
    assert bool(gathers) == (on_host in (0.0, 0.5))


def test_more_rows_run_at_once() -> None:
    """And prompts begin behind what they share."""
    asked = [Request(row, (*range(96), row), Sampling(max_tokens=8)) for row in range(64)]
    most, tokens = {}, {}
    for prefix in ((), tuple(range(96))):
        scheduler = Scheduler(asked, PageLedger(64, 8), 256, prefix=prefix)
        most[prefix] = tokens[prefix] = 0
        while (step := scheduler.next_step()) is not None:
            most[prefix], tokens[prefix] = max(most[prefix], len(scheduler.running)), tokens[prefix] + step.tokens
            for chunk in step.chunks:
                chunk.sequence.computed += chunk.length
            for sequence in step.sampled:
                sequence.tokens.append(0)
                if len(sequence.answer) == 8:
                    scheduler.end(sequence)
        assert scheduler.ledger.free == 64
    (without, shared) = most.values()
    assert without == 4  # 13 pages each, which hold the whole answer: none is kept for growth
    assert shared >= 6 * without
    assert list(tokens.values()) == [64 * (97 + 7), 96 + 64 * (1 + 7)]


@pytest.mark.parametrize("windows", [(None,), (4,), (None, 6), (None, 3, 3)], ids=str)
@pytest.mark.parametrize("seed", range(30))
def test_random_loads_end_and_nobody_writes_to_a_shared_page(seed: int, windows: Windows) -> None:
    dice = random.Random(seed)
    page_tokens, pages = dice.choice([1, 2, 4]), dice.randint(8, 40) * len(windows)
    common = tuple(range(dice.randint(1, pages * page_tokens // len(windows))))
    asked = []
    for row in range(dice.randint(1, 50)):
        beginning = common if dice.random() < 0.7 else tuple(-1 - token for token in common[: dice.randint(0, 9)])
        own = (1000 + row,) * dice.randint(1, 12)
        asked.append(Request(row, beginning + own, Sampling(max_tokens=dice.randint(1, 12))))
    level, at_once, pass_tokens = dice.choice([None, 1, 8]), dice.choice([1, 3, 100]), dice.randint(1, 40)
    ledger = PageLedger(pages, page_tokens, windows, pass_tokens)
    scheduler = Scheduler(asked, ledger, pass_tokens, level, at_once, common)
    written: dict[tuple[int, int], tuple[int, int]] = {}  # (page, slot) -> the token whose key and value are there
    ended = set()
    while (step := scheduler.next_step()) is not None:
        for chunk in step.chunks:  # in the order in which attention writes and reads
            sequence = chunk.sequence
            for position in range(chunk.start, chunk.start + chunk.length):
                page, slot = divmod(position, page_tokens)
                for group, own in enumerate(sequence.pages):
                    written[own[page], slot] = group, sequence.tokens[position]
            for group, (own, window) in enumerate(zip(sequence.pages, windows, strict=True)):
                first = 0 if window is None else max(chunk.start - window + 1, 0)
                for position in range(first, chunk.start + chunk.length):
                    page, slot = divmod(position, page_tokens)
                    assert written[own[page], slot] == (group, sequence.tokens[position])
            sequence.computed += chunk.length
        for sequence in step.sampled:
            sequence.tokens.append(5000 + sequence.request.row_index)
            if len(sequence.answer) == sequence.request.params.max_tokens or dice.random() < 0.02:
                ended.add(sequence.request.row_index)
                scheduler.end(sequence)
    refused = {one.row_index for one in scheduler.refused}
    assert ended | refused == set(range(len(asked)))
    tokens = {r.row_index: len(r.token_ids) + r.params.max_tokens for r in asked}
    assert refused == {row for row, count in tokens.items() if ledger.most_pages(count) > pages}
    assert sorted(ledger._free) == list(range(pages))


def test_what_nearly_all_prompts_begin_with() -> None:
    alike = [(7, 8, 9, row, 5) for row in range(18)]
    assert common_prefix(alike) == (7, 8, 9)
    assert common_prefix([*alike, (1,), ()]) == (7, 8, 9)
    assert common_prefix([*alike, (1,), (), (7, 8)]) == (7,)  # one of 19 begins with 7 alone
    assert common_prefix([*alike, *[(1, 2)] * 5]) == ()
    assert common_prefix([(1, 2, 3)] * 4) == (1, 2)  # each computes a token of its own
    assert common_prefix([(1, 2, 3)]) == common_prefix([]) == ()


def test_the_planner_knows_the_prefix() -> None:
    work = Workload(300, ((1030, 8), (1040, 16)), prefix_tokens=1000)
    sizes = {"kv_pages": 100, "page_tokens": 32, "pass_tokens": 2048}
    without, shared = plan(**sizes), plan(**sizes, prefix_tokens=992)
    assert work.concurrency(shared) > 7 * work.concurrency(without)
    steady = work.steady_pass(shared)
    assert steady.prefill_tokens[0] / steady.prefill_chunks[0] == pytest.approx(1035 - 992)
    assert steady.decode_kv_tokens[0] / steady.decode_sequences[0] > 1030  # each still reads all of it
    loads = {prefix: simulate(one, work).load for prefix, one in ((0, without), (992, shared))}
    saved = loads[0].tokens.sum() - loads[992].tokens.sum()
    assert saved == pytest.approx(299 * 992)
