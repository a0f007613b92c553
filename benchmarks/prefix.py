"""What it is worth that prompts begin alike: 500 rows with a common beginning of 1,000 tokens, shared and not shared.

A model of random weights, the job's own worker from table to table, `engine.plan.share_prefix` on and off in turns of
one run; what is compared are medians of rows per second over the passes of each job, loading left out. The answers of
all turns must be the same.

    python -m benchmarks.prefix [--rows 500] [--prefix-tokens 1000] [--rounds 2]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from moegen.job.worker import run_job
from moegen.plan.machine import Machine
from moegen.spec import JobSpec

from tests.tiny import tiny_checkpoint

GEOMETRY = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "intermediate_size": 128,
    "max_position_embeddings": 2048, "initializer_range": 0.08,
}  # fmt: skip
OWN_TOKENS = (10, 60)  # of a prompt behind the common beginning


def save_table(path: Path, rows: int, prefix_tokens: int) -> None:
    """Token ids: a beginning of random ones for all, then each row's own."""
    dice = random.Random(7)
    beginning = [dice.randrange(256) for _ in range(prefix_tokens)]
    own = [[dice.randrange(256) for _ in range(dice.randint(*OWN_TOKENS))] for _ in range(rows)]
    pq.write_table(pa.table({"ids": pa.array([beginning + each for each in own], pa.list_(pa.int32()))}), path)


def turn(folder: Path, name: str, answer_tokens: int, share: bool) -> tuple[dict[str, Any], pa.Table]:
    """One job: its figures, and its answers."""
    output = folder / name
    spec = JobSpec.from_mapping(
        {
            "input": {"uri": str(folder / "in.parquet"), "columns": []},
            "prompt": {"token_ids_column": "ids"},
            "model": {"uri": str(folder / "model")},
            "sampling": {"max_tokens": answer_tokens, "ignore_eos": True},
            "output": {"uri": str(output), "include": ["token_ids"]},
            "engine": {"device": "cpu", "plan": {"share_prefix": share}},
        }
    )
    manifest = run_job(spec)
    (attempt,) = json.loads((output / "_stats.json").read_text())["attempts"]
    total, plan = attempt["total"], attempt["plan"]
    figures = {
        "rows_per_s": manifest.rows / total["seconds"],
        "seconds": total["seconds"],
        "tokens_computed": total["tokens"],
        "passes": total["passes"],
        "prefix_tokens": plan["prefix_tokens"],
        "pass_tokens": plan["pass_tokens"],
        "kv_pages": plan["kv_pages"],
    }
    return figures, pa.concat_tables(pq.read_table(part) for part in sorted(output.glob("part-*")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--prefix-tokens", type=int, default=1000)
    parser.add_argument("--answer-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "prefix.json")
    args = parser.parse_args()
    machine = Machine.detect("cpu")
    with tempfile.TemporaryDirectory(prefix="moegen-bench-") as name:
        folder = Path(name)
        tiny_checkpoint(folder / "model", seed=3, **GEOMETRY)
        save_table(folder / "in.parquet", 4, args.prefix_tokens)
        turn(folder, "warm-up", 2, share=True)  # kernels are compiled
        save_table(folder / "in.parquet", args.rows, args.prefix_tokens)
        figures: dict[str, list[dict[str, Any]]] = {"shared": [], "apart": []}
        answers: list[pa.Table] = []
        for number in range(args.rounds):
            for way in figures:
                figure, table = turn(folder, f"{way}-{number}", args.answer_tokens, share=way == "shared")
                figures[way].append(figure)
                answers.append(table)
                print(
                    f"{way:7s} {figure['rows_per_s']:8.1f} rows/s, {figure['tokens_computed']} tokens computed",
                    flush=True,
                )
    medians = {way: statistics.median(one["rows_per_s"] for one in turns) for way, turns in figures.items()}
    result = {
        "machine": {"cpu": machine.device_name, "cores": machine.cores, "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__},
        "rows": args.rows,
        "prefix_tokens": args.prefix_tokens,
        "own_tokens": OWN_TOKENS,
        "answer_tokens": args.answer_tokens,
        "turns": figures,
        "answers_equal": all(table.equals(answers[0]) for table in answers),
        "distinct_answers": len({tuple(ids) for ids in answers[0]["token_ids"].to_pylist()}),
        "ratio": medians["shared"] / medians["apart"],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"shared / apart = {result['ratio']:.2f}, answers equal: {result['answers_equal']} "
          f"({result['distinct_answers']} different ones of {args.rows})")  # fmt: skip
    if not result["answers_equal"]:
        raise SystemExit("the answers differ")


if __name__ == "__main__":
    main()
