"""What the scheduler promises, under random loads and with no model: tokens are made up."""

from __future__ import annotations

import random

import numpy as np
import pytest
from moegen.row import Status
from moegen.schedule.pages import GIVEN_BACK, PageLedger, Windows, layer_groups
from moegen.schedule.scheduler import Scheduler
from moegen.schedule.sequence import Finished, Request, Sequence
from moegen.schedule.step import Chunk, Step
from moegen.spec import Sampling


def _requests(dice: random.Random, rows: int, longest: int) -> list[Request]:
    return [
        Request(row, tuple(range(dice.randint(1, longest))), Sampling(max_tokens=dice.randint(1, longest)))
        for row in range(rows)
    ]


class Load:
    """Drives a scheduler to its end, checking every pass; a token is its position, an answer may end early."""

    def __init__(
        self, seed: int, *, rows: int, longest: int, pages: int, page_tokens: int, pass_tokens: int,
        windows: Windows = (None,),
    ) -> None:  # fmt: skip
        self.dice = random.Random(seed)
        self.requests = _requests(self.dice, rows, longest)
        self.ledger = PageLedger(pages, page_tokens, windows, pass_tokens)
        level_tokens, window = self.dice.choice([None, 1, 8, 20]), self.dice.choice([1, 2, 8, 100])
        self.scheduler = Scheduler(self.requests, self.ledger, pass_tokens, level_tokens, window)
        self.finished: dict[int, int] = {}
        self.refused: list[Finished] = []
        self.kept: dict[tuple[int, int], tuple[int, ...]] = {}  # (page, slot) -> (row, group, position) last there
        self.passes = self.computed = 0

    def run(self) -> None:
        while (step := self._next()) is not None:
            self.passes += 1
            self.computed += step.tokens
            self._check(step)
            self._advance(step)
        assert not self.scheduler.running
        assert self.ledger.free == self.ledger.pages

    def _next(self) -> Step | None:
        decoding = {id(s) for s in self.scheduler.running if s.pending == 1}
        oldest = min(self.scheduler.running, key=lambda s: s.order, default=None)
        step = self.scheduler.next_step()
        self.refused += self.scheduler.refused
        self.scheduler.refused.clear()
        if step is not None:
            present = {id(chunk.sequence) for chunk in step.chunks}
            still = {id(s) for s in self.scheduler.running}
            assert decoding & still <= present, "a decoding sequence was left out of a pass"
            assert oldest is None or oldest in self.scheduler.running, "the oldest sequence was preempted"
        return step

    def _check(self, step: Step) -> None:
        assert 0 < step.tokens <= self.scheduler.pass_tokens
        held = [page for s in self.scheduler.running for own in s.pages for page in own if page != GIVEN_BACK]
        assert len(held) == len(set(held)) == self.ledger.pages - self.ledger.free
        for chunk in step.chunks:
            sequence = chunk.sequence
            assert chunk.start == sequence.computed
            end = chunk.start + chunk.length
            assert end <= len(sequence.tokens)
            for own, window in zip(sequence.pages, self.ledger.windows, strict=True):
                first = 0 if window is None else max(chunk.start - window + 1, 0)
                assert GIVEN_BACK not in own[first // self.ledger.page_tokens :]
                assert (end if window else len(sequence.tokens)) <= len(own) * self.ledger.page_tokens
        orders = [s.order for s in self.scheduler.running]
        assert orders == sorted(orders)
        for size in (1, 3, step.tokens):
            self._check_batches(step, size)

    def _check_batches(self, step: Step, size: int) -> None:
        batches = list(step.attention_batches(size))
        assert [b.first for b in batches] == list(np.cumsum([0, *(b.length for b in batches)])[:-1])
        assert sum(b.length for b in batches) == step.tokens
        assert all(b.length <= size for b in batches)
        assert all(len(batch.others) == len(self.ledger.windows) - 1 for batch in batches)
        for batch in [own.of_group(group) for own in batches for group in range(len(self.ledger.windows))]:
            for span in batch.spans:
                positions = step.positions[batch.first + span.first :][: span.length]
                assert positions[-1] + 1 == span.kv_length
                page_index, slots = np.divmod(positions, self.ledger.page_tokens)
                own = slice(span.first, span.first + span.length)
                assert batch.write_pages[own].tolist() == [span.pages[i] for i in page_index]
                assert batch.write_slots[own].tolist() == slots.tolist()

    def _advance(self, step: Step) -> None:
        for chunk in step.chunks:
            sequence = chunk.sequence
            row = sequence.request.row_index
            for group, own in enumerate(sequence.pages):
                for position in range(chunk.start, chunk.start + chunk.length):
                    page, slot = divmod(position, self.ledger.page_tokens)
                    self.kept[own[page], slot] = row, group, position
            sequence.computed += chunk.length
            for group, (own, window) in enumerate(zip(sequence.pages, self.ledger.windows, strict=True)):
                first = 0 if window is None else max(chunk.start - window + 1, 0)
                for position in range(first, sequence.computed):  # everything that attention read is still its own
                    page, slot = divmod(position, self.ledger.page_tokens)
                    assert self.kept[own[page], slot] == (row, group, position)
        for sequence in step.sampled:
            sequence.tokens.append(len(sequence.tokens))
            if len(sequence.answer) == sequence.request.params.max_tokens or self.dice.random() < 0.02:
                assert sequence.tokens == list(range(len(sequence.tokens)))
                self.finished[sequence.request.row_index] = len(sequence.answer)
                self.scheduler.end(sequence)


@pytest.mark.parametrize("windows", [(None,), (5,), (None, 3), (None, 7, 7), (2, 9)], ids=str)
@pytest.mark.parametrize("seed", range(40))
def test_random_load(seed: int, windows: Windows) -> None:
    dice = random.Random(1000 + seed)
    pages, page_tokens = dice.randint(2, 40) * len(windows), dice.choice([1, 2, 4, 16])
    pass_tokens = dice.randint(1, 50)
    load = Load(seed, rows=dice.randint(1, 60), longest=dice.randint(1, 60), pages=pages, page_tokens=page_tokens,
                pass_tokens=pass_tokens, windows=windows)  # fmt: skip
    load.run()
    too_long = {r.row_index for r in load.refused}
    need = {r.row_index: len(r.token_ids) + r.params.max_tokens for r in load.requests}

    def most(tokens: int) -> int:
        """Pages of a row that runs alone, where a pass may begin and end anywhere in a page."""
        seen = [tokens if window is None else min(tokens, window - 1 + pass_tokens) for window in windows]
        whole = -(-tokens // page_tokens)
        return sum(min(-(-own // page_tokens) + (own < tokens), whole) for own in seen)

    assert too_long == {row for row, tokens in need.items() if most(tokens) > pages}
    alone = {row for row, tokens in need.items() if tokens == load.ledger.capacity_tokens}
    assert not too_long & alone
    assert all(r.status is Status.TOO_LONG for r in load.refused)
    assert load.finished.keys() | too_long == need.keys()
    # Work is bounded: a row is computed again only when it was preempted for an older one's page.
    assert load.computed <= sum(need.values()) * (len(need) + 1)


def test_nothing_is_computed_twice_while_the_pool_has_room() -> None:
    load = Load(1, rows=50, longest=30, pages=4000, page_tokens=1, pass_tokens=64)
    load.run()
    written = sum(len(r.token_ids) + load.finished[r.row_index] - 1 for r in load.requests)
    assert load.computed == written  # the last token of an answer is never computed


def test_requests_are_drawn_a_window_at_a_time() -> None:
    drawn = 0

    def stream():  # type: ignore[no-untyped-def]
        nonlocal drawn
        for row in range(1000):
            drawn += 1
            yield Request(row, tuple(range(8)), Sampling(max_tokens=8))

    scheduler = Scheduler(stream(), PageLedger(16, 4), pass_tokens=32, window=10)
    step = scheduler.next_step()
    assert step is not None
    assert len(scheduler.running) <= 5
    assert drawn == 10


def _passes(max_tokens: list[int], window: int) -> tuple[list[list[int]], list[int]]:
    """The rows of each pass, and the rows in the order in which they end; two run at a time."""
    requests = [Request(row, (1, 2), Sampling(max_tokens=tokens)) for row, tokens in enumerate(max_tokens)]
    scheduler = Scheduler(requests, PageLedger(100, 4), pass_tokens=4, window=window)
    steps, ended = _driven(scheduler)
    return [sorted(c.sequence.request.row_index for c in step.chunks) for step in steps], ended


def _driven(scheduler: Scheduler) -> tuple[list[Step], list[int]]:
    """Every pass, and the rows in the order in which they end."""
    passes, ended = [], []
    while (step := scheduler.next_step()) is not None:
        passes.append(step)
        for chunk in step.chunks:
            chunk.sequence.computed += chunk.length
        for sequence in step.sampled:
            sequence.tokens.append(0)
            if len(sequence.answer) == sequence.request.params.max_tokens:
                scheduler.end(sequence)
                ended.append(sequence.request.row_index)
    return passes, ended


def test_long_answers_of_a_window_start_first_and_the_tail_is_short() -> None:
    max_tokens = [2, 2, 2, 2, 2, 2, 20]
    as_they_come, _ = _passes(max_tokens, window=1)
    long_first, _ = _passes(max_tokens, window=7)
    assert long_first[0][-1] == 6
    assert sum(len(rows) == 1 for rows in long_first) < sum(len(rows) == 1 for rows in as_they_come)
    assert len(long_first) < len(as_they_come)


def test_a_window_is_admitted_whole_before_the_next() -> None:
    passes, _ = _passes([1, 2, 3, 9, 9, 9], window=3)
    first_seen = {row: min(i for i, rows in enumerate(passes) if row in rows) for row in range(6)}
    assert [first_seen[row] for row in (2, 1, 0)] == sorted(first_seen[row] for row in (0, 1, 2))
    assert max(first_seen[row] for row in (0, 1, 2)) <= min(first_seen[row] for row in (3, 4, 5))


def _ragged(rows: int) -> list[Request]:
    return [Request(row, (1, 2, 3, 4), Sampling(max_tokens=1 + row % 32)) for row in range(rows)]


def test_passes_are_alike_once_no_more_rows_come() -> None:
    tokens = sum(4 + request.params.max_tokens - 1 for request in _ragged(256))
    levelled, ended = _driven(Scheduler(_ragged(256), PageLedger(4000, 4), pass_tokens=1000, level_tokens=10))
    assert sorted(ended) == list(range(256))
    assert len(levelled) <= 32 + 2
    assert max(step.tokens for step in levelled) <= 1.3 * tokens / 32
    assert min(step.tokens for step in levelled[:-4]) >= 0.7 * tokens / 32
    at_once, _ = _driven(Scheduler(_ragged(256), PageLedger(4000, 4), pass_tokens=1000))
    assert at_once[0].tokens == 1000
    assert at_once[-8].tokens < 0.5 * tokens / 32


def test_a_pass_is_never_made_smaller_than_an_efficient_one() -> None:
    steps, _ = _driven(Scheduler(_ragged(256), PageLedger(4000, 4), pass_tokens=1000, level_tokens=400))
    assert steps[0].tokens == steps[1].tokens == 400


def test_passes_are_full_while_more_rows_may_come() -> None:
    scheduler = Scheduler(_ragged(256), PageLedger(4000, 4), pass_tokens=100, level_tokens=10, window=64)
    assert [scheduler.next_step().tokens] == [100]  # type: ignore[union-attr]


def test_admission_leaves_a_page_of_growth_for_each() -> None:
    requests = [Request(row, tuple(range(4)), Sampling(max_tokens=4)) for row in range(10)]
    scheduler = Scheduler(requests, PageLedger(6, 4), pass_tokens=100)
    step = scheduler.next_step()
    assert step is not None
    assert len(scheduler.running) == 3  # three pages held, and one kept free for each of them


@pytest.mark.parametrize(("max_tokens", "running"), [(1, 6), (2, 3)])
def test_no_page_is_kept_for_a_row_that_cannot_grow(max_tokens: int, running: int) -> None:
    """The last token of an answer is never computed: a prompt of a page and one token more need no second page."""
    requests = [Request(row, tuple(range(4)), Sampling(max_tokens=max_tokens)) for row in range(10)]
    scheduler = Scheduler(requests, PageLedger(6, 4), pass_tokens=100)
    assert scheduler.next_step() is not None
    assert len(scheduler.running) == running


def test_end_of_a_row_admits_the_next_in_the_following_pass() -> None:
    requests = [Request(row, tuple(range(6)), Sampling(max_tokens=2)) for row in range(2)]
    scheduler = Scheduler(requests, PageLedger(2, 4), pass_tokens=100)
    first = scheduler.next_step()
    assert first is not None
    (sequence,) = first.sampled
    sequence.computed += 6
    scheduler.end(sequence)
    second = scheduler.next_step()
    assert second is not None
    assert [c.sequence.request.row_index for c in second.chunks] == [1]


def test_no_requests_no_pass() -> None:
    assert Scheduler([], PageLedger(4, 4), 8).next_step() is None


def test_a_step_samples_where_a_sequence_is_complete() -> None:
    params = Sampling(max_tokens=9)
    whole = Sequence(Request(0, (5, 6, 7), params), 0, [5, 6, 7], 0, [[0]])
    cut = Sequence(Request(1, tuple(range(10, 30)), params), 1, list(range(10, 30)), 4, [[1, 2, 3, 4, 5]])
    decode = Sequence(Request(2, (1, 2), params), 2, [1, 2, 3], 2, [[6]])
    step = Step([Chunk(decode, 2, 1), Chunk(whole, 0, 3), Chunk(cut, 4, 5)], 4)
    assert step.token_ids.tolist() == [3, 5, 6, 7, 14, 15, 16, 17, 18]
    assert step.positions.tolist() == [2, 0, 1, 2, 4, 5, 6, 7, 8]
    assert step.sampled == [decode, whole]
    assert step.last_tokens.tolist() == [0, 3]
    assert (step.tokens, step.decode_tokens) == (9, 1)


def test_layers_with_one_window_make_groups_of_the_rarest_ones_size() -> None:
    """But not many groups: each costs time in every pass."""

    def sizes(*windows: int | None) -> list[tuple[int | None, int]]:
        groups = layer_groups(windows)
        assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
        assert all(windows[layer] == group.window for group in groups for layer in group.layers)
        return [(group.window, len(group.layers)) for group in groups]

    assert sizes() == [(None, 0)]
    assert sizes(None, None, None) == [(None, 3)]
    assert sizes(8, 8) == [(8, 2)]
    assert sizes(*[128, None] * 18) == [(None, 18), (128, 18)]
    assert sizes(*[512] * 5, None, *[512] * 5, None) == [(None, 2), *[(512, 2)] * 5]
    assert sizes(*[4] * 7, None, 9) == [(None, 1), *[(4, 2)] * 3, (4, 1), (9, 1)]


def test_a_window_bounds_what_a_sequence_holds() -> None:
    """However long it gets: so more of them run at once, and each may be longer than the pool."""
    asked = [Request(row, tuple(range(8)), Sampling(max_tokens=200)) for row in range(12)]
    most: dict[Windows, int] = {}
    for windows in ((None, None), (None, 16), (16, 16)):
        ledger = PageLedger(120, 4, windows, 12)
        scheduler = Scheduler(asked, ledger, 12)
        longest = running = 0
        while (step := scheduler.next_step()) is not None:
            held = [[sum(page != GIVEN_BACK for page in own) for own in s.pages] for s in scheduler.running]
            assert all(own[i] <= 8 for own in held for i, window in enumerate(windows) if window), (
                "15 + 12 tokens, from anywhere in a page"
            )
            longest = max(longest, *(len(s.tokens) for s in scheduler.running))
            running = max(running, sum(len(s.tokens) > 150 for s in scheduler.running))
            for chunk in step.chunks:
                chunk.sequence.computed += chunk.length
            for sequence in step.sampled:
                sequence.tokens.append(0)
                if len(sequence.answer) == 200:
                    scheduler.end(sequence)
        assert longest == 207
        assert ledger.free == 120
        most[windows] = running
    assert most[None, None] <= 2
    assert most[None, 16] in (2, 3)
    assert most[16, 16] == 12
    assert PageLedger(120, 4, (None, 16), 12).capacity_tokens == (120 - 8) * 4
    assert PageLedger(120, 4, (16, 16), 12).capacity_tokens > 1 << 27
    assert PageLedger(15, 4, (16, 16), 12).capacity_tokens == 7 * 4


def test_ledger_lends_all_or_nothing() -> None:
    ledger, held = PageLedger(3, 4), []
    assert ledger.grow(held, 5)
    assert [len(own) for own in held] == [2]
    assert not ledger.grow(held, 17)
    assert ([len(own) for own in held], ledger.free) == ([2], 1)
    ledger.give_back(held)
    assert (held, ledger.free, ledger.capacity_tokens) == ([], 3, 12)
