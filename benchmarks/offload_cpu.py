"""A model of about 7 GiB within 2.5 GiB of memory, on a CPU: moegen beside accelerate's disk offload.

Both run in a memory cgroup of that size, page cache counted, in processes of their own, on the same rows; moegen also
runs once outside with everything resident, whose answers must be the same. The bound is what disk and arithmetic allow,
both measured in this run: max(bytes streamed / disk rate, operations / GEMM rate). Needs root, for the cgroup.

    python benchmarks/offload_cpu.py --folder DISK [--rows 2400] [--budget-gib 2.5]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from ceiling import gemm_peaks, needed_flops
from cgroup import Cgroup
from environment import PeerUnavailable
from machine import probe_machine
from moegen.plan.machine import Machine
from moegen.run.machine_rates import disk_bytes_per_s
from turn import Outcome, Row
from way import Way

GEOMETRY = Qwen3MoeConfig(
    architectures=["Qwen3MoeForCausalLM"],
    dtype="bfloat16",
    hidden_size=1024,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    num_experts=64,
    num_experts_per_tok=4,
    moe_intermediate_size=1216,
    intermediate_size=1216,
    norm_topk_prob=True,
    vocab_size=32_000,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
_READERS = (1, 2, 3)


def save_checkpoint(folder: Path) -> None:
    """Random weights in the names in which hubs store them, a file per layer, never more than one in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}

    def save(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            key: (torch.randn(shape, generator=generator) * 0.02).bfloat16() if len(shape) > 1 else torch.ones(shape)
            for key, shape in shapes.items()
        }
        save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    hidden, heads = GEOMETRY.hidden_size, {"q": 16, "k": 4, "v": 4}
    for layer in range(GEOMETRY.num_hidden_layers):
        at = f"model.layers.{layer}"
        shapes: dict[str, tuple[int, ...]] = {
            f"{at}.self_attn.{name}_proj.weight": (count * GEOMETRY.head_dim, hidden) for name, count in heads.items()
        }
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, heads["q"] * GEOMETRY.head_dim)
        shapes |= {f"{at}.self_attn.{name}_norm.weight": (GEOMETRY.head_dim,) for name in ("q", "k")}
        shapes |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes[f"{at}.mlp.gate.weight"] = (GEOMETRY.num_experts, hidden)
        for expert in range(GEOMETRY.num_experts):
            wide, narrow = (GEOMETRY.moe_intermediate_size, hidden), (hidden, GEOMETRY.moe_intermediate_size)
            for name, shape in (("gate", wide), ("up", wide), ("down", narrow)):
                shapes[f"{at}.mlp.experts.{expert}.{name}_proj.weight"] = shape
        save(f"model-{layer:05d}.safetensors", shapes)
    table = (GEOMETRY.vocab_size, hidden)
    save(
        "model-ends.safetensors",
        {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,), "lm_head.weight": table},
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    GEOMETRY.save_pretrained(folder)


def same_length_rows(count: int, prompt_tokens: int, answer_tokens: int) -> list[Row]:
    """Of equal length, so that padding costs the peer nothing."""
    rng = np.random.default_rng(0)
    return [Row(rng.integers(1, GEOMETRY.vocab_size, prompt_tokens).tolist(), answer_tokens) for _ in range(count)]


def attempt(way: Way, checkpoint: Path, rows: list[Row], limit_s: float) -> Outcome | str:
    """The outcome, or why there is none."""
    try:
        outcome = way.take_turn(checkpoint, rows, limit_s)
    except PeerUnavailable as error:
        print(f"{way.name:45s} not run: {error}", flush=True)
        return str(error)
    rate = sum(row.answer_tokens for row in rows) / outcome.seconds
    print(f"{way.name:45s} {rate:8.2f} generated tokens/s  {outcome.seconds:7.1f} s  ({len(rows)} rows)", flush=True)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; has or gets the checkpoint")
    parser.add_argument("--rows", type=int, default=2400)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--budget-gib", type=float, default=2.5)
    parser.add_argument("--batches", type=int, nargs="*", default=[256, 384], help="of the peer, one of rows each")
    parser.add_argument("--turn-limit", type=float, default=900, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "offload_cpu.json")
    args = parser.parse_args()

    checkpoint = args.folder / "checkpoint"
    if not (checkpoint / "config.json").exists():
        save_checkpoint(checkpoint)
    probe_machine(checkpoint)
    budget = int(args.budget_gib * (1 << 30))
    rows = same_length_rows(args.rows, args.prompt_tokens, args.answer_tokens)
    disk_rates = [max(disk_bytes_per_s(str(checkpoint), _READERS).values())]
    gemm_rate = max(gemm_peaks().values())
    settings = {"host_memory": f"{args.budget_gib}GiB"}
    with Cgroup(budget) as cgroup:
        streamed = attempt(
            Way("moegen", "streamed", "moegen_engine", settings, cgroup=cgroup, warm_tokens=1),
            checkpoint,
            rows,
            args.turn_limit,
        )
        peak = cgroup.peak_bytes
    disk_rates.append(max(disk_bytes_per_s(str(checkpoint), _READERS).values()))  # a shared disk's changes
    whole = attempt(Way("moegen", "resident", "moegen_engine"), checkpoint, rows, args.turn_limit)
    peers: dict[str, Any] = {}
    for batch in args.batches:
        choice = {
            "batch": batch,
            "dtype": "bfloat16",
            "cpu_memory": f"{args.budget_gib / 3:.2f}GiB",
            "folder": str(args.folder),
        }
        with Cgroup(budget) as cgroup:
            way = Way(
                "accelerate", f"disk offload, batch {batch}", "accelerate_offload", choice, cgroup=cgroup, warm_tokens=1
            )
            outcome = attempt(way, checkpoint, rows[:batch], args.turn_limit)
        made = min(batch, len(rows)) * args.answer_tokens
        peers[way.name] = outcome if isinstance(outcome, str) else {"tokens_per_s": made / outcome.seconds}
    result = summary(rows, streamed, whole, peers, max(disk_rates), gemm_rate, peak, budget)
    print(json.dumps({key: value for key, value in result.items() if key != "plan"}, indent=2))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


def summary(
    rows: list[Row], streamed: Outcome | str, whole: Outcome | str, peers: dict[str, Any], disk_rate: float,
    gemm_rate: float, peak: int, budget: int,
) -> dict[str, Any]:  # fmt: skip
    """Both sides, the bound, and how near each must-show is."""
    about = {
        "machine": {"name": Machine.detect("cpu").device_name, "python": platform.python_version()},
        "rows": len(rows),
        "prompt_tokens": len(rows[0].token_ids),
        "answer_tokens": rows[0].answer_tokens,
        "budget_bytes": budget,
        "peak_bytes": peak,
        "disk_bytes_per_s": disk_rate,
        "gemm_flops_per_s": gemm_rate,
        "peers": peers,
    }
    if isinstance(streamed, str):
        return about | {"moegen": streamed}
    made = sum(row.answer_tokens for row in rows)
    disk_s = streamed.figures["disk_bytes"] / disk_rate
    flops_s = needed_flops(GEOMETRY, rows) / gemm_rate
    best = max((peer["tokens_per_s"] for peer in peers.values() if isinstance(peer, dict)), default=None)
    return about | {
        "seconds": streamed.seconds,
        "tokens_per_s": made / streamed.seconds,
        "resident_tokens_per_s": None if isinstance(whole, str) else made / whole.seconds,
        "answers_equal_resident": None if isinstance(whole, str) else streamed.answers == whole.answers,
        "bound_seconds": {"disk": disk_s, "arithmetic": flops_s},
        "fraction_of_bound": max(disk_s, flops_s) / streamed.seconds,
        "ratio_to_accelerate": best and made / streamed.seconds / best,
        "passes": streamed.figures["passes"],
        "waited_seconds": streamed.figures["waited_seconds"],
        "plan": streamed.figures["plan"],
    }


if __name__ == "__main__":
    main()
