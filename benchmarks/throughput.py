"""Generated tokens per second on ragged work: moegen beside its peers, interleaved, in one run on one machine.

The model has random weights in a Qwen3-MoE geometry; prompts and answer lengths are ragged; every engine gets the same
token ids and must generate exactly the wanted number of tokens per row, greedily. Each turn of an engine is a process
of its own that opens the checkpoint, warms up, and is timed over generation alone; rounds interleave the engines. The
best dtype and settings of each peer count: a way that is far behind its engine's best, or less than half as fast as the
fastest of all, in the first round runs no more.
vLLM and llama.cpp live in environments of their own, made at the first run. The ceiling is what the machine's best
GEMM rate, measured before every round, would allow.

    python benchmarks/throughput.py [--rows 256] [--rounds 3] [--ways moegen "vLLM*" ...]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).parent / "peers"))  # its modules also run alone, in other environments

from environment import PeerUnavailable
from llama_cpp_engine import ENVIRONMENT as LLAMA_CPP
from machine import probe_machine
from random_checkpoint import save_random_checkpoint
from results import Results
from turn import Row
from vllm_cpu import ENVIRONMENT as VLLM
from way import Way

GEOMETRY = Qwen3MoeConfig(
    hidden_size=1024,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    num_experts=64,
    num_experts_per_tok=8,
    moe_intermediate_size=384,
    intermediate_size=384,
    norm_topk_prob=True,
    vocab_size=32_000,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)


def all_ways() -> list[Way]:
    def static(batch: int, dtype: str, sample: int | None = None) -> Way:
        settings = {"batch": batch, "dtype": dtype}
        return Way("transformers", f"static {batch}, {dtype}", "transformers_static", settings, sample=sample)

    def continuous(requests: int, batch_tokens: int, dtype: str) -> Way:
        settings = {"requests": requests, "batch_tokens": batch_tokens, "dtype": dtype}
        return Way("transformers", f"continuous {requests}, {dtype}", "transformers_continuous", settings)

    def vllm(dtype: str) -> Way:
        return Way("vLLM", dtype, "vllm_cpu", {"dtype": dtype, "kv_gib": 4}, VLLM)

    def llama_cpp(sequences: int, dtype: str) -> Way:
        settings = {"sequences": sequences, "dtype": dtype}
        return Way("llama.cpp", f"{sequences} sequences, {dtype}", "llama_cpp_engine", settings, LLAMA_CPP)

    return [
        Way("moegen", "", "moegen_engine"),
        Way("moegen", "float32 KV", "moegen_engine", {"kv_dtype": "float32"}),
        vllm("float32"),
        vllm("bfloat16"),
        llama_cpp(64, "float32"),
        llama_cpp(64, "bfloat16"),
        static(64, "float32"),
        static(128, "float32"),
        static(256, "float32"),
        continuous(32, 256, "float32"),
        static(32, "float32", sample=32),  # which dtype is the faster one for transformers here
        static(32, "bfloat16", sample=32),
    ]


def ragged_rows(count: int, longest_answer: int = 128, seed: int = 0) -> list[Row]:
    """Prompts log-normal with a mean near 100 tokens, at most 512; answers of 8 to `longest_answer` tokens."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4.35, 0.7, count), 4, 512).astype(int)
    answers = rng.integers(8, longest_answer + 1, count)
    return [
        Row(rng.integers(1, GEOMETRY.vocab_size, n).tolist(), int(a)) for n, a in zip(lengths, answers, strict=True)
    ]


def measure(ways: Sequence[Way], checkpoint: Path, results: Results, rounds: int, limit_s: float) -> Iterator[None]:
    """Takes every turn, interleaved; yields after each. After round 1 only what is near its engine's best goes on."""
    for number in range(1, rounds + 1):
        results.measure_gemm()
        for way in [way for way in ways if number == 1 or near_best(way, results)]:
            try:
                outcome = way.take_turn(checkpoint, results.rows, limit_s)
            except PeerUnavailable as error:
                results.not_run[way.name] = str(error)
                line = f"not run: {error}"
            else:
                results.outcomes.setdefault(way.name, []).append(outcome)
                rate, opened = results.rates(way.name)[-1], outcome.open_seconds
                line = f"{rate:8.1f} generated tokens/s  {outcome.seconds:7.1f} s  (opened in {opened:.0f} s)"
            print(f"round {number}  {way.name:40s} {line}", flush=True)
            yield


def near_best(way: Way, results: Results) -> bool:
    """Whether another turn can change what is said: it is near its engine's best, and not far behind all."""
    if way.name not in results.whole:
        return False
    rate, best = results.medians[way.name], results.medians[results.best(way.engine)]
    return rate >= 0.9 * best and rate >= 0.5 * max(results.medians.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument(
        "--longest-answer", type=int, default=128, metavar="TOKENS", help="8 or more; a small one to try"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=["*"], metavar="PATTERN", help="run only the ways so named")
    parser.add_argument("--turn-limit", type=float, default=900, metavar="SECONDS", help="give up a turn after this")
    parser.add_argument("--checkpoint", type=Path, help="one of the same geometry, instead of a new one")
    parser.add_argument("--list", action="store_true", help="print the names of the ways and end")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "throughput.json")
    args = parser.parse_args()

    ways = [way for way in all_ways() if any(fnmatch.fnmatch(way.name, pattern) for pattern in args.ways)]
    if args.list:
        print("\n".join(way.name for way in ways))
        return
    if not ways:
        raise SystemExit(f"--ways {' '.join(args.ways)}: no way is so named; --list prints all names")
    results = Results(GEOMETRY, ragged_rows(args.rows, args.longest_answer))
    requirements = sorted({way.environment.requirements[0] for way in ways if way.environment})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="moegen-bench-") as folder:
        checkpoint = args.checkpoint or Path(folder)
        if not args.checkpoint:
            save_random_checkpoint(checkpoint, GEOMETRY)
        probe_machine(checkpoint)
        for _ in measure(ways, checkpoint, results, args.rounds, args.turn_limit):
            args.out.write_text(json.dumps(results.as_mapping(requirements), indent=2) + "\n")
    results.print_table()


if __name__ == "__main__":
    main()
