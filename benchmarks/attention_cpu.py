"""CPU decode attention over paged bfloat16 keys and values, against its roofline and against torch's SDPA.

The roofline of a case is min(DRAM read bandwidth, multiply-add rate / FLOPs per byte of keys and values); both rates
are measured in the same run, between the rounds. torch's SDPA gets the same values laid out contiguously per sequence
(no pages), once with `enable_gqa` and once with the query heads of a group as query rows of one KV head. Every round
takes another layer's pages, so that none is in cache. The answers are compared before anything is timed. The same
values as int8 codes are timed beside them: what is compared is keys and values per second, not bytes. So is the way
that a job takes whose products are of bfloat16 (`rounded`): its roofline is that of reads.

    python benchmarks/attention_cpu.py [--rounds 7] [--heads 32 --head-dim 128] [--no-sdpa] [--quick]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numba
import numpy as np
import torch
import torch.nn.functional as F
from moegen.memory.kv_pool import KVPool, KVShape
from moegen.ops.attention import AttentionRule, paged_attention
from moegen.ops.host_memory import keep_freed_memory
from moegen.ops.kv_pages import CodedPages, LayerPages
from moegen.plan.machine import Machine
from moegen.schedule.step import AttentionBatch, Span

KV_HEADS, LAYERS = 4, 2
DRAM_BYTES, GEMM_SIZE = 512 << 20, 1536


@dataclass(frozen=True)
class Case:
    """`sequences` decode queries, each over `tokens` keys and values (ragged by a tenth either way)."""

    sequences: int
    tokens: int
    heads: int
    head_dim: int
    page_tokens: int

    @property
    def lengths(self) -> list[int]:
        """Ragged, the same in every run."""
        dice = np.random.default_rng(self.tokens)
        return [int(n) for n in dice.integers(self.tokens * 9 // 10, self.tokens * 11 // 10, self.sequences)]

    @property
    def kv_bytes(self) -> int:
        """What one decode step has to read."""
        return sum(self.lengths) * KV_HEADS * 2 * self.head_dim * 2

    @property
    def flops_per_byte(self) -> float:
        """Two products of 2 FLOPs per element and query head; 2 bytes an element."""
        return self.heads / KV_HEADS * 2 / 2


class Work:
    """The queries of a case, its pages in shuffled order, and the same keys and values laid out for SDPA."""

    def __init__(self, case: Case) -> None:
        self.case = case
        used = [-(-n // case.page_tokens) for n in case.lengths]
        order = np.random.default_rng(0).permutation(sum(used)).tolist()
        spans = []
        for row, (length, pages) in enumerate(zip(case.lengths, used, strict=True)):
            spans.append(Span(row, 1, length, [order.pop() for _ in range(pages)]))
        nothing = np.zeros(case.sequences, np.int64)
        self.batch = AttentionBatch(0, case.sequences, tuple(spans), nothing, nothing)
        shape = KVShape(KV_HEADS, case.head_dim, case.head_dim)
        dtype, device = torch.bfloat16, torch.device("cpu")
        pool = KVPool(dict.fromkeys(range(LAYERS), shape), sum(used), case.page_tokens, dtype, device)
        self.layers = list(pool.layers.values())
        for pages in self.layers:
            _fill(pages.keys_PGCD)
            _fill(pages.values_PGCD)
        self.coded = [_coded(pages) for pages in self.layers]
        self.query_SHD = torch.randn(case.sequences, case.heads, case.head_dim)
        self.rule = AttentionRule(case.head_dim**-0.5)

    def ours(self, pages: LayerPages, *, rounded: bool = False) -> torch.Tensor:
        """`[S, H, D]`, from the pages."""
        return paged_attention(self.query_SHD, pages, self.batch, self.rule, rounded=rounded)

    def laid_out(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`[S, G, L, D]` each, as long as the shortest sequence: SDPA would need padding or a mask for the rest."""
        shortest = min(self.case.lengths)
        gathered = [self.layers[layer].gather(span, 0) for span in self.batch.spans]
        keys, values = (torch.stack([pair[i][:, :shortest] for pair in gathered]) for i in (0, 1))
        return keys, values

    def sdpa(self, keys: torch.Tensor, values: torch.Tensor, *, gqa: bool) -> torch.Tensor:
        """`[S, H, D]`; in bfloat16, since SDPA wants queries of the keys' dtype."""
        query = self.query_SHD.to(keys.dtype)
        query = query[:, :, None] if gqa else query.unflatten(1, (KV_HEADS, -1))
        out = F.scaled_dot_product_attention(query, keys, values, scale=self.rule.scaling, enable_gqa=gqa)
        return out.reshape(self.query_SHD.shape)

    def check(self) -> float:
        """The largest difference of our answers from the torch way's, both from the same pages."""
        errors = []
        for pages in (self.layers[0], self.coded[0]):
            torch_way = paged_attention(self.query_SHD, pages, self.batch, self.rule, use_kernel=False)
            errors.append(float((self.ours(pages) - torch_way).abs().max()))
        if not max(errors) < 2e-5:  # the torch way is the farther one from float64
            raise SystemExit(f"{self.case}: the kernel and the torch way differ by {errors}")
        return max(errors)


def _coded(pages: LayerPages) -> CodedPages:
    """The same values in 8 bits, some pages at a time."""
    parts = [CodedPages.kept(pages, *own) for own in zip(*(t.split(256) for t in pages.tables), strict=True)]  # type: ignore[arg-type]
    return CodedPages(*map(torch.cat, zip(*parts, strict=True)))


def _fill(pages: torch.Tensor) -> None:
    """Normal values; a block repeated, since drawing them all takes longer than everything else here."""
    block = torch.randn(1 << 16).bfloat16()
    for part in pages.view(-1).split(len(block)):
        part.copy_(block[: len(part)])


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(case: Case, rounds: int, *, sdpa: bool) -> dict[str, object]:
    """All sides of a case, interleaved: rates of every round in bytes or FLOPs per second."""
    work = Work(case)
    error = work.check()
    laid_out = [work.laid_out(layer) for layer in range(LAYERS)] if sdpa else []
    sdpa_bytes = sum(x.nbytes for x in laid_out[0]) if sdpa else 0
    block, matrix = torch.ones(DRAM_BYTES // 4), torch.randn(GEMM_SIZE, GEMM_SIZE)
    names = ("kernel", "rounded", "sdpa_gqa", "sdpa_rows", "dram", "gemm", "bfloat16_tokens", "int8_tokens")
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        layer = number % LAYERS

        def by_sdpa(layer: int = layer, *, gqa: bool) -> object:
            return work.sdpa(*laid_out[layer], gqa=gqa) if sdpa else None

        taken = {
            "dram": DRAM_BYTES / seconds(block.sum),
            "bfloat16_tokens": sum(case.lengths) / seconds(lambda layer=layer: work.ours(work.layers[layer])),
            "rounded": case.kv_bytes / seconds(partial(work.ours, work.layers[layer - 1], rounded=True)),
            "int8_tokens": sum(case.lengths) / seconds(lambda layer=layer: work.ours(work.coded[layer])),
            "gemm": 2 * GEMM_SIZE**3 / seconds(lambda: matrix @ matrix),
            "sdpa_rows": sdpa_bytes / seconds(partial(by_sdpa, gqa=False)),
            "sdpa_gqa": sdpa_bytes / seconds(partial(by_sdpa, gqa=True)),
        }
        taken["kernel"] = taken["bfloat16_tokens"] * case.kv_bytes / sum(case.lengths)
        if number:  # the first round warms up
            for name, rate in taken.items():
                rates[name].append(rate)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    roofline = min(medians["dram"], medians["gemm"] / case.flops_per_byte)
    return {
        "case": asdict(case),
        "kv_bytes": case.kv_bytes,
        "flops_per_kv_byte": case.flops_per_byte,
        "largest_error": error,
        "rates_per_s": rates,
        "medians_per_s": medians,
        "roofline_bytes_per_s": roofline,
        "binds": "dram" if roofline == medians["dram"] else "multiply-add",
        "fraction_of_roofline": medians["kernel"] / roofline,
        "int8_tokens_over_bfloat16": medians["int8_tokens"] / medians["bfloat16_tokens"],
    }


HEADER = (
    ("sequences x tokens", 18), ("heads", 7), ("dim", 5), ("kernel", 8), ("rounded", 9), ("SDPA rows", 11),
    ("SDPA gqa", 10), ("DRAM", 8), ("FMA", 8), ("roofline", 10), ("fraction", 10),
    ("int8 tokens/s", 15), ("bf16", 7),
)  # fmt: skip


def line(result: dict) -> str:
    case, medians = result["case"], result["medians_per_s"]
    giga = {name: rate / 1e9 for name, rate in medians.items()}
    ceiling = giga["gemm"] / result["flops_per_kv_byte"]
    return (
        f"{case['sequences']:>8} x {case['tokens']:<8}{case['heads']:>6}{case['head_dim']:>5}{giga['kernel']:>8.2f}"
        f"{giga['rounded']:>9.2f}{giga['sdpa_rows']:>11.2f}{giga['sdpa_gqa']:>10.2f}{giga['dram']:>8.2f}{ceiling:>8.2f}"
        f"{result['roofline_bytes_per_s'] / 1e9:>10.2f}{result['fraction_of_roofline']:>10.0%}"
        f"{medians['int8_tokens'] / 1e6:>14.2f}M{medians['bfloat16_tokens'] / 1e6:>6.2f}M"
    )


def cases(page_tokens: int, heads: list[int], head_dims: list[int], *, quick: bool) -> list[Case]:
    if quick:
        return [Case(8, 100, 16, 64, page_tokens)]
    shapes = [(count, dim) for count in heads for dim in head_dims]
    return [Case(s, t, count, dim, page_tokens) for s, t in ((256, 300), (16, 8000)) for count, dim in shapes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--page-tokens", type=int, default=32)
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--no-sdpa", action="store_true", help="without torch's SDPA, whose figures are 0 then")
    parser.add_argument("--quick", action="store_true", help="one small case, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attention_cpu.json")
    args = parser.parse_args()

    keep_freed_memory()  # as the engine does
    started = time.perf_counter()
    Work(Case(1, 8, 4, 8, args.page_tokens)).check()  # compiles
    compile_seconds = time.perf_counter() - started
    machine = Machine.detect("cpu")
    print(f"{machine.device_name}, {torch.get_num_threads()} threads; first call {compile_seconds:.1f} s")
    print("GB/s of keys and values (median); DRAM reads; FMA: fp32 GEMM rate / FLOPs per byte of keys and values")
    print("".join(f"{name:>{width}}" for name, width in HEADER))
    results = []
    for case in cases(args.page_tokens, args.heads, args.head_dim, quick=args.quick):
        results.append(measure(case, args.rounds, sdpa=not args.no_sdpa))
        print(line(results[-1]), flush=True)
    lowest = min(float(result["fraction_of_roofline"]) for result in results)  # type: ignore[arg-type]
    print(f"lowest fraction of the roofline: {lowest:.0%}")
    if args.quick:
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": {"cpu": machine.device_name, "cores": machine.cores, "threads": torch.get_num_threads()},
        "versions": {
            "torch": torch.__version__, "numba": numba.__version__, "python": platform.python_version()
        },
        "rounds": args.rounds,
        "first_call_seconds": compile_seconds,
        "cases": results,
        "lowest_fraction_of_roofline": lowest,
    }  # fmt: skip
    args.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
