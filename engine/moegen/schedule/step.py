"""A step: the tokens of one pass, flat, and how attention cuts them into micro-batches. Ids only, no tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from moegen.schedule.sequence import Sequence

Ints = npt.NDArray[np.int64]

_QUERIES = 16  # of a prompt that meet its keys together: enough to pay for laying these out, few enough for a cache


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `length` uncomputed tokens of one sequence."""

    sequence: Sequence
    start: int  # position of the first of them in the sequence
    length: int

    @property
    def completes(self) -> bool:
        """Whether the sequence's next token can be sampled after this pass."""
        return self.start + self.length == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence inside an attention micro-batch."""

    first: int  # index of the first token in the micro-batch
    length: int
    kv_length: int  # tokens of the sequence up to and including the last of this span
    pages: list[int]
    slot: int = 0  # of the sequence's state


@dataclass(frozen=True, slots=True)
class QuerySpans:
    """Consecutive queries of sequences, as arrays: `page_ids[page_starts[s] :]` begin with the pages of span s.

    Blocks of queries of one sequence share them; spans of one query end where the next one begins.
    """

    rows: Ints  # [S] the first query's index in the micro-batch
    queries: Ints  # [S]
    kv_lengths: Ints  # [S] tokens of the sequence up to and including the last query
    page_starts: Ints  # [S + 1]
    page_ids: Ints
    derived: dict[Any, Any] = field(init=False, default_factory=dict, compare=False, repr=False)  # from the others

    @classmethod
    def of(cls, spans: Iterable[Span], most: int = 1) -> QuerySpans:
        """At most so many queries at once, and nearly as many in all blocks of a span."""
        spans, blocks, pages = list(spans), [], 0
        for span in spans:
            count = -(-span.length // most)
            bounds = [span.length * n // count for n in range(count + 1)]
            before = span.kv_length - span.length
            blocks += [(span.first + a, b - a, before + b, pages) for a, b in pairwise(bounds)]
            pages += len(span.pages)
        rows, queries, kv_lengths, page_starts = np.array(blocks, np.int64).reshape(-1, 4).T.copy()
        page_ids = np.array([page for span in spans for page in span.pages], np.int64)
        return cls(rows, queries, kv_lengths, np.append(page_starts, pages), page_ids)

    @property
    def tokens(self) -> Ints:
        """`[T]` indices of all queries in the micro-batch."""
        return np.concatenate([np.arange(r, r + n) for r, n in zip(self.rows, self.queries, strict=True)])

    def part(self, first: int, end: int) -> QuerySpans:
        """Spans `first` to before `end`, of one query each."""
        if first == 0 and end == len(self.rows):
            return self
        starts = self.page_starts[first : end + 1]
        return QuerySpans(
            self.rows[first:end],
            self.queries[first:end],
            self.kv_lengths[first:end],
            starts - starts[0],
            self.page_ids[starts[0] : starts[-1]],
        )


@dataclass(frozen=True)  # without slots: every layer asks for the same cached arrays
class AttentionBatch:
    """Tokens `first .. first + length` of the pass, with the pages that their attention reads and writes.

    A span's keys and values are written before any query of the batch is answered, and batches run in order, so a
    prefill chunk may be cut anywhere.
    """

    first: int
    length: int
    spans: tuple[Span, ...]
    write_pages: Ints  # [length] page of each token
    write_slots: Ints  # [length] its place in that page
    others: tuple[AttentionBatch, ...] = ()  # the same tokens in the pages of the groups of layers after the first

    @property
    def own(self) -> slice:
        """Its tokens among the pass's."""
        return slice(self.first, self.first + self.length)

    def of_group(self, group: int) -> AttentionBatch:
        """With the pages of this group of layers."""
        return self.others[group - 1] if group else self

    @cached_property
    def decode(self) -> QuerySpans:
        """The spans of one token."""
        return QuerySpans.of(span for span in self.spans if span.length == 1)

    @cached_property
    def prompts(self) -> QuerySpans:
        """The longer spans, cut into blocks of queries."""
        return QuerySpans.of(self.prefill, _QUERIES)

    @cached_property
    def prefill(self) -> tuple[Span, ...]:
        """The longer spans."""
        return tuple(span for span in self.spans if span.length > 1)


class Step:
    """The flat token batch of one pass: T tokens of many sequences, no padding.

    Attributes:
        token_ids, positions: `[T]`.
        decode_tokens: how many are of sequences that were already answering.
        last_tokens: `[S]`, the indices whose logits become the next token of `sampled[s]`.
        scored: (sequence, position) of every token whose logits rate a continuation.
        kept: `[S + len(scored)]`, the indices of `last_tokens`, then of `scored`.
    """

    def __init__(self, chunks: list[Chunk], page_tokens: int) -> None:
        self.chunks = chunks
        self.page_tokens = page_tokens
        self.token_ids = np.array(
            [t for c in chunks for t in c.sequence.tokens[c.start : c.start + c.length]], dtype=np.int64
        )
        self.positions = np.concatenate([np.arange(c.start, c.start + c.length, dtype=np.int64) for c in chunks])
        ends = np.cumsum([c.length for c in chunks])
        generating = [c.completes and c.sequence.scoring is None for c in chunks]
        self.sampled = [c.sequence for c, samples in zip(chunks, generating, strict=True) if samples]
        self.decode_tokens = sum(c.length == 1 and c.start >= c.sequence.prompt_tokens for c in chunks)
        self.last_tokens: Ints = np.array(
            [e - 1 for e, samples in zip(ends, generating, strict=True) if samples], np.int64
        )
        self.scored: list[tuple[Sequence, int]] = []
        self.kept = self._keep_scored(ends) if any(c.sequence.scoring for c in chunks) else self.last_tokens

    def _keep_scored(self, ends: Ints) -> Ints:
        kept: list[int] = []
        for chunk, end in zip(self.chunks, ends, strict=True):
            if (scoring := chunk.sequence.scoring) is not None:
                stop = chunk.start + chunk.length
                for position in scoring.positions(chunk.start, stop):
                    self.scored.append((chunk.sequence, position))
                    kept.append(int(end) - stop + position)
        return np.concatenate([self.last_tokens, np.array(kept, np.int64)])

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def attention_batches(self, attention_tokens: int) -> Iterator[AttentionBatch]:
        """Cuts the pass into micro-batches of at most `attention_tokens` tokens."""
        spans: list[list[Span]] = []  # a list of one for each group of layers
        first = filled = 0
        for chunk in self.chunks:
            done = 0
            while done < chunk.length:
                take = min(chunk.length - done, attention_tokens - filled)
                kv_length, slot = chunk.start + done + take, chunk.sequence.slot
                spans.append([Span(filled, take, kv_length, pages, slot) for pages in chunk.sequence.pages])
                done, filled = done + take, filled + take
                if filled == attention_tokens:
                    yield self._of_groups(first, filled, spans)
                    first, filled, spans = first + filled, 0, []
        if spans:
            yield self._of_groups(first, filled, spans)

    def _of_groups(self, first: int, length: int, spans: list[list[Span]]) -> AttentionBatch:
        own, *others = (self._batch(first, length, of_group) for of_group in zip(*spans, strict=True))
        return replace(own, others=tuple(others)) if others else own

    def _batch(self, first: int, length: int, spans: tuple[Span, ...]) -> AttentionBatch:
        positions = self.positions[first : first + length]
        page_index, slots = np.divmod(positions, self.page_tokens)
        pages = np.empty(length, np.int64)
        for span in spans:
            own = slice(span.first, span.first + span.length)
            pages[own] = np.asarray(span.pages)[page_index[own]] if span.length > 1 else span.pages[page_index[own][0]]
        return AttentionBatch(first, length, spans, pages, slots)
