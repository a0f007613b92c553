"""DeepSeek-V3's latent attention on the CPU: bytes that a token keeps, exactness, and the rate of decode attention.

- **bytes and logits**: a model of V3's attention (128 heads, rank 512, rotary 64; few layers and experts, a small
  hidden size) through the engine's passes and through transformers' own forward, in float32; the bytes of a token are
  those of the pool's memory.
- **rate**: decode attention of absorbed queries over bfloat16 pages, by the kernel alone. Its roofline is
  min(DRAM reads, multiply-add rate / FLOPs per byte); both rates are measured in the same run, between the rounds.
  Absorbed, a head takes 2 (576 + 512) FLOPs for every 1,152 bytes of a token: with 128 heads arithmetic binds by far.
  Beside it, what the same cores do with expanded heads, in tokens of context attended per second.

    python benchmarks/latent_attention.py [--rounds 7] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from moegen.memory.kv_pool import KVPool, KVShape
from moegen.model.host import ModelHost
from moegen.model.seams import SEAMS
from moegen.model.tiny import tiny_config
from moegen.ops.attention import AttentionRule, paged_attention
from moegen.ops.kv_pages import LayerPages
from moegen.ops.paged_kernel import attend_pages
from moegen.plan.machine import Machine
from moegen.run.certify import logit_difference, random_model
from moegen.schedule.step import AttentionBatch, Span
from moegen.shape import ModelShape
from transformers import AutoModelForCausalLM, DeepseekV3Config

RANK, ROPE, NOPE, VALUE = 512, 64, 128, 128
PAGE_TOKENS, LAYERS = 32, 2
DRAM_BYTES, GEMM_SIZE = 512 << 20, 1536


@dataclass(frozen=True)
class Case:
    """`sequences` decode queries of `heads` heads, each over `tokens` tokens (ragged by a tenth either way)."""

    sequences: int
    tokens: int
    heads: int

    @property
    def lengths(self) -> list[int]:
        """The same in every run."""
        dice = np.random.default_rng(self.tokens)
        return [int(n) for n in dice.integers(self.tokens * 9 // 10, self.tokens * 11 // 10 + 1, self.sequences)]

    @property
    def flops(self) -> int:
        """Of absorbed queries over latents: a multiply and an add per element of keys and of values."""
        return 2 * self.heads * (RANK + ROPE + RANK) * sum(self.lengths)

    @property
    def kv_bytes(self) -> int:
        """Of latents that one decode step has to read."""
        return 2 * (RANK + ROPE) * sum(self.lengths)


class Pages:
    """The pages of a case in shuffled order, of some layers, so that none is in cache when its turn comes."""

    def __init__(self, case: Case, shape: KVShape, query_dim: int) -> None:
        used = [-(-n // PAGE_TOKENS) for n in case.lengths]
        order = np.random.default_rng(0).permutation(sum(used)).tolist()
        spans = [
            Span(row, 1, length, [order.pop() for _ in range(pages)])
            for row, (length, pages) in enumerate(zip(case.lengths, used, strict=True))
        ]
        nothing = np.zeros(case.sequences, np.int64)
        self.batch = AttentionBatch(0, case.sequences, tuple(spans), nothing, nothing)
        layers = dict.fromkeys(range(LAYERS), shape)
        pool = KVPool(layers, sum(used), PAGE_TOKENS, torch.bfloat16, torch.device("cpu"))
        self.layers: list[LayerPages] = list(pool.layers.values())
        for pages in self.layers:
            for table in pages.tables:
                _fill(table)
        self.query_SHD = torch.randn(case.sequences, case.heads, query_dim)
        self.out_SHV = torch.empty(case.sequences, case.heads, shape.value_dim)
        self.rule = AttentionRule((NOPE + ROPE) ** -0.5)

    def decode(self, layer: int) -> None:
        """One step, by the kernel."""
        attend_pages(self.query_SHD, self.layers[layer], self.batch.decode, self.rule, self.out_SHV)

    def largest_error(self) -> float:
        """Of the kernel's answers beside the torch way's."""
        self.decode(0)
        torch_way = paged_attention(self.query_SHD, self.layers[0], self.batch, self.rule, use_kernel=False)
        return float((self.out_SHV - torch_way).abs().max())


def _fill(table: torch.Tensor) -> None:
    """Normal values; a block repeated, since drawing them all takes longer than everything else here."""
    block = torch.randn(1 << 16).bfloat16()
    for part in table.view(-1).split(len(block)):
        part.copy_(block[: len(part)])


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Rates of every round, interleaved: latents, expanded heads (of fewer tokens, if need be), DRAM, GEMM."""
    latent = Pages(case, KVShape(1, RANK + ROPE, RANK, latent=True), RANK + ROPE)
    few = Case(max(case.sequences // 8, 1), case.tokens, case.heads)  # 71 times the bytes, at 128 heads
    heads = Pages(few, KVShape(case.heads, NOPE + ROPE, VALUE), NOPE + ROPE)
    errors = latent.largest_error(), heads.largest_error()
    if not max(errors) < 1e-4:
        raise SystemExit(f"{case}: kernel and torch way differ by {errors}")
    block, matrix = torch.ones(DRAM_BYTES // 4), torch.randn(GEMM_SIZE, GEMM_SIZE)
    taken: dict[str, list[float]] = {"latent": [], "heads": [], "dram_bytes_per_s": [], "gemm_flops_per_s": []}
    for number in range(rounds + 1):
        layer = number % LAYERS
        found = {
            "dram_bytes_per_s": DRAM_BYTES / seconds(block.sum),
            "latent": seconds(lambda layer=layer: latent.decode(layer)),
            "gemm_flops_per_s": 2 * GEMM_SIZE**3 / seconds(lambda: matrix @ matrix),
            "heads": seconds(lambda layer=layer: heads.decode(layer)),
        }
        if number:  # the first round warms up
            for name, value in found.items():
                taken[name].append(value)
    median = {name: statistics.median(values) for name, values in taken.items()}
    flops_per_s, bytes_per_s = case.flops / median["latent"], case.kv_bytes / median["latent"]
    ceiling = median["gemm_flops_per_s"] / (case.flops / case.kv_bytes)
    return {
        "case": asdict(case),
        "flops_per_kv_byte": case.flops / case.kv_bytes,
        "largest_error": errors[0],
        "rounds": taken,
        "latent_flops_per_s": flops_per_s,
        "latent_kv_bytes_per_s": bytes_per_s,
        "context_tokens_per_s": {
            "latent": sum(case.lengths) / median["latent"], "heads": sum(few.lengths) / median["heads"]
        },
        "dram_bytes_per_s": median["dram_bytes_per_s"],
        "gemm_flops_per_s": median["gemm_flops_per_s"],
        "binds": "dram" if median["dram_bytes_per_s"] < ceiling else "multiply-add",
        "fraction_of_roofline": bytes_per_s / min(median["dram_bytes_per_s"], ceiling),
    }  # fmt: skip


def exactness() -> dict[str, Any]:
    """A small model with V3's attention: bytes of a token in the pool, and logits beside transformers'."""
    config = DeepseekV3Config()
    small = tiny_config(config, 2)
    small.num_attention_heads = small.num_key_value_heads = 128
    small.kv_lora_rank, small.first_k_dense_replace = RANK, 1
    reference = random_model(small)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(small), dtype=torch.float32, **SEAMS)
    model.load_state_dict(reference.state_dict())
    host = ModelHost(model, staged=True, expert_tokens=64)
    pool = KVPool(host.kv_shapes, 4, PAGE_TOKENS, torch.bfloat16, torch.device("cpu"))
    kept = sum(t.untyped_storage().nbytes() for pages in pool.layers.values() for t in pages.tables)
    shape = ModelShape.of(config, {})
    return {
        "layers": 2,
        "heads": 128,
        "bytes_per_token_measured": kept // (4 * PAGE_TOKENS),
        "bytes_per_token_expected": (RANK + ROPE) * 2 * 2,
        "expanded_bytes_per_token": 128 * (NOPE + ROPE + VALUE) * 2 * 2,
        "whole_model_bytes_per_token": 2 * (shape.latent_kv_per_token or 0),
        "logits_differ_by_of_largest": logit_difference(host, reference),
    }


def line(result: dict[str, Any]) -> str:
    case, rates = result["case"], result["context_tokens_per_s"]
    return (
        f"{case['heads']:>5} heads {case['sequences']:>4} x {case['tokens']:<6}"
        f"{result['latent_flops_per_s'] / 1e9:>8.1f} GFLOP/s of {result['gemm_flops_per_s'] / 1e9:>6.1f}"
        f"{result['latent_kv_bytes_per_s'] / 1e9:>7.2f} GB/s of {result['dram_bytes_per_s'] / 1e9:>5.1f}"
        f"  {result['binds']:<12}{result['fraction_of_roofline']:>5.0%}"
        f"{rates['latent'] / 1e6:>9.2f} M context tokens/s, expanded {rates['heads'] / 1e6:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one small case, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "latent_attention.json")
    args = parser.parse_args()
    machine = Machine.detect("cpu")
    print(f"{machine.device_name}, {torch.get_num_threads()} threads", flush=True)
    exact = exactness()
    print(", ".join(f"{name} {value:,.3g}" for name, value in exact.items()), flush=True)
    measure(Case(1, 8, 8), 1)  # compiles
    cases = [Case(2, 100, 16)] if args.quick else [Case(64, 300, 128), Case(4, 6000, 128), Case(256, 300, 16)]
    results = []
    for case in cases:
        results.append(measure(case, args.rounds))
        print(line(results[-1]), flush=True)
    if args.quick:
        return
    document = {
        "machine": {"cpu": machine.device_name, "cores": machine.cores, "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "numba": numba.__version__, "python": platform.python_version()},
        "exactness": exact,
        "cases": results,
        "lowest_fraction_of_roofline": min(result["fraction_of_roofline"] for result in results),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
