"""`model.weights`: experts brought to 8 bits when they are loaded, and what that costs, in the manifest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from moegen.errors import SpecError
from moegen.job.worker import run_job
from moegen.ops.weight_codes import OWN_CODINGS, expanded, quantised
from moegen.plan.footprint import Footprint
from moegen.shape import ModelShape
from moegen.spec import JobSpec
from moegen.table.manifest import Manifest

from benchmarks.stored_checkpoint import formats, rewrite
from tests.tiny import tiny_checkpoint

ROWS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "plain", hidden_size=64, moe_intermediate_size=64)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "rows.parquet"
    pq.write_table(pa.table({"prompt": [f"Ticket {n}: my invoice is wrong" for n in range(ROWS)]}), path)
    return path


def job(model: Path, table: Path, output: Path, weights: str, **engine: Any) -> JobSpec:
    return JobSpec.from_mapping(
        {
            "input": {"uri": str(table)}, "prompt": {"column": "prompt"}, "sampling": {"max_tokens": 4},
            "model": {"uri": str(model), "weights": weights}, "output": {"uri": str(output)}, "engine": engine,
        }
    )  # fmt: skip


def answers(output: Path) -> list[str | None]:
    return (
        pa.concat_tables(pq.read_table(part) for part in sorted(output.glob("part-*"))).column("output_raw").to_pylist()
    )


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_the_manifest_says_what_8_bits_cost(weights: str, model: Path, table: Path, tmp_path: Path) -> None:
    manifest = run_job(job(model, table, tmp_path / "out", weights))
    cost = manifest.weights
    assert cost is not None
    assert (cost["weights"], cost["prompts"], cost["positions"]) == (weights, 16, 16 * 16)
    assert 0 < cost["mean_logit_difference"] < 0.05 * cost["max_logit"]
    assert cost["mean_logit_difference"] < cost["max_logit_difference"]  # a token may meet other experts
    assert 0.8 < cost["same_token"] <= 1
    assert Manifest.from_mapping(json.loads((tmp_path / "out" / "_manifest.json").read_text())) == manifest


def test_the_manifest_says_what_int8_pages_cost(model: Path, table: Path, tmp_path: Path) -> None:
    spec = job(model, table, tmp_path / "out", "as_stored", plan={"kv_dtype": "int8"})
    spec = replace(spec, job=replace(spec.job, key="night"))
    cost = run_job(spec).weights
    assert cost is not None
    assert (cost["weights"], cost["kv_dtype"], cost["prompts"]) == ("as_stored", "int8", 16)
    assert 0 < cost["mean_logit_difference"] < 0.05 * cost["max_logit"]
    (attempt,) = json.loads((tmp_path / "out" / "_stats.json").read_text())["attempts"]
    assert attempt["plan"]["kv_dtype"] == "int8"
    exact = replace(spec, engine=replace(spec.engine, plan=replace(spec.engine.plan, kv_dtype="auto")))
    with pytest.raises(SpecError, match=r"belongs to other work \(engine\.plan\.kv_dtype differ\)"):
        run_job(exact)


def test_answers_do_not_depend_on_what_is_streamed_and_the_key_does_on_the_weights(
    model: Path, table: Path, tmp_path: Path
) -> None:
    streamed = {"plan": {"group_experts": 1, "resident_groups": 1}}
    whole = run_job(job(model, table, tmp_path / "whole", "int8"))
    parts = run_job(job(model, table, tmp_path / "parts", "int8", **streamed))
    plain = run_job(job(model, table, tmp_path / "plain", "as_stored"))
    assert answers(tmp_path / "whole") == answers(tmp_path / "parts")
    assert whole.fingerprint == parts.fingerprint != plain.fingerprint
    assert plain.weights is None


def test_what_is_in_few_bits_already_is_not_brought_to_others(model: Path, table: Path, tmp_path: Path) -> None:
    rewrite(model, tmp_path / "int4", formats(32)["int4"])
    with pytest.raises(SpecError, match=r"model\.weights: 'int8' cannot be made of experts that are stored as int4"):
        run_job(job(tmp_path / "int4", table, tmp_path / "out", "int8"))
    with pytest.raises(SpecError, match=r"model\.weights: 'int3' cannot be used"):
        job(model, table, tmp_path / "out", "int3")


@pytest.mark.parametrize("name", OWN_CODINGS)
def test_rounding_is_to_the_nearest_code_of_a_scale_per_output(name: str) -> None:
    weight = torch.randn(40, 96) * torch.logspace(-3, 3, 40)[:, None]
    weight[7] = 0
    codes, scales = quantised(weight, OWN_CODINGS[name])
    error = (expanded(codes, scales, None, OWN_CODINGS[name], 96) - weight).abs()
    largest = weight.abs().amax(-1, keepdim=True)
    if name == "int8":
        assert (error <= largest / 127 / 2 * 1.001).all()
    else:  # e4m3 has three bits behind the leading one
        assert (error <= weight.abs() / 16 * 1.001 + largest / 448 * 2**-10).all()
    assert (expanded(codes, scales, None, OWN_CODINGS[name], 96)[7] == 0).all()


def test_half_the_memory_is_what_8_bits_take(model: Path) -> None:
    shape = ModelShape.read(str(model))

    def expert_bytes(kept: ModelShape) -> int:
        return Footprint(kept, "float32", "bfloat16", "float32").expert

    assert expert_bytes(shape.kept("int8")) < 0.54 * expert_bytes(shape)
