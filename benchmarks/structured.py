"""What answers of a given form cost: constrained beside free decoding, in one run, and how many are valid.

A model of random weights, a tokenizer with a real vocabulary (byte-level BPE, trained on Python's own sources) and
three schemas: enum fields, a nested object with an array, a union. A first turn answers all rows of one schema, bound
to it and sampled: its answers are judged, by the library `jsonschema` and not by the one that made the masks. Then
pieces of these rows are answered in turn, bound and free, every row with as many tokens as its first answer had: both
ways know the lengths beforehand, for who knows them wastes less of its passes. Generated tokens per second are
compared over all pieces; the order of the two ways changes from piece to piece.

    python -m benchmarks.structured [--rows 2000] [--rounds 2] [--schemas NAME ...]
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moegen.cores import share_cores

share_cores()  # as every command does, before torch is imported

import jsonschema
import llguidance
import numpy as np
import torch
from moegen.answer.form import Form
from moegen.plan.machine import Machine
from moegen.plan.search import choose_plan
from moegen.plan.workload import Workload
from moegen.row import Status
from moegen.run.engine import Engine
from moegen.schedule.sequence import Finished, Request
from moegen.shape import ModelShape
from moegen.spec import Engine as EngineSpec
from moegen.spec import JobSpec, Sampling
from moegen.text import Tokenizer

VOCABULARY = 32_000
GEOMETRY = {
    "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
    "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 384, "intermediate_size": 384,
    "norm_topk_prob": True, "vocab_size": VOCABULARY, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": VOCABULARY - 1,
}  # fmt: skip
_TEXT = {"type": "string", "maxLength": 40}  # a model of random weights ends no string of its own accord
SCHEMAS: dict[str, dict[str, Any]] = {
    "enum fields": {
        "type": "object",
        "properties": {
            "topic": {"enum": ["billing", "delivery", "account", "other"]},
            "urgency": {"enum": ["low", "normal", "high"]},
            "sentiment": {"enum": ["negative", "neutral", "positive"]},
            "refund": {"type": "boolean"},
        },
        "required": ["topic", "urgency", "sentiment", "refund"],
        "additionalProperties": False,
    },
    "nested object with an array": {
        "type": "object",
        "properties": {
            "customer": {
                "type": "object",
                "properties": {"name": _TEXT, "orders": {"type": "integer", "minimum": 0, "maximum": 9999}},
                "required": ["name", "orders"],
                "additionalProperties": False,
            },
            "items": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "sku": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
                        "damaged": {"type": "boolean"},
                    },
                    "required": ["sku", "damaged"],
                    "additionalProperties": False,
                },
                "maxItems": 4,
            },
        },
        "required": ["customer", "items"],
        "additionalProperties": False,
    },
    "union": {
        "anyOf": [
            {"type": "object", "properties": {"answer": _TEXT}, "required": ["answer"], "additionalProperties": False},
            {
                "type": "object",
                "properties": {"refused": {"const": True}, "reason": {"enum": ["policy", "unclear"]}},
                "required": ["refused", "reason"],
                "additionalProperties": False,
            },
        ]
    },
}
MAX_TOKENS = 160
PIECES = 3  # of a schema's rows: what the machine does to others meanwhile meets both ways alike


@dataclass(frozen=True)
class Turn:
    """All rows of one schema, once."""

    seconds: float
    tokens: int
    rows: dict[int, Finished]

    @property
    def tokens_per_s(self) -> float:
        """Generated, end tokens included."""
        return self.tokens / self.seconds


def save_checkpoint(folder: Path) -> None:
    from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**GEOMETRY))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
    model.generation_config = GenerationConfig(eos_token_id=VOCABULARY - 1)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Trained(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 1, initial_alphabet=alphabet, show_progress=False)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))
    tokenizer.train_from_iterator((path.read_text(errors="ignore") for path in sources), trainer)
    missing = VOCABULARY - 1 - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"unused{i}" for i in range(missing)])
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def requests(rows: int, seed: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4.0, 0.6, rows), 4, 300).astype(int)
    return [
        Request(row, tuple(rng.integers(0, VOCABULARY - 1, length).tolist()),
                Sampling(max_tokens=MAX_TOKENS, temperature=1.0, seed=1))
        for row, length in enumerate(lengths)
    ]  # fmt: skip


def take(engine: Engine, asked: Sequence[Request]) -> Turn:
    started = time.perf_counter()
    rows = {item.row_index: item for item in engine.generate(asked) if isinstance(item, Finished)}
    seconds = time.perf_counter() - started
    return Turn(seconds, sum(len(row.token_ids) for row in rows.values()), rows)


def form_of(schema: dict[str, Any], tokenizer: Tokenizer) -> Form:
    unused = {"input": {"uri": "-"}, "prompt": {"column": "-"}, "model": {"uri": "-"}, "output": {"uri": "none"}}
    form = Form.of(JobSpec.from_mapping({**unused, "sampling": {"max_tokens": 1}, "output_schema": schema}), tokenizer)
    assert form is not None
    return form


def judged(schema: dict[str, Any], form: Form, rows: dict[int, Finished]) -> dict[str, int]:
    """How many rows are valid, honestly cut, or (this must be none) neither."""
    counts = Counter({"valid": 0, "length": 0, "invalid": 0})
    for row in rows.values():
        if row.status is Status.LENGTH:
            counts["length"] += 1
            continue
        try:
            jsonschema.validate(json.loads(row.text), schema)
            form.value(row.text)
        except (ValueError, jsonschema.ValidationError):
            counts["invalid"] += 1
        else:
            counts["valid"] += 1
    return dict(counts)


def compare(engine: Engine, name: str, asked: Sequence[Request], rounds: int) -> dict[str, Any]:
    """Bound and free turns, alternating."""
    schema, tokenizer = SCHEMAS[name], engine.tokenizer
    assert tokenizer is not None
    compiling = time.perf_counter()
    form = form_of(schema, tokenizer)
    compile_s = time.perf_counter() - compiling
    bound_requests = [replace(request, grammar=form.grammar) for request in asked]
    take(engine, bound_requests[:8])
    first = take(engine, bound_requests)
    ways: dict[str, list[Request]] = {"bound": [], "free": []}
    for request in bound_requests:
        params = replace(request.params, max_tokens=len(first.rows[request.row_index].token_ids))
        ways["bound"].append(replace(request, params=params))
        ways["free"].append(replace(request, params=replace(params, ignore_eos=True), grammar=None))
    turns: dict[str, list[Turn]] = {way: [] for way in ways}
    for number in range(rounds * PIECES):
        for way in sorted(ways, reverse=number % 2 == 1):
            turns[way].append(take(engine, ways[way][number % PIECES :: PIECES]))
    again = [(row, found) for turn in turns["bound"] for row, found in turn.rows.items()]
    same = sum(found.token_ids == first.rows[row].token_ids for row, found in again)
    seconds = {way: [turn.seconds for turn in own] for way, own in turns.items()}
    rates = {way: sum(turn.tokens for turn in own) / sum(seconds[way]) for way, own in turns.items()}
    ratio = rates["bound"] / rates["free"]
    found = {
        "rows": len(asked),
        **judged(schema, form, first.rows),
        "tokens": first.tokens,
        "compile_s": compile_s,
        "first_tokens_per_s": first.tokens_per_s,
        "same_answers_in_pieces": same / len(again),
        "tokens_per_s": rates,
        "seconds_of_pieces": seconds,
        "ratio": ratio,
    }
    judgement = f"{found['valid']} valid, {found['length']} cut, {found['invalid']} invalid"
    speeds = f"{rates['bound']:.1f} and {rates['free']:.1f} tokens/s"
    print(f"{name:30s} {judgement}; bound / free = {ratio:.3f} ({speeds}), {same} of {len(again)} again", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000, help="over the three schemas")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--schemas", nargs="*", choices=list(SCHEMAS), default=list(SCHEMAS), metavar="NAME")
    parser.add_argument(
        "--checkpoint", type=Path, help="one that an earlier run left in this folder, or a new one there"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "structured.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moegen-bench-") as folder:
        checkpoint = args.checkpoint or Path(folder)
        if not (checkpoint / "tokenizer.json").exists():
            checkpoint.mkdir(parents=True, exist_ok=True)
            save_checkpoint(checkpoint)
        machine = Machine.detect("cpu")
        rows = [len(range(i, args.rows, len(SCHEMAS))) for i in range(len(SCHEMAS))]
        plan = choose_plan(
            ModelShape.read(str(checkpoint)), machine, EngineSpec(device="cpu"), "auto",
            Workload.of(rows[0], (60,), (40, MAX_TOKENS)),
        )  # fmt: skip
        results: dict[str, Any] = {
            "machine": {"cpu": machine.device_name, "cores": machine.cores},
            "versions": {"torch": torch.__version__, "llguidance": llguidance.__version__},
            "vocabulary": VOCABULARY,
            "plan": {
                k: v for k, v in asdict(plan).items() if k in ("threads", "pass_tokens", "kv_pages", "page_tokens")
            },
            "schemas": {},
        }
        with Engine.open(str(checkpoint), plan, tokenizer=Tokenizer(checkpoint)) as engine:
            for (name, count), seed in zip(zip(SCHEMAS, rows, strict=True), range(len(SCHEMAS)), strict=True):
                if name not in args.schemas:
                    continue
                results["schemas"][name] = compare(engine, name, requests(count, seed), args.rounds)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
