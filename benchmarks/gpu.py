"""The GPU suite: whether a device's answers are a CPU's, what the machine can do, and how near to it large models run.

    make bench-gpu
    python -m benchmarks.gpu [--device cuda] [--stages equal probe mixtral qwen3 peers] [--out FOLDER]
    python -m benchmarks.gpu --tiny --device cpu    # every stage at sizes that take no time

Needs no network, and of packages only what the engine itself computes with (accelerate as a peer, where it is
installed). Models have random weights, made here (see `benchmarks.gpu_suite.random_checkpoint`). A stage ends within
its own limit, nine minutes at most, all of them within 25; each case is a process of its own, and what is found is
written at once, to gpu_<device>.json.

Stages:
    equal    tiny models of several families on the device: logits and greedy tokens, through every home of weights and
             of keys and values
    probe    the machine's rates: what the planner multiplies with
    mixtral  Mixtral-8x7B, the device's memory capped at 24 GiB, and not: tokens/s in the steady state, the bound, the
             plan's prediction
    qwen3    Qwen3-30B-A3B, likewise
    peers    Mixtral-8x7B within 24 GiB by the same engine restricted to model-based batching, and by accelerate
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from moegen.plan.machine import Machine

from benchmarks.gpu_suite.random_checkpoint import geometry, stored_bytes
from benchmarks.gpu_suite.setting import Setting, run_case, scratch_parent

CAP = "24GiB"
TINY_CAP = "2GiB"


@dataclass(frozen=True)
class Case:
    """A part of a stage."""

    name: str
    module: str  # of benchmarks.gpu_suite
    choice: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Cases that share a time limit, one after another."""

    name: str
    seconds: float
    cases: tuple[Case, ...]


def stages(tiny: bool) -> list[Stage]:
    """All of them, in order."""
    cap = TINY_CAP if tiny else CAP
    lengths = {"prompt": 24, "answer": 16} if tiny else {"prompt": 512, "answer": 256}

    def job(name: str, model: str, device_memory: str | None, **more: Any) -> Case:
        return Case(name, "job_case", {"geometry": model, "device_memory": device_memory, **lengths, **more})

    def accelerate(batch: int) -> Case:
        choice = {"geometry": "mixtral", "device_memory": cap, **lengths, "batch": batch}
        return Case(f"accelerate, batch {batch}", "accelerate_case", choice)

    few = 16 if tiny else 128
    return [
        Stage("equal", 180, (Case("equal", "equal_case"),)),
        Stage("probe", 100, (Case("probe", "probe_case"),)),
        Stage("mixtral", 480, (job("capped", "mixtral", cap), job("uncapped", "mixtral", None))),
        Stage("qwen3", 300, (job("capped", "qwen3", cap), job("uncapped", "qwen3", None))),
        Stage("peers", 440, (
            job(f"model-based, {few} tokens", "mixtral", cap, model_based=few),
            *([] if tiny else [job("model-based, 512 tokens", "mixtral", cap, model_based=512)]),
            accelerate(2 if tiny else 16),
            *([] if tiny else [accelerate(64)]),
        )),
    ]  # fmt: skip


class Results:
    """The document that the suite writes; what an earlier run of other stages has found stays in it."""

    def __init__(self, path: Path, machine: Machine, tiny: bool) -> None:
        self.path = path
        found: dict[str, Any] = json.loads(path.read_text())["stages"] if path.exists() else {}
        self.document: dict[str, Any] = {
            "device": machine.device_name,
            "cores": machine.cores,
            "host_memory_bytes": machine.host_memory_bytes,
            "device_memory_bytes": machine.device_memory_bytes,
            "versions": {
                "python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "tiny": tiny,
            "stages": found,
        }  # fmt: skip

    def keep(self, stage: str, case: str, found: dict[str, Any]) -> None:
        """Writes it down."""
        self.document["stages"].setdefault(stage, {})[case] = found
        self.document["ratios"] = self.ratios()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.document, indent=2) + "\n")

    def ratios(self) -> dict[str, float]:
        """moegen's tokens/s within the cap over each peer's."""
        found = self.document["stages"]
        ours = found.get("mixtral", {}).get("capped", {}).get("tokens_per_s")
        theirs = {name: case.get("tokens_per_s") for name, case in found.get("peers", {}).items()}
        return {name: ours / rate for name, rate in theirs.items() if ours and rate}


def line(stage: str, case: str, found: dict[str, Any]) -> str:
    """A case for people."""
    head = f"{stage:8s} {case:26s} {found['case_seconds']:6.1f} s  "
    if "failed" in found:
        return f"{head}failed: {found['failed']}"
    if "not_run" in found:
        return f"{head}not run: {found['not_run']}"
    if stage == "equal":
        return f"{head}{'equal' if found['equal'] else 'NOT EQUAL'}"
    if "tokens_per_s" not in found:
        return head
    text = f"{head}{found['tokens_per_s']:9.1f} generated tokens/s"
    if "bound_by_capacity" in found:
        capacity, traffic = found["bound_by_capacity"], found["bound_by_traffic"]
        text += f", {capacity['fraction']:.0%} of {capacity['tokens_per_s']:,.1f} ({capacity['binding']})"
        text += f", {traffic['fraction']:.0%} of what was moved ({traffic['binding']})"
        if found["plan_error"] is not None:
            text += f"; predicted {found['predicted_tokens_per_s']:,.1f} ({found['plan_error']:+.1%})"
    return text


def run(chosen: list[Stage], results: Results, device: str, tiny: bool, whole_s: float) -> bool:
    """Every case of the stages; whether none failed and all was equal."""
    until, fine = time.monotonic() + whole_s, True
    needed = sum(stored_bytes(geometry(name, tiny)) for name in ("mixtral", "qwen3"))
    with tempfile.TemporaryDirectory(prefix="moegen-bench-weights-", dir=scratch_parent(needed)) as scratch:
        for stage in chosen:
            end = min(time.monotonic() + stage.seconds, until)
            for number, case in enumerate(stage.cases):
                share = (end - time.monotonic()) / (len(stage.cases) - number)
                setting = Setting(device, tiny, scratch, str(results.path.absolute()), max(share, 1.0), case.choice)
                found = run_case(case.module, setting)
                results.keep(stage.name, case.name, found)
                print(line(stage.name, case.name, found), flush=True)
                fine &= "failed" not in found and found.get("equal", True)
    return fine


def main() -> None:
    names = [stage.name for stage in stages(tiny=False)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--stages", nargs="+", default=names, choices=names)
    parser.add_argument("--tiny", action="store_true", help="sizes that take no time, to see that everything runs")
    parser.add_argument("--seconds", type=float, default=1500, help="for all stages together")
    parser.add_argument("--stage-seconds", type=float, help="for each stage, instead of its own limit")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    args = parser.parse_args()
    machine = Machine.detect(args.device)
    label = "cpu" if machine.device == "cpu" else re.sub(r"\W+", "_", machine.device_name).strip("_")
    results = Results(args.out / f"gpu_{label}.json", machine, args.tiny)
    limits = {"seconds": args.stage_seconds} if args.stage_seconds else {}
    chosen = [replace(stage, **limits) for stage in stages(args.tiny) if stage.name in args.stages]
    fine = run(chosen, results, args.device, args.tiny, args.seconds)
    for name, ratio in results.document.get("ratios", {}).items():
        print(f"moegen / {name}: {ratio:.2f}")
    print(f"written to {results.path}")
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
