"""The GPU suite at sizes that take no time, on the CPU: every stage runs, and needs no more than it says."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moegen
import numpy as np
import pytest
import torch
from moegen.plan.machine import Machine, Rates
from moegen.plan.workload import Workload
from moegen.shape import ModelShape

from benchmarks.gpu_suite.bound import capacity_bound
from benchmarks.gpu_suite.random_checkpoint import geometry

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
# What the suite's own code, and the engine's under it, may import beside the standard library.
ALLOWED = {"torch", "transformers", "safetensors", "numpy", "pyarrow", "fsspec", "numba", "llvmlite", "psutil", "rich"}
BLOCKED = ("fastapi", "starlette", "uvicorn", "prometheus_client", "jinja2", "airflow", "moegen_airflow", "s3fs")
STAGES = {  # without qwen3, which is mixtral's code with other numbers
    "equal": ["equal"],
    "probe": ["probe"],
    "mixtral": ["capped", "uncapped"],
    "peers": ["model-based, 16 tokens", "accelerate, batch 2"],
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a machine on which those packages are not installed; every process of the suite is in it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED!r}))\n")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(Path(moegen.__file__).parents[1]), str(ROOT)]),
        "XDG_CACHE_HOME": str(folder / "cache"),  # what a probe of this machine has kept is not used
    }


def run_suite(environment: dict[str, str], out: Path, *arguments: str) -> dict[str, Any]:
    """What it wrote down."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = out.glob("gpu_*.json")
    assert str(written) in done.stdout
    document: dict[str, Any] = json.loads(written.read_text())
    return document


@pytest.fixture(scope="module")
def found(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    patience = ("--stage-seconds", "400", "--seconds", "800")  # a busy machine's cases take as long as they take
    return run_suite(
        environment, tmp_path_factory.mktemp("out"), "--tiny", "--device", "cpu", "--stages", *STAGES, *patience
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_answers_as_a_cpu_does(environment: dict[str, str], tmp_path: Path) -> None:
    assert run_suite(environment, tmp_path, "--stages", "equal")["stages"]["equal"]["equal"]["equal"]


def test_every_case_of_every_stage_ran(found: dict[str, Any]) -> None:
    assert {stage: list(cases) for stage, cases in found["stages"].items()} == STAGES
    assert not [case for cases in found["stages"].values() for case in cases.values() if "failed" in case]


def test_what_is_equal_was_compared(found: dict[str, Any]) -> None:
    equal = found["stages"]["equal"]["equal"]
    assert equal["equal"]
    for family in equal["families"].values():
        assert 0 < family["float32"] < 1e-4 < family["bfloat16"]["CPU"] < 1
        assert set(family["float32, pages on the host"]) == {"0.0", "0.5", "1.0"}
    assert equal["homes"]["disk"] == {"rows": 1, "tokens": 1}


def test_a_model_is_measured_against_its_bounds_and_its_plan(found: dict[str, Any]) -> None:
    for case in found["stages"]["mixtral"].values():
        assert case["steady"]
        assert case["tokens_per_s"] > 0
        for bound in (case["bound_by_capacity"], case["bound_by_traffic"]):
            assert bound["fraction"] == pytest.approx(case["tokens_per_s"] / bound["tokens_per_s"])
            assert bound["seconds"][bound["binding"]] == max(bound["seconds"].values()) > 0
        error = case["predicted_tokens_per_s"] / case["tokens_per_s"] - 1
        assert case["plan_error"] == pytest.approx(error)
        span = case["span"]
        assert span["decode_tokens"] / span["passes"] == pytest.approx(case["sequences"], rel=0.3)  # full throughout


def test_peers_have_ratios(found: dict[str, Any]) -> None:
    ours, peers = found["stages"]["mixtral"]["capped"]["tokens_per_s"], found["stages"]["peers"]
    assert found["ratios"] == {name: pytest.approx(ours / peer["tokens_per_s"]) for name, peer in peers.items()}
    small = peers[STAGES["peers"][0]]["plan"]
    assert (small["pass_tokens"], small["attention_tokens"]) == (16, 16)


def test_it_imports_nothing_else(environment: dict[str, str]) -> None:
    names = [path.stem for path in (ROOT / "benchmarks" / "gpu_suite").glob("*.py")]
    modules = ", ".join(["benchmarks.gpu", *(f"benchmarks.gpu_suite.{name}" for name in names)])
    code = f"import sys, {modules}; print(*[getattr(m, '__file__', None) for m in sys.modules.values()], sep='\\n')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    homes = (str(Path(moegen.__file__).parent), str(ROOT / "benchmarks"))
    own = [Path(line) for line in done.stdout.splitlines() if line.startswith(homes)]
    assert len(own) > 40
    other = {(name, path.name) for path in own for name in needed(path)} - {("moegen", path.name) for path in own}
    assert not {(name, file) for name, file in other if name not in ALLOWED | {"benchmarks"}}


def needed(path: Path) -> Iterator[str]:
    """Packages that a file imports when it is imported, but for the standard library's."""
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        yield from (first for name in names if (first := name.partition(".")[0]) not in sys.stdlib_module_names)


def test_the_bound_is_the_formula() -> None:
    """Mixtral-8x7B on a GPU capped to 24 GB: the link binds, and how many sequences the host has room for."""
    config = geometry("mixtral", tiny=False)
    rates = Rates(
        linear_flops_per_s={"bfloat16": {1: {1: 7e14}}}, h2d_bytes_per_s=55e9, dram_read_bytes_per_s=200e9,
    )  # fmt: skip
    machine = Machine("cuda", "a GPU", 16, 128 << 30, 80 << 30, True, rates=rates)
    elements = 46_702_792_704
    shape = ModelShape(
        "mixtral", 32, 4096, 32_000, 32, 8, 2, 1 << 17, "bfloat16", elements, 32 * 8 * 3 * 4096 * 14_336,
        32 * 2 * 8 * 128, None, 32, 2 * 4096, False,
    )  # fmt: skip
    assert config.hidden_size == shape.hidden_size
    bound = capacity_bound(shape, machine, 128 << 30, 24 * 10**9, 3e12, Workload.of(1 << 20, (512,), (256,)))
    resident, moved = 24e9, 2 * elements - 24e9
    sequences = ((128 << 30) - moved) / (131_072 * 640)
    assert bound.binding == "link"
    assert bound.seconds["link"] == pytest.approx(moved / 55e9)
    assert bound.tokens_per_s == pytest.approx(sequences / (moved / 55e9))
    assert np.isclose(resident + moved, 2 * elements)
