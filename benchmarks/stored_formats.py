"""One model in bfloat16, in 8 and in 4 bits, with three times its memory budget on disk: what few bits are worth there.

A Qwen3-MoE geometry of 2.4 G expert weights (4.5 GiB in bfloat16) runs within 1.5 GiB, page cache counted, in a memory
cgroup; every format on the same rows, each turn a process of its own. Only experts are in few bits. Bytes
read, and what they cost at the disk's rate measured in this run, stand beside each rate. Needs root.

    python benchmarks/stored_formats.py --folder DISK [--formats bf16 fp8 int8 int4 awq gptq] [--rows 96]
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

from cgroup import Cgroup
from moegen.plan.machine import Machine
from moegen.run.machine_rates import disk_bytes_per_s
from stored_checkpoint import Stored, formats
from turn import Outcome, Row
from way import Way

GEOMETRY = Qwen3MoeConfig(
    architectures=["Qwen3MoeForCausalLM"],
    dtype="bfloat16",
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=64,
    num_experts_per_tok=4,
    moe_intermediate_size=512,
    intermediate_size=512,
    norm_topk_prob=True,
    vocab_size=8_000,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
WANTED = {"fp8": 1.7, "int8": 1.7, "int4": 2.8, "awq": 2.8, "gptq": 2.8}  # times bfloat16
_READERS = (1, 2, 3)


def save_checkpoint(folder: Path, name: str) -> None:
    """Random weights as hubs store them, a file per layer; all layers have the same, as making them takes long."""
    folder.mkdir(parents=True)
    index: dict[str, str] = {}

    def save(file: str, tensors: Stored) -> None:
        save_file(tensors, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    layer = _layer(name)
    for number in range(GEOMETRY.num_hidden_layers):
        own = {f"model.layers.{number}.{key}": tensor for key, tensor in layer.items()}
        save(f"model-{number:05d}.safetensors", own)
    table = torch.randn(GEOMETRY.vocab_size, GEOMETRY.hidden_size).mul_(0.02).bfloat16()
    ends = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    save("model-ends.safetensors", {**ends, "model.norm.weight": torch.ones(GEOMETRY.hidden_size).bfloat16()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    GEOMETRY.save_pretrained(folder)
    if name != "bf16":
        config = json.loads((folder / "config.json").read_text())
        text = json.dumps({**config, "quantization_config": formats()[name].config})
        (folder / "config.json").write_text(text)


def _layer(name: str) -> Stored:
    """One layer's tensors, by their names below the layer."""
    generator = torch.Generator().manual_seed(0)
    hidden, width, head = GEOMETRY.hidden_size, GEOMETRY.moe_intermediate_size, GEOMETRY.head_dim

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    heads = {"q": GEOMETRY.num_attention_heads, "k": GEOMETRY.num_key_value_heads, "v": GEOMETRY.num_key_value_heads}
    tensors = {f"self_attn.{key}_proj.weight": random(count * head, hidden) for key, count in heads.items()}
    tensors["self_attn.o_proj.weight"] = random(hidden, heads["q"] * head)
    tensors |= {f"self_attn.{key}_norm.weight": torch.ones(head) for key in ("q", "k")}
    tensors |= {f"{key}_layernorm.weight": torch.ones(hidden) for key in ("input", "post_attention")}
    tensors["mlp.gate.weight"] = random(GEOMETRY.num_experts, hidden)
    stored = {key: tensor.bfloat16() for key, tensor in tensors.items()}
    for expert in range(GEOMETRY.num_experts):
        for key, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            matrix = f"mlp.experts.{expert}.{key}_proj"
            weight = random(*shape)
            stored |= (
                {f"{matrix}.weight": weight.bfloat16()} if name == "bf16" else formats()[name].store(matrix, weight)[0]
            )
    return {key: tensor.contiguous() for key, tensor in stored.items()}


def rows_of(count: int, prompt_tokens: int, answer_tokens: int) -> list[Row]:
    rng = np.random.default_rng(0)
    return [Row(rng.integers(1, GEOMETRY.vocab_size, prompt_tokens).tolist(), answer_tokens) for _ in range(count)]


def turn(name: str, folder: Path, rows: list[Row], budget: int, limit_s: float) -> dict[str, Any]:
    """One format's rate, and what it read."""
    checkpoint = folder / name
    disk_rate = max(disk_bytes_per_s(str(checkpoint), _READERS).values())
    settings = {"host_memory": f"{budget / (1 << 30)}GiB"}
    with Cgroup(budget) as cgroup:
        way = Way("moegen", name, "moegen_engine", settings, cgroup=cgroup, warm_tokens=1)
        outcome: Outcome = way.take_turn(checkpoint, rows, limit_s)
        peak = cgroup.peak_bytes
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    plan = outcome.figures["plan"]
    found = {
        "tokens_per_s": sum(row.answer_tokens for row in rows) / outcome.seconds,
        "seconds": outcome.seconds,
        "open_seconds": outcome.open_seconds,
        "weights_bytes": weights,
        "disk_bytes": outcome.figures["disk_bytes"],
        "disk_bytes_per_s": disk_rate,
        "disk_share": outcome.figures["disk_bytes"] / disk_rate / outcome.seconds,
        "waited_seconds": outcome.figures["waited_seconds"],
        "passes": outcome.figures["passes"],
        "resident_groups": f"{plan['resident_groups']} of {plan['groups']}",
        "peak_bytes": peak,
    }
    print(f"{name:6s} {found['tokens_per_s']:8.1f} generated tokens/s  {outcome.seconds:6.1f} s  "
          f"{found['disk_bytes'] / 1e9:6.1f} GB read, {found['disk_share']:.0%} of the time at the disk's "
          f"{disk_rate / 1e9:.2f} GB/s", flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; has or gets checkpoints")
    parser.add_argument("--formats", nargs="*", default=["bf16", *WANTED], choices=["bf16", *WANTED, "gptq8"])
    parser.add_argument("--make-only", action="store_true", help="write the checkpoints and measure nothing")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--answer-tokens", type=int, default=8)
    parser.add_argument("--budget-gib", type=float, default=1.5)
    parser.add_argument("--turn-limit", type=float, default=300, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stored_formats.json")
    args = parser.parse_args()
    for name in args.formats:
        if not (args.folder / name).exists():
            save_checkpoint(args.folder / name, name)
    if args.make_only:
        return
    rows = rows_of(args.rows, args.prompt_tokens, args.answer_tokens)
    budget = int(args.budget_gib * (1 << 30))
    settings = {
        "rows": args.rows, "prompt_tokens": args.prompt_tokens, "answer_tokens": args.answer_tokens,
        "budget_bytes": budget,
    }  # fmt: skip
    turns = earlier_turns(args.out, settings)
    for name in args.formats:
        turns[name] = turn(name, args.folder, rows, budget, args.turn_limit)
        write(args.out, settings, turns)


def earlier_turns(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a run that was cut into windows: the same machine, the same settings."""
    found = json.loads(out.read_text()) if out.exists() else {}
    same = found.get("settings") == settings and found.get("machine") == machine()
    return dict(found["formats"]) if same else {}


def machine() -> dict[str, str]:
    return {"name": Machine.detect("cpu").device_name, "python": platform.python_version()}


def write(out: Path, settings: dict[str, Any], turns: dict[str, Any]) -> None:
    """The turns so far, with their ratios to bfloat16."""
    plain = turns.get("bf16", {}).get("tokens_per_s")
    for name, found in turns.items():
        found["ratio_to_bf16"] = found["tokens_per_s"] / plain if plain else None
        if plain and name in WANTED:
            print(f"{name:6s} {found['ratio_to_bf16']:.2f} times bf16 (at least {WANTED[name]} wanted)")
    result = {"machine": machine(), "settings": settings, "formats": turns}
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
