"""The cost model, restricted to what MoE-Gen does, against what MoE-Gen published (arXiv 2503.09716).

Mixtral-8x7B in bfloat16 on an RTX A5000 (24 GB) in a host of 512 GB, prompts of 512 tokens. Its mechanism as far as it
matters here: prefill and decode are separate phases, every prompt is padded, KV lives on the host for a sequence's
whole length from the start, all weights come over the link in every pass, every token goes through every layer's
experts, decode attention is split between the host's cores and the device, or done by the device alone.

Published, or of the hardware's data sheet: the figures themselves, the sizes above, the model's geometry, 111 TFLOP/s
dense bfloat16, PCIe 4.0 x16, and that its CPU attention reads 24 GB/s.
Inferred, three constants for five figures: the link moves pinned weights at 25 GB/s (its usual share of 31.5); GEMMs
run at 65 % of the data sheet's peak (fitted to the prefill figure, whose only term this is); KV that lies in pieces on
the host reaches the device at 17.5 GB/s (fitted to the two figures of attention on the device).
"""

from __future__ import annotations

import numpy as np
import pytest
from moegen.plan.cost import CostModel, Load, PassTime, balanced_attention
from moegen.plan.footprint import Footprint
from moegen.plan.machine import Rates
from moegen.plan.plan import MemoryUse, Plan
from moegen.shape import ModelShape

PROMPT = 512
HOST_BYTES = 512e9
LAYERS, HIDDEN, WIDTH, VOCAB, EXPERTS = 32, 4096, 14_336, 32_000, 8
EXPERT_WEIGHTS = LAYERS * EXPERTS * 3 * HIDDEN * WIDTH
DENSE_WEIGHTS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * 1024 + EXPERTS * HIDDEN) + 2 * VOCAB * HIDDEN
MIXTRAL = ModelShape(
    model_type="mixtral", layers=LAYERS, hidden_size=HIDDEN, vocab_size=VOCAB, heads=32, experts=EXPERTS,
    experts_per_token=2, max_position_embeddings=32_768, dtype="bfloat16", weights=EXPERT_WEIGHTS + DENSE_WEIGHTS,
    expert_weights=EXPERT_WEIGHTS, kv_per_token=LAYERS * 2 * 8 * 128, latent_kv_per_token=None, moe_layers=LAYERS,
    attention_width=32 * 2 * 128, tied_head=False,
)  # fmt: skip
BF16 = Footprint(MIXTRAL, "bfloat16", "bfloat16", "bfloat16")
GEMM = {1 << 20: {1: 0.65 * 111e12}}
A5000 = Rates(
    linear_flops_per_s={"bfloat16": GEMM},
    expert_flops_per_s={"bfloat16": GEMM},
    decode_bytes_per_s={4: {1: 24e9}},
    prefill_flops_per_s={1: 0.65 * 111e12},
    dram_read_bytes_per_s=170e9,
    h2d_bytes_per_s=25e9,
    gather_bytes_per_s=17.5e9,
)
PLAN = Plan(
    device="cuda", threads=16, compute_dtype="bfloat16", expert_dtype="bfloat16", kv_dtype="bfloat16",
    attention_tokens=1 << 20, expert_tokens=1 << 20, pass_tokens=1 << 20, level_tokens=1 << 20,
    logit_tokens=1 << 20, page_tokens=1, kv_pages=0, kv_home="host", attention_on_host=0.0, groups=EXPERTS,
    group_experts=1, resident_groups=0, host_groups=EXPERTS, stream_slots=2, stream_depth=1, reader_threads=0,
    host=MemoryUse(), device_memory=MemoryUse(),
)  # fmt: skip


def _load(sequences: float, *, prompt: int = 0, context: float = 0) -> Load:
    """A pass of prefill alone, or of decode alone."""
    decoding = 0 if prompt else sequences
    prefilling = sequences - decoding
    values = (
        decoding + prefilling * prompt, sequences, sequences, decoding, decoding * context, prefilling,
        prefilling * prompt, prefilling * prompt * (prompt + 1) / 2, decoding + prefilling * prompt,
    )  # fmt: skip
    return Load(*(np.array([float(value)]) for value in values))


def _decode(answer: int, *, split: bool) -> tuple[float, PassTime]:
    """(generated tokens/s, the mean pass) with the host's memory full of KV."""
    sequences = (HOST_BYTES - MIXTRAL.weights * 2) / (BF16.kv_token * (PROMPT + answer))
    load = _load(sequences, context=PROMPT + answer / 2)
    plan = PLAN
    if split:
        plan = Plan(**{**PLAN.__dict__, "attention_on_host": balanced_attention(BF16, PLAN, A5000, load)})
    time = CostModel(BF16, plan, A5000).time(load)
    return sequences / float(time.seconds[0]), time


@pytest.mark.parametrize(
    ("answer", "split", "published", "binding"),
    [
        (256, True, 469, {"link", "host attention"}),  # equalised: both bind
        (1024, True, 283, {"link", "host attention"}),
        (256, False, 195, {"link"}),
        (1024, False, 93, {"link"}),
    ],
)
def test_decode(answer: int, split: bool, published: float, binding: set[str]) -> None:
    rate, time = _decode(answer, split=split)
    print(f"decode, {answer} new tokens, {'split' if split else 'on the device'}: {rate:.0f} predicted, "
          f"{published} published ({rate / published - 1:+.1%}), bound by {' and '.join(sorted(binding))}")  # fmt: skip
    assert rate == pytest.approx(published, rel=0.15)
    assert {name for name, term in time.terms.items() if term[0] > 0.999 * time.seconds[0]} == binding


def test_prefill() -> None:
    load = _load(64, prompt=PROMPT)
    time = CostModel(BF16, PLAN, A5000).time(load)
    rate = 64 * PROMPT / float(time.seconds[0])
    print(f"prefill: {rate:.0f} predicted, 2790 published ({rate / 2790 - 1:+.1%}), bound by {time.binding}")
    assert rate == pytest.approx(2790, rel=0.15)
    assert time.binding == "device"
