"""Generated tokens per second on ragged work: moegen beside transformers, interleaved, in one run on one machine.

The model has random weights in a Qwen3-MoE geometry; prompts and answer lengths are ragged; every engine gets the same
token ids and must generate exactly the wanted number of tokens per row. transformers runs two ways: `generate` over
padded static batches sorted by prompt length (the best of several batch sizes), and its continuous batching. All
compute in the dtype whose GEMM is faster on this machine (bfloat16 weights are upcast where it has no instructions for
them), which helps transformers as much as us. The ceiling is what the machine's GEMM rate would allow.

    python benchmarks/throughput.py [--rows 256] [--rounds 3] [--skip-continuous]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from moegen.plan.machine import Machine
from moegen.plan.plan import Plan
from moegen.plan.search import choose_plan
from moegen.run.engine import Engine
from moegen.run.probe import gemm_flops_per_s
from moegen.schedule.sequence import Finished, Request
from moegen.shape import ModelShape
from moegen.spec import Engine as EngineSpec
from moegen.spec import Sampling
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

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


@dataclass(frozen=True)
class Row:
    """One prompt, and how many tokens must be generated for it."""

    token_ids: tuple[int, ...]
    answer_tokens: int


def ragged_rows(count: int, seed: int = 0) -> list[Row]:
    """Prompts log-normal with a mean near 100 tokens, at most 512; answers of 8 to 128 tokens."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4.35, 0.7, count), 4, 512).astype(int)
    answers = rng.integers(8, 129, count)
    return [
        Row(tuple(rng.integers(1, GEOMETRY.vocab_size, n).tolist()), int(a))
        for n, a in zip(lengths, answers, strict=True)
    ]


def save_checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(GEOMETRY)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
    model.save_pretrained(folder)


def run_moegen(engine: Engine, rows: list[Row]) -> dict[int, tuple[int, ...]]:
    requests = [
        Request(i, row.token_ids, Sampling(max_tokens=row.answer_tokens, ignore_eos=True)) for i, row in enumerate(rows)
    ]
    return {e.row_index: e.token_ids for e in engine.generate(requests) if isinstance(e, Finished)}


def run_static(model: PreTrainedModel, rows: list[Row], batch_size: int) -> dict[int, tuple[int, ...]]:
    """Padded batches of similar prompt length; each runs as long as its longest answer needs."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].token_ids))
    answers = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(rows[i].token_ids) for i in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, i in enumerate(batch):
            ids[place, width - len(rows[i].token_ids) :] = torch.tensor(rows[i].token_ids)
            mask[place, width - len(rows[i].token_ids) :] = 1
        longest = max(rows[i].answer_tokens for i in batch)
        config = GenerationConfig(max_new_tokens=longest, min_new_tokens=longest, do_sample=False, pad_token_id=0)
        out = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        answers.update({i: tuple(out[place][: rows[i].answer_tokens]) for place, i in enumerate(batch)})
    return answers


def run_continuous(model: PreTrainedModel, rows: list[Row]) -> dict[int, tuple[int, ...]]:
    """transformers' continuous batching, with each row's own `max_new_tokens`."""
    from transformers import ContinuousBatchingConfig

    tokens = sum(len(row.token_ids) + row.answer_tokens for row in rows)
    settings = ContinuousBatchingConfig(
        page_size=32, num_blocks=tokens // 32 + 2 * len(rows), max_batch_tokens=2048, allow_block_sharing=False
    )
    config = GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0)
    answers: dict[int, tuple[int, ...]] = {}
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=settings, warmup=False
    ) as manager:
        for i, row in enumerate(rows):
            manager.add_request(list(row.token_ids), request_id=str(i), max_new_tokens=row.answer_tokens)
        for result in manager:
            if result.is_finished():
                answers[int(result.request_id)] = tuple(result.generated_tokens)
            if len(answers) == len(rows):
                break
    return answers


def timed(work: Callable[[], dict[int, tuple[int, ...]]], rows: list[Row]) -> tuple[float, float]:
    """(generated tokens per second, seconds); checks that every row has its tokens."""
    started = time.perf_counter()
    answers = work()
    seconds = time.perf_counter() - started
    short = [i for i, row in enumerate(rows) if len(answers.get(i, ())) != row.answer_tokens]
    if short:
        raise SystemExit(f"{len(short)} rows have the wrong number of tokens, the first is row {short[0]}")
    return sum(row.answer_tokens for row in rows) / seconds, seconds


def total_flops(shape: ModelShape, rows: list[Row]) -> float:
    """Of active parameters, the output head only where a token is sampled, and of attention's two products."""
    head = shape.vocab_size * shape.hidden_size
    width = GEOMETRY.num_attention_heads * GEOMETRY.head_dim
    flops = 0.0
    for row in rows:
        prompt, answer = len(row.token_ids), row.answer_tokens
        computed = prompt + answer - 1
        flops += 2 * (shape.active_weights - head) * computed + 2 * head * answer
        flops += 4 * width * shape.layers * computed * (computed + 1) / 2
    return flops


def compute_dtype() -> tuple[str, dict[str, float]]:
    """The dtype whose GEMM is fastest here, and each one's peak FLOP/s over several row counts."""
    device = torch.device("cpu")
    peaks = {
        name: max(gemm_flops_per_s(device, getattr(torch, name), rows) for rows in (256, 1024, 2048))
        for name in ("float32", "bfloat16")
    }
    return max(peaks, key=lambda name: peaks[name]), peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256], help="static batches to choose from")
    parser.add_argument("--skip-continuous", action="store_true")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "throughput.json")
    args = parser.parse_args()

    rows = ragged_rows(args.rows)
    dtype, peaks = compute_dtype()
    print(f"GEMM peak GFLOP/s: {', '.join(f'{n} {p / 1e9:.0f}' for n, p in peaks.items())}; computing in {dtype}")
    with tempfile.TemporaryDirectory(prefix="moegen-bench-") as folder:
        save_checkpoint(Path(folder))
        shape = ModelShape.read(folder)
        plan = choose_plan(shape, Machine.detect("cpu"), EngineSpec(device="cpu"))
        plan = Plan(**{**plan.__dict__, "compute_dtype": dtype})
        engine = Engine.open(folder, plan, tokenizer=None)
        run_moegen(engine, ragged_rows(4))  # compiles the attention kernel
        ways: dict[str, Callable[[], dict[int, tuple[int, ...]]]] = {"moegen": lambda: run_moegen(engine, rows)}
        if not args.only_ours:
            peer = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
            for size in args.batch_sizes:
                ways[f"transformers static, batch {size}"] = lambda size=size: run_static(peer, rows, size)
            if not args.skip_continuous:
                ways["transformers continuous"] = lambda: run_continuous(peer, rows)
        for rates in measure(ways, rows, args.rounds):  # after every round, so that a run cut short keeps its rounds
            report(args, rows, rates, total_flops(shape, rows), peaks, dtype)


def measure(ways: dict[str, Callable], rows: list[Row], rounds: int) -> Iterator[dict[str, list[float]]]:
    """All rates so far after each interleaved round; a static batch size that loses by a tenth is not run again."""
    run_ways = dict(ways)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, work in list(run_ways.items()):
            rate, seconds = timed(work, rows)
            rates[name].append(rate)
            print(f"round {number + 1}  {name:34s} {rate:8.1f} generated tokens/s  {seconds:7.1f} s", flush=True)
        static = [name for name in run_ways if "static" in name]
        best = max((rates[name][0] for name in static), default=0)
        for name in static:
            if rates[name][0] < 0.9 * best:
                del run_ways[name]
        yield {name: values for name, values in rates.items() if values}


def report(
    args: argparse.Namespace,
    rows: list[Row],
    rates: dict[str, list[float]],
    flops: float,
    peaks: dict[str, float],
    dtype: str,
) -> None:
    medians = {name: statistics.median(values) for name, values in rates.items()}
    generated = sum(row.answer_tokens for row in rows)
    ceiling = generated / (flops / peaks[dtype])
    peers = {name: rate for name, rate in medians.items() if name != "moegen"}
    best = max(peers, key=lambda name: peers[name], default=None)
    ratio = medians["moegen"] / peers[best] if best else None
    print(f"\n{'way':36s} generated tokens/s (median)")
    for name, rate in medians.items():
        print(f"{name:36s} {rate:8.1f}")
    print(f"{'GEMM ceiling':36s} {ceiling:8.1f}   moegen reaches {medians['moegen'] / ceiling:.0%}")
    if best:
        print(f"moegen / best of transformers ({best}): {ratio:.2f}")
    result = {
        "machine": {"cpu": Machine.detect("cpu").device_name, "cores": Machine.detect("cpu").cores},
        "versions": {
            "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()
        },
        "rows": len(rows),
        "prompt_tokens": sum(len(row.token_ids) for row in rows),
        "generated_tokens": generated,
        "compute_dtype": dtype,
        "gemm_peak_flops_per_s": peaks,
        "generated_tokens_per_s": rates,
        "medians": medians,
        "gemm_ceiling_tokens_per_s": ceiling,
        "fraction_of_ceiling": medians["moegen"] / ceiling,
        "best_transformers": best,
        "ratio_to_best_transformers": ratio,
    }  # fmt: skip
    if not args.only_ours:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
