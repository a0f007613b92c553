"""Three ways to the same attention: the compiled kernel, the torch way, and a softmax written out here."""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from moegen.ops.attention import AttentionRule, paged_attention
from moegen.ops.kv_pages import CodedPages, LayerPages
from moegen.ops.paged_kernel import kernel_reads
from moegen.ops.vector_ir import DOTS
from moegen.ops.vectors import BLOCK
from moegen.schedule.pages import PageLedger
from moegen.schedule.sequence import Request, Sequence
from moegen.schedule.step import AttentionBatch, Chunk, Span, Step
from moegen.spec import Sampling

KV_HEADS, POOL_TOKENS = 2, 512
HISTORIES = (0, 1, 5, 16, 40, 63)  # tokens that each sequence has in its pages already


def pages_of(keys_PGCD: torch.Tensor, values_PGCD: torch.Tensor) -> LayerPages:
    """Codes get scales that were not written yet."""
    if keys_PGCD.dtype != torch.int8:
        return LayerPages(keys_PGCD, values_PGCD)
    return CodedPages(keys_PGCD, values_PGCD, *(torch.full(keys_PGCD.shape[:3], 1e4) for _ in range(2)))


class Case:
    """Ragged sequences with random keys and values in shuffled pages, and the queries of one micro-batch."""

    def __init__(
        self, ratio: int, key_dim: int, value_dim: int, page_tokens: int, dtype: torch.dtype, chunk: int
    ) -> None:
        self.generator = torch.Generator().manual_seed(ratio * 1000 + page_tokens)
        pages = POOL_TOKENS // page_tokens
        shape = (pages, KV_HEADS, page_tokens)
        # What lies in a page that no token was written to must not matter.
        stale = 1e4 if dtype.is_floating_point else 99
        self.pages = pages_of(*(torch.full((*shape, dim), stale, dtype=dtype) for dim in (key_dim, value_dim)))
        ledger = PageLedger(pages, page_tokens)
        random.Random(page_tokens).shuffle(ledger._free)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        chunks = []
        for order, history in enumerate(HISTORIES):
            sequence = Sequence(Request(order, (0,), Sampling(max_tokens=1)), order, [0] * (history + chunk))
            assert ledger.grow(sequence.pages, history + chunk)
            new = (self._random(history + chunk, KV_HEADS, dim) for dim in (key_dim, value_dim))
            kept_keys, kept_values = self.pages.pair(self.pages.kept(*new))
            self.keys.append(kept_keys)
            self.values.append(kept_values)
            chunks.append(Chunk(sequence, history, chunk))
            if history:
                (before,) = Step([Chunk(sequence, 0, history)], page_tokens).attention_batches(history)
                self.pages.write(self.keys[-1][:history], self.values[-1][:history], before)
        self.batch: AttentionBatch
        (self.batch,) = Step(chunks, page_tokens).attention_batches(1 << 20)
        new_keys, new_values = (torch.cat([x[-chunk:] for x in xs]) for xs in (self.keys, self.values))
        self.pages.write(new_keys, new_values, self.batch)
        self.query_THD = self._random(self.batch.length, KV_HEADS * ratio, key_dim)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def sinks(self) -> torch.Tensor:
        return self._random(self.query_THD.shape[1])

    def naive(self, rule: AttentionRule) -> torch.Tensor:
        """In float64, a query and a head at a time."""
        ratio = self.query_THD.shape[1] // KV_HEADS
        out = []
        for span, keys, values in zip(self.batch.spans, self.keys, self.values, strict=True):
            for i in range(span.length):
                position = span.kv_length - span.length + i
                first = 0 if rule.sliding_window is None else max(position - rule.sliding_window + 1, 0)
                query = self.query_THD[span.first + i].double()
                own = slice(first, position + 1)
                heads = []
                for head, q in enumerate(query):
                    scores = keys[own, head // ratio].double() @ q * rule.scaling
                    if rule.softcap is not None:
                        scores = rule.softcap * torch.tanh(scores / rule.softcap)
                    weights = scores.exp()
                    total = weights.sum() + (0 if rule.sinks_H is None else rule.sinks_H[head].double().exp())
                    heads.append(weights / total @ values[own, head // ratio].double())
                out.append(torch.stack(heads))
        return torch.stack(out).float()


def _rules(case: Case) -> dict[str, AttentionRule]:
    scaling = case.query_THD.shape[2] ** -0.5
    return {
        "plain": AttentionRule(scaling),
        "scaled": AttentionRule(1.7 * scaling),
        "window 1": AttentionRule(scaling, 1),
        "window 7": AttentionRule(scaling, 7),
        "window 1000": AttentionRule(scaling, 1000),
        "sinks": AttentionRule(scaling, None, case.sinks()),
        "softcap": AttentionRule(scaling, None, None, 1.7),
        "all": AttentionRule(scaling, 9, case.sinks(), 2.5),
    }


@pytest.mark.parametrize("chunk", [1, 6], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    ("ratio", "dims", "page_tokens"),
    [
        (1, (8, 8), 1),
        (2, (16, 16), 4),
        (3, (16, 8), 5),
        (4, (64, 64), 16),
        (7, (24, 40), 32),
        (4, (12, 20), 64),
        (9, (128, 96), 32),
        (16, (33, 65), 48),
    ],
    ids=str,
)
def test_three_ways_agree(ratio: int, dims: tuple[int, int], page_tokens: int, dtype: torch.dtype, chunk: int) -> None:
    case = Case(ratio, *dims, page_tokens, dtype, chunk)
    assert kernel_reads(case.query_THD, case.pages.keys_PGCD)
    for name, rule in _rules(case).items():
        expected = case.naive(rule)
        torch_way = paged_attention(case.query_THD, case.pages, case.batch, rule, use_kernel=False)
        kernel = paged_attention(case.query_THD, case.pages, case.batch, rule)
        # Queries are float32 and pages hold the same values that the naive way reads, so nothing is lost here.
        assert torch.allclose(torch_way, expected, atol=3e-6), name
        assert torch.allclose(kernel, expected, atol=3e-6), name


def test_codes_are_off_by_half_a_scale_at_most() -> None:
    """And the largest magnitude of a token and KV head is kept as it is."""
    pages = pages_of(*(torch.zeros(1, 2, 4, 24, dtype=torch.int8) for _ in range(2)))
    rows_TGD = torch.randn(50, 2, 24) * torch.logspace(-12, 12, 50)[:, None, None]
    rows_TGD[7] = 0
    key_codes, value_codes, key_scales_TG, value_scales_TG = pages.kept(rows_TGD, -rows_TGD)
    assert torch.equal(key_codes, -value_codes)
    assert torch.equal(key_scales_TG, value_scales_TG)
    assert torch.allclose(key_scales_TG, rows_TGD.abs().amax(-1) / 127, rtol=1e-6, atol=0)
    assert key_codes.abs().amax(-1).tolist() == [[127 if token != 7 else 0] * 2 for token in range(50)]
    keys_TGD, values_TGD = pages.pair(pages.kept(rows_TGD, -rows_TGD))
    assert torch.equal(keys_TGD, -values_TGD)
    assert bool(((keys_TGD - rows_TGD).abs() <= 0.5001 * key_scales_TG[..., None]).all())
    assert pages.pair(pages.kept(torch.full((1, 2, 24), torch.inf), rows_TGD[:1]))[0].isnan().all()


def test_codes_do_not_know_how_a_prompt_was_cut() -> None:
    new = torch.randn(2, 37, KV_HEADS, 16)
    tables = []
    for attention_tokens in (1, 5, 16, 37):
        pages = pages_of(*(torch.zeros(10, KV_HEADS, 4, 16, dtype=torch.int8) for _ in range(2)))
        sequence = Sequence(Request(0, (0,), Sampling(max_tokens=1)), 0, [0] * 37, pages=[list(range(9, -1, -1))])
        for batch in Step([Chunk(sequence, 0, 37)], 4).attention_batches(attention_tokens):
            own = slice(batch.first, batch.first + batch.length)
            pages.write(new[0, own], new[1, own], batch)
        tables.append(pages.tables)
    assert all(torch.equal(*pair) for other in tables[1:] for pair in zip(tables[0], other, strict=True))
    assert tables[0][0].count_nonzero() > 500


def test_float16_pages_take_the_torch_way() -> None:
    case = Case(2, 8, 8, 4, torch.float16, 1)
    assert not kernel_reads(case.query_THD, case.pages.keys_PGCD)
    rule = AttentionRule(8**-0.5)
    assert torch.allclose(paged_attention(case.query_THD, case.pages, case.batch, rule), case.naive(rule), atol=3e-6)


def test_bfloat16_queries_get_bfloat16_answers() -> None:
    case = Case(4, 16, 16, 8, torch.bfloat16, 1)
    rule = AttentionRule(0.25)
    case.query_THD = case.query_THD.bfloat16()
    expected = case.naive(rule)
    for use_kernel in (True, False):
        out = paged_attention(case.query_THD, case.pages, case.batch, rule, use_kernel=use_kernel)
        assert out.dtype is torch.bfloat16
        assert torch.allclose(out.float(), expected, atol=0.03)


def test_large_scores_do_not_overflow() -> None:
    case = Case(2, 8, 8, 4, torch.float32, 1)
    case.query_THD = case.query_THD * 1e4
    rule = AttentionRule(1.0)
    ways = [paged_attention(case.query_THD, case.pages, case.batch, rule, use_kernel=k) for k in (True, False)]
    assert all(way.isfinite().all() for way in ways)
    assert torch.allclose(*ways, atol=1e-4)


def test_a_sequence_does_not_see_the_others() -> None:
    """Each sequence alone gives bit for bit what it gives in company."""
    case = Case(2, 16, 16, 4, torch.float32, 1)
    rule = AttentionRule(0.25, 30)
    together = paged_attention(case.query_THD, case.pages, case.batch, rule)
    for i, span in enumerate(case.batch.spans):
        own = slice(span.first, span.first + 1)
        zero = np.zeros(1, np.int64)
        alone = AttentionBatch(0, 1, (Span(0, 1, span.kv_length, span.pages),), zero, zero)
        assert torch.equal(paged_attention(case.query_THD[own], case.pages, alone, rule)[0], together[i])


LENGTHS = (1, 31, 32, 33, 128, 129, 500, 1023, 1024, 1025, 2100, 4000)  # the kernel cuts pieces of about 1024 tokens


class LongCase:
    """One long sequence beside many shorter ones, in shuffled pages of random values; decode only."""

    def __init__(
        self, page_tokens: int, dtype: torch.dtype, heads: int = 8, dim: int = 64, *, rounded: bool = False
    ) -> None:
        self.rounded = rounded
        generator = torch.Generator().manual_seed(page_tokens)
        pages = [-(-length // page_tokens) for length in LENGTHS]
        order = list(range(sum(pages)))
        random.Random(1).shuffle(order)
        spans = [
            Span(i, 1, n, [order.pop() for _ in range(p)]) for i, (n, p) in enumerate(zip(LENGTHS, pages, strict=True))
        ]
        shape = (sum(pages), KV_HEADS, page_tokens, dim)
        self.pages = LayerPages(*(torch.randn(shape, generator=generator) for _ in range(2)))
        if dtype == torch.int8:
            self.pages = CodedPages(*CodedPages.kept(self.pages, *self.pages.tables))
        else:
            self.pages = LayerPages(*(table.to(dtype) for table in self.pages.tables))
        # Sharp enough that single keys of any page carry weight.
        self.query_THD = 3 * torch.randn(len(LENGTHS), heads, dim, generator=generator)
        self.batch = self.of(*spans)
        sinks = torch.randn(heads, generator=generator)
        scaling = dim**-0.5
        self.rules = {
            "plain": AttentionRule(scaling),
            "window 100": AttentionRule(scaling, 100),
            "window 1500": AttentionRule(scaling, 1500),  # two pieces, which begin inside a page
            "all": AttentionRule(scaling, 1100, sinks, 5.0),
        }

    @staticmethod
    def of(*spans: Span) -> AttentionBatch:
        nothing = np.zeros(len(spans), np.int64)
        return AttentionBatch(0, len(spans), spans, nothing, nothing)

    def kernel(self, rule: AttentionRule) -> torch.Tensor:
        return self.attend(self.query_THD, self.batch, rule)

    def attend(self, query_THD: torch.Tensor, batch: AttentionBatch, rule: AttentionRule) -> torch.Tensor:
        return paged_attention(query_THD, self.pages, batch, rule, rounded=self.rounded)


KINDS = pytest.mark.parametrize(
    ("dtype", "rounded"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True), (torch.int8, False)],
    ids=["fp32", "bf16", "rounded", "int8"],
)


@pytest.fixture
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=["fp32", "bf16", "int8"])
@pytest.mark.parametrize("page_tokens", [16, 32, 48, 256])
def test_pieces_of_long_sequences_make_the_whole(page_tokens: int, dtype: torch.dtype) -> None:
    case = LongCase(page_tokens, dtype)
    for name, rule in case.rules.items():
        torch_way = paged_attention(case.query_THD, case.pages, case.batch, rule, use_kernel=False)
        assert torch.allclose(case.kernel(rule), torch_way, atol=1e-5), name


@KINDS
def test_the_size_of_pages_changes_no_bit(dtype: torch.dtype, rounded: bool) -> None:
    """Of those that fill the kernel's blocks or halves of them, where all of a sequence is seen."""
    large = LongCase(BLOCK, dtype, rounded=rounded)
    halves = [
        torch.stack(table.chunk(2, dim=2), dim=1).flatten(0, 1).contiguous()  # page p's tokens in 2 p and 2 p + 1
        for table in large.pages.tables
    ]
    spans = [replace(span, pages=[2 * p + h for p in span.pages for h in (0, 1)]) for span in large.batch.spans]
    whole = large.kernel(large.rules["plain"])
    large.pages = type(large.pages)(*halves)
    assert torch.equal(large.attend(large.query_THD, large.of(*spans), large.rules["plain"]), whole)


@KINDS
@pytest.mark.usefixtures("_threads")
def test_neither_threads_nor_company_change_a_bit(
    dtype: torch.dtype, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = LongCase(32, dtype, rounded=rounded)
    for name, rule in case.rules.items():
        torch.set_num_threads(1)
        one_thread = case.kernel(rule)
        with monkeypatch.context() as patch:  # one thread, which is all that Numba has here, plays three
            patch.setattr("moegen.ops.paged_kernel.numba_threads", lambda: 3)
            assert torch.equal(case.kernel(rule), one_thread), name
        for i, span in enumerate(case.batch.spans):
            alone = case.of(Span(0, 1, span.kv_length, span.pages))
            answer = case.attend(case.query_THD[i : i + 1], alone, rule)
            assert torch.equal(answer[0], one_thread[i]), (name, span.kv_length)


@KINDS
@pytest.mark.parametrize("page_tokens", [32, 48])
@pytest.mark.parametrize("heads", [2, 8])
def test_a_prompt_may_be_cut_anywhere(dtype: torch.dtype, rounded: bool, page_tokens: int, heads: int) -> None:
    """Its queries' answers are the same bits: across pieces, behind windows, and as single queries that decode."""
    case, queries, dice = LongCase(page_tokens, dtype, heads, rounded=rounded), 150, random.Random(0)
    query_THD = 3 * torch.randn(queries, heads, 64, generator=torch.Generator().manual_seed(1))
    for span, end in zip(case.batch.spans[-3:], (1025, 2100, 3200), strict=True):
        for name, rule in case.rules.items():

            def answers(cuts: list[int], end=end, span=span, rule=rule) -> torch.Tensor:  # type: ignore[no-untyped-def]
                """Of the queries up to `end`, in spans that end at these."""
                spans = [
                    Span(first, stop - first, end - queries + stop, span.pages)
                    for first, stop in itertools.pairwise([0, *cuts, queries])
                ]
                return case.attend(query_THD, case.of(*spans), rule)

            whole = answers([])
            for cuts in (list(range(1, queries)), sorted(dice.sample(range(1, queries), 12))):
                assert torch.equal(answers(cuts), whole), (name, end)


@pytest.mark.parametrize("heads", [2, 8, 64], ids=["one row", "a tile", "many tiles"])
@pytest.mark.parametrize("page_tokens", [6, 16, 48])
def test_rounding_queries_and_weights_is_all_that_is_rounded(page_tokens: int, heads: int) -> None:
    """Where the processor multiplies bfloat16 itself; elsewhere nothing is. What a page has beyond its sequence's end
    takes no part, even if it is no number."""
    exact = LongCase(page_tokens, torch.bfloat16, heads)
    exact.query_THD = exact.query_THD.bfloat16().float()  # and times 1 / 8 it stays so: only weights are rounded
    case = LongCase(page_tokens, torch.bfloat16, heads, rounded=True)
    case.query_THD = exact.query_THD
    for span in case.batch.spans:
        for table in case.pages.tables if (filled := span.kv_length % page_tokens) else ():
            table[span.pages[-1], :, filled:] = math.nan
    for name, rule in exact.rules.items():
        whole = exact.kernel(rule)
        sizes = LayerPages(exact.pages.keys_PGCD, exact.pages.values_PGCD.abs())
        bound = 2**-8 * paged_attention(exact.query_THD, sizes, exact.batch, rule)  # half a place of each weight
        rounded = case.kernel(rule)
        assert ((rounded - whole).abs() <= bound).all(), name
        assert torch.equal(rounded, whole) != DOTS


@pytest.mark.parametrize(("dims", "page_tokens"), [((64, 40), 16), ((40, 64), 16), ((64, 64), 5)], ids=str)
def test_nothing_is_rounded_that_makes_no_pairs(dims: tuple[int, int], page_tokens: int) -> None:
    case = Case(4, *dims, page_tokens, torch.bfloat16, 6)
    rule = _rules(case)["all"]
    ways = [paged_attention(case.query_THD, case.pages, case.batch, rule, rounded=rounded) for rounded in (False, True)]
    assert torch.equal(*ways)


def test_weights_are_exponentials_to_the_last_places() -> None:
    """With one-hot values the answer is the weights themselves, here from 1 down to e^-80."""
    tokens = 512
    pages = LayerPages(torch.zeros(1, 1, tokens, 1), torch.eye(tokens)[None, None])
    pages.keys_PGCD[0, 0, :, 0] = -torch.linspace(0, 80, tokens)
    out = paged_attention(torch.ones(1, 1, 1), pages, LongCase.of(Span(0, 1, tokens, [0])), AttentionRule(1.0))
    expected = pages.keys_PGCD[0, 0, :, 0].double().softmax(0)
    assert torch.allclose(out[0, 0].double(), expected, rtol=5e-7, atol=0)


def test_a_batch_lists_its_decode_spans_once() -> None:
    case = Case(2, 8, 8, 4, torch.float32, 1)
    assert case.batch.decode is case.batch.decode
    assert case.batch.decode.rows.tolist() == list(range(len(HISTORIES)))
    assert case.batch.prefill == ()
    assert len(Case(2, 8, 8, 4, torch.float32, 6).batch.decode.rows) == 0


_NARROW = """
import sys
import llvmlite.binding
features = llvmlite.binding.get_host_cpu_features()
kept = {name: on and not name.startswith("avx512") for name, on in features.items()} | {"neon": sys.argv[1] == "4"}
llvmlite.binding.get_host_cpu_features = lambda: type(features)(kept)
from moegen.ops import vectors
assert vectors.LANES == int(sys.argv[1]), vectors.LANES
from tests.engine.test_attention import LongCase, paged_attention, torch
for dtype in (torch.bfloat16, torch.int8):
    case = LongCase(32, dtype, heads=14, dim=44)
    for rule in case.rules.values():
        torch_way = paged_attention(case.query_THD, case.pages, case.batch, rule, use_kernel=False)
        assert torch.allclose(case.kernel(rule), torch_way, atol=1e-5)
"""


@pytest.mark.parametrize("lanes", [4, 8])
def test_machines_with_narrower_registers(lanes: int, tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", _NARROW, str(lanes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_long_prefill_is_cut_by_query_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 8, 8, 4, torch.float32, 6)
    rules = _rules(case)
    given = (case.query_THD, case.pages, case.batch)
    whole = {name: paged_attention(*given, rule, use_kernel=False) for name, rule in rules.items()}
    monkeypatch.setattr("moegen.ops.attention._SCORE_ELEMENTS", 600)  # a row or two at a time
    for name, rule in rules.items():
        cut = paged_attention(*given, rule, use_kernel=False)
        assert torch.allclose(cut, whole[name], atol=3e-6), name
