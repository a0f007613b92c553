"""The plan: every batch size and buffer of a run, chosen before it begins.

A layer's experts are cut into `groups` of `group_experts` consecutive ones, the pieces that move. In every layer alike
the first `resident_groups` stay where they are multiplied, the next `host_groups` (only when the device is a GPU) lie
in the host's slab, and the rest is read from the checkpoint on disk whenever a pass comes to it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from moegen.schedule.pages import PageLedger


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one memory, the host's or the device's, consumer by consumer."""

    dense: int = 0  # weights outside the experts
    experts: int = 0  # groups that stay: resident ones, or the host's slab for a GPU
    slots: int = 0  # the ring through which the other groups pass
    staging: int = 0  # what readers read into before a group is placed
    kv: int = 0
    state: int = 0  # slots of what recurrent layers carry
    activations: int = 0
    runtime: int = 0  # interpreter, libraries, tokenizer, tables
    budget: int = 0

    @property
    def used(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self) if item.name != "budget")

    @property
    def spare(self) -> int:
        """What of the budget no consumer has."""
        return self.budget - self.used


@dataclass(frozen=True)
class Plan:
    """Sizes in tokens, experts, groups and bytes. On a CPU device there is one memory, `host`."""

    device: str
    threads: int  # of the host's cores, for arithmetic
    compute_dtype: str  # of dense weights and activations while they are multiplied
    expert_dtype: str  # of expert weights, as they lie in memory
    kv_dtype: str  # of the pages; int8: codes, with a scale per token and KV head
    attention_tokens: int  # tokens per attention micro-batch
    expert_tokens: int  # token-expert pairs per expert chunk
    pass_tokens: int  # tokens per pass: every running sequence's decode token and the prefill that fits
    level_tokens: int  # a pass of so many is efficient: towards the end of a job, rows wait while passes have them
    logit_tokens: int  # tokens whose logits exist at once; a pass that samples more goes through the head in pieces
    page_tokens: int  # tokens per KV page
    kv_pages: int
    kv_home: Literal["host", "device"]
    attention_on_host: float  # share of decode attention's KV bytes that the host's cores work off; 1 on a CPU device
    groups: int  # of every layer; 0 where the model has no experts
    group_experts: int  # the last group of a layer may have fewer
    resident_groups: int
    host_groups: int
    stream_slots: int  # 0 when no group moves
    stream_depth: int  # groups read ahead of the one in use; slots - 1 at most
    reader_threads: int
    host: MemoryUse
    device_memory: MemoryUse  # all 0 on a CPU device
    prefix_tokens: int = 0  # that nearly all prompts begin with, in whole pages: computed once, shared by all rows
    latent_kv: bool = True  # layers with latent attention keep latents; else keys and values of all heads
    rounded: bool = False  # on a CPU, activations to bfloat16 where they meet weights or pages of that dtype
    weights: Literal["as_stored", "int8", "fp8"] = "as_stored"  # what plain experts become when they are loaded
    ready_pages: int = 0  # that the job is expected to use at once: a host makes them present before the first pass
    state_slots: int = 0  # sequences whose recurrent layers' state there is room for; 0: the model has no such layers

    @property
    def product_dtype(self) -> str:
        """Of the factors of most matrix products."""
        return "bfloat16" if self.rounded else self.compute_dtype

    @property
    def max_sequences(self) -> int:
        """That run at once, at most."""
        return min(self.state_slots or self.pass_tokens, self.pass_tokens)

    kv_windows: tuple[int | None, ...] = (None,)  # of the groups of layers that pages are of; None: all tokens are kept

    def ledger(self) -> PageLedger:
        """All pages, free."""
        return PageLedger(self.kv_pages, self.page_tokens, self.kv_windows, self.pass_tokens)

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt and answer that the pool can hold."""
        return self.ledger().capacity_tokens

    @property
    def streamed_groups(self) -> int:
        """Groups of every layer that come through the slots in a pass."""
        return self.groups - self.resident_groups

    @property
    def disk_groups(self) -> int:
        """Groups of every layer that are read from the checkpoint in a pass."""
        return self.groups - self.resident_groups - self.host_groups

    def to_mapping(self) -> dict[str, Any]:
        return {**asdict(self), "max_sequence_tokens": self.max_sequence_tokens}
