"""What a pass was: counted where it happened, reported upwards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PassReport:
    """One pass of the engine."""

    tokens: int  # all tokens of the pass
    decode_tokens: int  # of sequences that were already answering
    generated_tokens: int  # sampled in it
    running: int  # sequences in flight after it
    seconds: float

    @property
    def prefill_tokens(self) -> int:
        return self.tokens - self.decode_tokens
