"""What 8 bits cost the demo's model: its whole table with experts in bfloat16, int8 and fp8, and with int8 pages.

Without Airflow.

python demo/weights.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from moegen.job.worker import run_job
from moegen.spec import JobSpec
from moegen.table.manifest import Manifest
from run import TABLE, accuracy, joined

MODEL = Path(__file__).resolve().parent / "model"
KEPT = (("as_stored", "auto"), ("int8", "auto"), ("fp8", "auto"), ("as_stored", "int8"))  # experts, keys and values


def answered(weights: str, kv_dtype: str, output: Path) -> Manifest:
    """The demo's job (dags/moegen_table.py) with its experts, keys and values kept so."""
    job = {
        "input": {"uri": str(TABLE)},
        "prompt": {"column": "text", "chat": True},
        "model": {"uri": str(MODEL), "weights": weights},
        "sampling": {"max_tokens": 32},
        "output": {"uri": str(output)},
        "engine": {"plan": {"kv_dtype": kv_dtype}},
    }
    return run_job(JobSpec.from_mapping(job))


def main() -> int:
    """Prints a line for each; exit code 0."""
    print("weights    KV     held out     seen  same answers  mean / max logit difference  same token")
    with tempfile.TemporaryDirectory(prefix="moegen-demo-weights-") as name:
        first: list[str | None] = []
        for weights, kv_dtype in KEPT:
            output = Path(name) / f"{weights}-{kv_dtype}"
            manifest = answered(weights, kv_dtype, output)
            rows = joined(output)
            shares = [accuracy([row for row in rows if row["split"] == split]) for split in ("held_out", "seen")]
            own = [row["output"] for row in rows]
            first = first or own
            same = sum(map(str.__eq__, map(str, own), map(str, first))) / len(own)
            cost = manifest.weights
            told = (
                f"{cost['mean_logit_difference']:.4f} / {cost['max_logit_difference']:.3f} of {cost['max_logit']:.1f}"
                f"  {cost['same_token']:10.4f}"
                if cost
                else "-"
            )
            print(f"{weights:10s} {kv_dtype:5s} {shares[0]:9.4f} {shares[1]:8.4f} {same:13.4f}  {told}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
