"""What experts in 8 bits cost the demo's model: its whole table in bfloat16, int8 and fp8, without Airflow.

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
WEIGHTS = ("as_stored", "int8", "fp8")


def answered(weights: str, output: Path) -> Manifest:
    """The demo's job (dags/moegen_table.py) with its experts kept so."""
    job = {
        "input": {"uri": str(TABLE)},
        "prompt": {"column": "text", "chat": True},
        "model": {"uri": str(MODEL), "weights": weights},
        "sampling": {"max_tokens": 32},
        "output": {"uri": str(output)},
    }
    return run_job(JobSpec.from_mapping(job))


def main() -> int:
    """Prints a line for each; exit code 0."""
    print("weights    held out     seen  same answers  mean / max logit difference  same token")
    with tempfile.TemporaryDirectory(prefix="moegen-demo-weights-") as name:
        first: list[str | None] = []
        for weights in WEIGHTS:
            output = Path(name) / weights
            manifest = answered(weights, output)
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
            print(f"{weights:9s} {shares[0]:9.4f} {shares[1]:8.4f} {same:13.4f}  {told}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
