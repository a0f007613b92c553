"""Whole jobs over the tables that people have: shards, folders in and out, OpenAI's batch files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moegen.job.worker import run_job
from moegen.spec import JobSpec
from moegen.table.manifest import Manifest

from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def run(model: Path, out: Path, input_: dict[str, Any], **sections: Any) -> Manifest:
    spec = {
        "input": input_,
        "prompt": {"column": "prompt"},
        "model": {"uri": str(model)},
        "sampling": {"max_tokens": 5, "temperature": 1.0},
        **sections,
        "output": {"uri": str(out), "rows_per_part": 7, **sections.get("output", {})},
        "errors": {"max_error_rate": 1},
    }
    if spec["prompt"] is None:
        del spec["prompt"]
    return run_job(JobSpec.from_mapping(spec))


def days(folder: Path) -> str:
    for day in (20, 21, 22):
        (folder / f"ds=2026-11-{day}").mkdir(parents=True)
        rows = {"prompt": [f"{day} {i}" for i in range(10)], "lang": ["de", "en"] * 5}
        pq.write_table(pa.table(rows), folder / f"ds=2026-11-{day}" / "f.parquet")
    return str(folder)


def test_shards_draw_what_the_whole_job_draws(tmp_path: Path, model: Path) -> None:
    """The noise of a row goes by its index, and a shard's rows keep theirs."""
    table = {"uri": days(tmp_path / "in"), "filter": "ds > '2026-11-20' and lang == 'de'"}
    run(model, tmp_path / "whole", table)
    for shard in range(3):
        run(model, tmp_path / f"shard{shard}", {**table, "shard": f"{shard}/3"})
    whole, *shards = (pq.read_table(tmp_path / name) for name in ("whole", "shard0", "shard1", "shard2"))
    assert whole.num_rows == 10
    assert len(set(whole["output_raw"].to_pylist())) > 5
    assert pa.concat_tables(shards).equals(whole)


def test_folders_in_and_folders_out(tmp_path: Path, model: Path) -> None:
    manifest = run(model, tmp_path / "out", {"uri": days(tmp_path / "in")}, output={"partition_by": ["ds", "lang"]})
    assert manifest.rows == sum(part.rows for part in manifest.parts) == 30
    back = pq.read_table(tmp_path / "out")
    assert sorted(back["row_index"].to_pylist()) == list(range(30))
    assert {str(day) for day in back["ds"].to_pylist()} == {"2026-11-20", "2026-11-21", "2026-11-22"}
    (tmp_path / "out" / manifest.parts[0].name).unlink()
    again = run(model, tmp_path / "out", {"uri": str(tmp_path / "in")}, output={"partition_by": ["ds", "lang"]})
    assert again.resumed_rows == 23
    assert pq.read_table(tmp_path / "out").sort_by("row_index").drop_columns(["ds", "lang"]).equals(
        back.sort_by("row_index").drop_columns(["ds", "lang"])
    )  # fmt: skip


def test_a_batch_file_in_and_a_batch_file_out(tmp_path: Path, model: Path) -> None:
    def line(custom_id: str, **body: Any) -> str:
        body = {"model": "m", "messages": [{"role": "user", "content": f"hi {custom_id}"}], **body}
        url = "/v1/chat/completions"
        return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})

    (tmp_path / "batch.jsonl").write_text(
        "\n".join(
            [line("a", max_tokens=2), line("b", temperature=0), line("c", tools=[{}]), "{broken", line("e", seed=9)]
        )
    )
    input_ = {"uri": str(tmp_path / "batch.jsonl"), "format": "openai_jsonl"}
    manifest = run(model, tmp_path / "out", input_, prompt=None, output={"format": "openai_jsonl"})
    assert (manifest.statuses["invalid_params"], manifest.statuses["error"]) == (1, 1)
    (part,) = (tmp_path / "out").glob("part-*.jsonl")
    lines = [json.loads(text) for text in part.read_text().splitlines()]
    assert [found["custom_id"] for found in lines] == ["a", "b", "c", "3", "e"]
    assert [found["response"] is not None for found in lines] == [True, True, False, False, True]
    assert [(found["error"] or {}).get("code") for found in lines] == [
        None, None, "invalid_params", "malformed_json", None,
    ]  # fmt: skip
    first = lines[0]["response"]["body"]
    assert first["usage"]["completion_tokens"] <= 2
    assert (first["choices"][0]["message"]["role"], lines[4]["moegen"]["seed"]) == ("assistant", 9)
