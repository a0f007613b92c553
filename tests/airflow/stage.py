"""What the Dags play with: a tiny checkpoint, small tables and a dags folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.tiny import tiny_checkpoint

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Stage:
    """Laid out as the example Dags expect `MOEGEN_DEMO_DIR`."""

    folder: Path

    @property
    def dags(self) -> Path:
        return self.folder / "dags"

    def table(self, name: str, rows: int) -> str:
        """A Parquet file with a column `text`; its URI."""
        path = self.folder / f"{name}.parquet"
        texts = [f"ticket {i}: where is my parcel?" for i in range(rows)]
        pq.write_table(pa.table({"ticket_id": list(range(rows)), "text": texts}), path)
        return str(path)

    def conf(self, table: str, output: str) -> dict[str, str]:
        """A Dag run's parameters."""
        folder = self.folder
        return {"input_uri": table, "output_uri": str(folder / "out" / output), "model_uri": str(folder / "model")}

    def model_without_tokenizer(self, name: str) -> Path:
        """A checkpoint that is still being copied: what it lacks is found out by the runner."""
        return Path(shutil.copytree(self.folder / "model", self.folder / name, ignore=lambda *_: ["tokenizer.json"]))


def build_stage(folder: Path) -> Stage:
    stage = Stage(folder)
    tiny_checkpoint(folder / "model")
    stage.dags.mkdir()
    for source in (*(HERE.parents[1] / "dags").glob("*.py"), *HERE.glob("*_dags.py"), HERE / "nights.py"):
        shutil.copy(source, stage.dags)
    stage.table("tickets", rows=40)
    return stage
