"""One row inside the engine: what was asked, how far it is, what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moegen.row import RowError, Status
from moegen.schedule.pages import Held
from moegen.schedule.scoring import Scoring
from moegen.spec import Sampling

if TYPE_CHECKING:
    from moegen.answer.grammar import TokenGrammar


@dataclass(frozen=True, slots=True)
class Request:
    """A row that is ready to run: a prompt of at least one token, and its own parameters.

    With `continuations` nothing is generated: each is rated after the prompt, and `params.max_tokens` is the length of
    the longest.
    """

    row_index: int
    token_ids: tuple[int, ...]
    params: Sampling
    grammar: TokenGrammar | None = None  # what the answer must be
    sample: int = 0  # which of the row's answers this is: it has its own noise
    logprobs: int | None = None  # wanted of each token: its own log-probability, and those of so many of the likeliest
    continuations: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token's log-probability by the model alone: before masks, penalties and temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens and theirs, best first


@dataclass(frozen=True, slots=True)
class Begun:
    """Rows that enter the engine with the next pass; a row that was preempted may enter once more."""

    row_indexes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """A row that left the engine.

    `token_ids` are the generated ids, an end token included; `text` ends before the end token or stop string.
    """

    row_index: int
    status: Status
    prompt_tokens: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str | None = None  # "stop" or "length"
    error: RowError | None = None
    sample: int = 0  # as in the request
    logprobs: tuple[TokenLogprob, ...] = ()  # one per generated token, where the request wants them
    log_likelihoods: tuple[float, ...] = ()  # one per continuation of the request


@dataclass(eq=False, slots=True)
class Sequence:
    """A running row: its tokens so far, how many of them have their KV in pages, and those pages.

    Attributes:
        most_computed: tokens that are computed in the end if the answer gets all that it may; its last one never is.
    """

    request: Request
    order: int  # admission order: the oldest is never preempted
    tokens: list[int]  # prompt and answer
    computed: int = 0  # tokens whose KV is in `pages`, as far as anybody asks for it again
    pages: Held = field(default_factory=list)  # of each group of layers
    logprobs: list[TokenLogprob] = field(default_factory=list)
    scoring: Scoring | None = None  # of a request with continuations
    slot: int = 0  # while it runs: where recurrent layers keep its state
    shared: int = 0  # tokens at its beginning that other rows have too: while it runs, their pages are its first
    prompt_tokens: int = field(init=False)
    most_computed: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.request.token_ids)
        self.most_computed = self.prompt_tokens + self.request.params.max_tokens - 1
        if self.request.continuations:
            self.scoring = Scoring(self.request.token_ids, self.request.continuations)

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    @property
    def goes_back(self) -> bool:
        """Whether tokens that are computed may be followed by others than before: all their KV is kept then."""
        return self.scoring is not None

    @property
    def pending(self) -> int:
        """Tokens still to be computed: 1 for a decoding sequence, more while it is being prefilled."""
        return len(self.tokens) - self.computed

    @property
    def answer_left(self) -> int:
        """Tokens that the answer may still get, hence passes that the sequence may still take."""
        return self.most_computed + 1 - len(self.tokens)

    @property
    def tokens_left(self) -> int:
        """Tokens still to be computed until then."""
        return self.most_computed - max(self.computed, self.shared)  # one of many computes what they share
