"""Predicted against measured generated tokens/s: what `moegen plan` says before a job, beside what the job then does.

Three geometries of random weights, memory budgets from everything resident to one eighth of the expert weights, short
and long prompts and answers. Every number comes from the shipped commands: for each case `moegen probe`, then
`moegen plan` (the prediction), then `moegen run` (measured, from the first pass to the last).

With `--disk-bytes-per-s`, probes and jobs read from a disk that gives no more than that (a cgroup holds it, which needs
root): what is compared is then the planner, not a shared disk's minutes.

    python -m benchmarks.planner [--seconds 25] [--only small] [--shares 1 0.5] [--disk-bytes-per-s 600e6]
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from moegen.plan.machine import Machine

from benchmarks.peers.cgroup import Cgroup
from tests.tiny import tiny_tokenizer

VOCAB_SIZE = 8192
GEOMETRIES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "num_experts": 64, "num_experts_per_tok": 4,
              "moe_intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "deep": {"hidden_size": 1024, "num_hidden_layers": 12, "num_experts": 32, "num_experts_per_tok": 4,
             "moe_intermediate_size": 384, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64},
    "wide": {"hidden_size": 2048, "num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 2,
             "moe_intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128},
}  # fmt: skip
LENGTHS = {"short": ((16, 112), (8, 48)), "long": ((256, 768), (16, 96))}  # of prompts and of answers, in tokens
SHARES = (1.0, 0.5, 0.25, 0.125)  # of the expert weights that the budget leaves room for
SEQUENCES = 256  # that the budget leaves pages for


@dataclass(frozen=True)
class Case:
    """One job."""

    geometry: str
    share: float
    lengths: str

    @property
    def name(self) -> str:
        """For people, and for the case's folders."""
        return f"{self.geometry}, {self.share:g} of the experts, {self.lengths}"


def cases() -> Iterator[Case]:
    """Every geometry with every budget, the lengths in turn."""
    for i, geometry in enumerate(GEOMETRIES):
        for j, share in enumerate(SHARES):
            yield Case(geometry, share, ("short", "long")[(i + j) % 2])


def save_checkpoint(folder: Path, geometry: dict[str, int]) -> None:
    from transformers import Qwen3MoeConfig

    from benchmarks.random_checkpoint import save_random_checkpoint

    config = Qwen3MoeConfig(
        **geometry, intermediate_size=geometry["moe_intermediate_size"], vocab_size=VOCAB_SIZE, norm_topk_prob=True,
        max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    save_random_checkpoint(folder, config)
    tiny_tokenizer(folder)


def write_table(path: Path, rows: int, lengths: str) -> None:
    """Token ids and each row's own max_tokens."""
    rng = np.random.default_rng(0)
    (least, most), (fewest, longest) = LENGTHS[lengths]
    prompts = [rng.integers(0, 250, size).tolist() for size in rng.integers(least, most + 1, rows)]
    answers = rng.integers(fewest, longest + 1, rows)
    pq.write_table(pa.table({"ids": prompts, "max_tokens": pa.array(answers, pa.int32())}), path)


class Bench:
    """Runs the command in a folder that holds the checkpoints, the tables and the outputs."""

    def __init__(self, folder: Path, cgroup: Cgroup, seconds: float) -> None:
        self.folder, self.cgroup, self.seconds = folder, cgroup, seconds

    def moegen(self, *arguments: str) -> dict[str, Any]:
        """What the command prints as JSON."""
        command = self.cgroup.command([sys.executable, "-m", "moegen", *arguments, "--json"])
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{shlex.join(map(str, command))} ended with {done.returncode}: {done.stdout}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def run(self, case: Case) -> dict[str, Any]:
        """Predicts, runs, compares."""
        job = self._job(case)
        predicted = self.moegen("plan", str(job))
        self.moegen("run", str(job))
        stats = json.loads((self.folder / "out" / case.name / "_stats.json").read_text())["attempts"][-1]
        total = stats["total"]
        measured = total["generated_tokens"] / total["seconds"]
        promised = predicted["prediction"]
        return {
            **asdict(case),
            "predicted_tokens_per_s": promised["generated_tokens_per_s"],
            "measured_tokens_per_s": measured,
            "error": promised["generated_tokens_per_s"] / measured - 1,
            "binding": promised["binding"],
            "predicted_seconds": promised["seconds"],
            "measured_seconds": total["seconds"],
            "predicted_passes": promised["passes"],
            "measured_passes": total["passes"],
            "predicted_seconds_by_term": promised["seconds_by_term"],
            "host_memory": predicted["host"]["budget"],
            "peak_rss_bytes": stats["peak_rss_bytes"],
            "plan": {k: predicted[k] for k in ("groups", "resident_groups", "stream_slots", "pass_tokens", "kv_pages")},
        }

    def _job(self, case: Case) -> Path:
        """The job's file, with as many rows as are predicted to take the wanted time."""
        folder = self.folder / "jobs" / case.name
        folder.mkdir(parents=True, exist_ok=True)
        job, table = folder / "job.json", folder / "table.parquet"
        job.write_text(json.dumps({
            "input": {"uri": str(table)}, "prompt": {"token_ids_column": "ids"},
            "model": {"uri": str(self.folder / case.geometry)},
            "sampling": {"max_tokens": 1, "param_columns": ["max_tokens"], "ignore_eos": True},
            "output": {"uri": str(self.folder / "out" / case.name), "mode": "new_run"},
            "engine": {"device": "cpu", "host_memory": str(self._budget(case))},
        }))  # fmt: skip
        rows = 2 * SEQUENCES
        for _ in range(3):
            write_table(table, rows, case.lengths)
            rows = max(round(rows * self.seconds / self.moegen("plan", str(job))["prediction"]["seconds"]), 32)
        write_table(table, rows, case.lengths)
        return job

    def _budget(self, case: Case) -> int:
        """What everything but experts needs, with pages for `SEQUENCES` mean rows, and the share of the experts."""
        model = str(self.folder / case.geometry)
        whole = self.moegen("plan", "--model", model, "--set", "engine.device=cpu")
        page_bytes = whole["host"]["kv"] / whole["kv_pages"] / whole["page_tokens"]
        context = sum(sum(span) / 2 for span in LENGTHS[case.lengths])
        rest = whole["host"]["runtime"] + whole["host"]["dense"] + (192 << 20) + SEQUENCES * context * page_bytes
        return int(rest + case.share * whole["host"]["experts"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=25, help="that a case should take, about")
    parser.add_argument("--only", nargs="+", default=list(GEOMETRIES), choices=GEOMETRIES)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument(
        "--probe", choices=("once", "always", "never"), default="always",
        help="before all cases, before each of them (a shared machine's speed wanders), or not at all",
    )  # fmt: skip
    parser.add_argument(
        "--disk-bytes-per-s", type=lambda text: int(float(text)), metavar="RATE", help="hold it to that"
    )
    parser.add_argument("--folder", type=Path, help="keep checkpoints here, for later runs (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "planner.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moegen-planner-") as temporary:
        folder = args.folder or Path(temporary)
        for name in args.only:
            if not (folder / name / "config.json").exists():
                save_checkpoint(folder / name, GEOMETRIES[name])
        results = []
        with Cgroup(disk_bytes_per_s=args.disk_bytes_per_s, folder=folder) as cgroup:
            bench = Bench(folder, cgroup, args.seconds)
            for case in cases():
                if case.geometry not in args.only or case.share not in args.shares:
                    continue
                if args.probe == "always" or (args.probe == "once" and not results):
                    bench.moegen("probe", "--device", "cpu", "--model", str(folder / case.geometry))
                results.append(bench.run(case))
                print(line(case, results[-1]), flush=True)
                report(results, args.disk_bytes_per_s, args.out)  # after every case: a run cut short keeps its cases


def line(case: Case, result: dict[str, Any]) -> str:
    predicted, measured = result["predicted_tokens_per_s"], result["measured_tokens_per_s"]
    return (
        f"{case.name:34s} predicted {predicted:8.1f}, measured {measured:8.1f} tokens/s, {result['error']:+6.1%} "
        f"in {result['measured_seconds']:.1f} s; {result['binding']} binds"
    )


def report(results: list[dict[str, Any]], disk_bytes_per_s: int | None, out: Path) -> None:
    errors = [abs(result["error"]) for result in results]
    summary = {
        "cases": len(errors),
        "mean_absolute_error": statistics.mean(errors),
        "worst_error": max(errors),
        "disk_held_to_bytes_per_s": disk_bytes_per_s,
    }
    print(
        f"{len(errors)} cases: mean absolute error {statistics.mean(errors):.1%}, worst {max(errors):.1%}", flush=True
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**summary, "machine": machine(), "results": results}, indent=2) + "\n")


def machine() -> dict[str, Any]:
    here = Machine.detect("cpu")
    return {"cpu": here.device_name, "cores": here.cores}


if __name__ == "__main__":
    main()
