"""One row inside the engine: what was asked, how far it is, what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from moegen.row import RowError, Status
from moegen.spec import Sampling


@dataclass(frozen=True, slots=True)
class Request:
    """A row that is ready to run: a prompt of at least one token, and its own parameters."""

    row_index: int
    token_ids: tuple[int, ...]
    params: Sampling


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


@dataclass(eq=False, slots=True)
class Sequence:
    """A running row: its tokens so far, how many of them have their KV in pages, and those pages."""

    request: Request
    order: int  # admission order: the oldest is never preempted
    tokens: list[int]  # prompt and answer
    computed: int = 0  # tokens whose KV is in `pages`
    pages: list[int] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.token_ids)

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    @property
    def pending(self) -> int:
        """Tokens still to be computed: 1 for a decoding sequence, more while it is being prefilled."""
        return len(self.tokens) - self.computed

    @property
    def answer_left(self) -> int:
        """Tokens that the answer may still get, hence passes that the sequence may still take."""
        return self.prompt_tokens + self.request.params.max_tokens - len(self.tokens)

    @property
    def tokens_left(self) -> int:
        """Tokens still to be computed until then; an answer's last token never is."""
        return self.prompt_tokens + self.request.params.max_tokens - 1 - self.computed
