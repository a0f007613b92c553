"""A file far larger than the memory that reading it may take, read in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

PROMPT_BYTES = 2_000  # all different

READ = """
import re, sys
from pathlib import Path
from moegen.spec import Input
from moegen.table.reader import TableReader
def peak_mb():  # not getrusage: its peak includes the parent's, from before exec
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
before = peak_mb()
reader = TableReader(Input(sys.argv[1]), ["prompt"])
characters = sum(len(row["prompt"]) for batch in reader.batches() for row in batch.values)
print(reader.rows, characters, peak_mb() - before)
"""


def write_prompts(path: Path, rows: int) -> None:
    letters = np.random.default_rng(0).integers(97, 123, rows * PROMPT_BYTES, dtype=np.uint8)
    offsets = np.arange(0, rows * PROMPT_BYTES + 1, PROMPT_BYTES, dtype=np.int32)
    prompts = pa.StringArray.from_buffers(rows, pa.py_buffer(offsets), pa.py_buffer(letters))
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"prompt": prompts}), path, row_group_size=rows, use_dictionary=False)
        return
    with path.open("wb") as file:
        lines = letters.reshape(rows, PROMPT_BYTES)
        file.writelines(b'{"prompt": "' + line.tobytes() + b'"}\n' for line in lines)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "rows", "bound_mb"),
    [
        ("one-row-group.parquet", 150_000, 150),  # 300 MB; measured 43 to 67, and 852 with pq.read_table
        ("lines.jsonl", 60_000, 80),  # 120 MB; measured 24
    ],
)
def test_reading_takes_bounded_memory(tmp_path: Path, name: str, rows: int, bound_mb: float) -> None:
    path = tmp_path / name
    write_prompts(path, rows)
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, check=True)
    rows_read, characters, growth_mb = done.stdout.split()
    assert (int(rows_read), int(characters)) == (rows, rows * PROMPT_BYTES)
    assert float(growth_mb) < bound_mb
    path.unlink()
