"""The plan: every batch size and buffer of a run, chosen before it begins."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Plan:
    """Sizes in tokens and bytes; memory is of the host, or of the device when the model runs there."""

    device: str
    threads: int  # of the host's cores, for arithmetic
    compute_dtype: str  # the dtype of weights and activations while they are multiplied
    kv_dtype: str  # the dtype of the pages
    attention_tokens: int  # tokens per attention micro-batch
    expert_tokens: int  # token-expert pairs per expert chunk
    pass_tokens: int  # tokens per pass: every running sequence's decode token and the prefill that fits
    page_tokens: int  # tokens per KV page
    kv_pages: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    memory_bytes: int  # the budget that the three above stay within

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt and answer that the pool can hold."""
        return self.kv_pages * self.page_tokens

    def to_mapping(self) -> dict[str, Any]:
        return {**asdict(self), "max_sequence_tokens": self.max_sequence_tokens}
