"""`moegen report`: one page, whole and self-contained, whatever names stand in it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moegen.cli import main
from moegen.job.stats_file import STATS_NAME, Stats
from moegen.job.worker import run_job
from moegen.report.charts import Series, heat_map, histogram, lines, stacked
from moegen.report.passes import Passes
from moegen.spec import JobSpec

from tests.html_page import HtmlPage
from tests.tiny import tiny_checkpoint

NASTY = "a<b> & \"c\" 'd' {{ 7*7 }}"
SECTIONS = ["Throughput", "Predicted against measured", "Time by resource per pass", "Utilisation",
            "Tokens per expert", "Expert heat map", "Attempts", "Plan", "Model", "Machine"]  # fmt: skip


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a real job, in a folder and under a name that HTML would trip over."""
    folder = tmp_path_factory.mktemp("job") / NASTY
    folder.mkdir()
    (folder / "in.jsonl").write_text("\n".join(json.dumps({"<i>id": row, "prompt": "Hello"}) for row in range(20)))
    job = {
        "job": {"name": f"<script>{NASTY}"},
        "input": {"uri": str(folder / "in.jsonl")},
        "prompt": {"column": "prompt"},
        "model": {"uri": str(tiny_checkpoint(folder / "model"))},
        "sampling": {"max_tokens": 4},
        "output": {"uri": str(folder / "out")},
    }
    run_job(JobSpec.from_mapping(job))
    return folder / "out"


def page_of(output: Path, tmp_path: Path, *options: str) -> HtmlPage:
    assert main(["report", str(output), "--out", str(tmp_path / "page.html"), *options]) == 0
    return HtmlPage((tmp_path / "page.html").read_text())


def test_the_page_of_a_real_job(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(output, tmp_path)
    assert capsys.readouterr().out == f"{tmp_path}/page.html\n"
    assert page.headings == SECTIONS
    assert "script" not in page.elements
    assert page.links == []
    assert NASTY in page.text
    assert f"moegen: <script>{NASTY}" in page.text
    (attempt,) = json.loads((output / STATS_NAME).read_text())["attempts"]
    assert f"{attempt['total']['generated_tokens']:,} tokens" in page.text
    assert "20 rows (" in page.text
    html = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?:|url\(|@import|<link|<img|<iframe", html)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def doctored(output: Path, folder: Path, change: Any) -> Path:
    """The output's statistics in another folder, with something changed."""
    stats = Stats.read(str(output))
    assert stats is not None
    change(stats)
    stats.write(str(folder))
    return folder


def with_everything(stats: Stats) -> None:
    (attempt,) = stats.attempts
    passes = attempt["passes"]
    rows = len(passes["passes"])
    measured = {"s_mfu": 0.4, "s_mbu": 0.5, "disk_utilisation": 0.875, "overlap": 0.75, "attention_s": 0.001,
                "experts_s": 0.002, "waited_s": 0.0005, "disk_bytes": 3 << 20, "link_bytes": 0,
                "expert_tokens_mean": 8.0, "expert_tokens_min": 0, "expert_tokens_max": 31}  # fmt: skip
    attempt["total"] |= measured
    attempt["passes"] = passes | {name: [value] * rows for name, value in measured.items()}
    promise = {"bound": "disk", "rows": 20, "mean_prompt_tokens": 5.0, "mean_answer_tokens": 4.0}
    attempt["throughput"] |= {"predicted_tokens_per_s": 1234.5, "difference": -0.031, "prediction": promise}
    stats.expert_counts[0] = {f"model.layers.{layer}.mlp.experts": np.array([9, 1, 0, 30]) for layer in range(3)}


def test_what_was_measured_is_drawn(output: Path, tmp_path: Path) -> None:
    page = page_of(doctored(output, tmp_path / "all", with_everything), tmp_path)
    assert page.headings == SECTIONS
    assert page.elements.count("svg") == 8
    for said in ("40.0%", "50.0%", "disk 87.5%", "overlap 75.0%", "1,234.5", "-3.1%", "bound by disk", "3.0 MiB",
                 "waiting for weights", "layer 2", "4.0 or more", "a job that has not finished"):  # fmt: skip
        assert said in page.text, said


def with_nothing(stats: Stats) -> None:
    stats.expert_counts = [{}]
    (attempt,) = stats.attempts
    for name in attempt["passes"]:
        if name not in ("passes", "seconds", "generated_tokens", "tokens_per_s", "running"):
            attempt["passes"][name] = [None] * len(attempt["passes"]["passes"])
            attempt["total"][name] = None
    attempt["throughput"] |= {"predicted_tokens_per_s": None, "difference": None, "prediction": None}
    attempt["peak_rss_bytes"] = None


def test_what_was_not_measured_is_said(output: Path, tmp_path: Path) -> None:
    page = page_of(doctored(output, tmp_path / "nothing", with_nothing), tmp_path)
    assert page.headings == SECTIONS
    assert "No prediction was made" in page.text
    assert page.text.count("Not measured") == 3
    assert page.text.count("not measured") >= 8
    assert page.elements.count("svg") == 3


def test_one_of_several_attempts(output: Path, tmp_path: Path) -> None:
    def resumed(stats: Stats) -> None:
        stats.attempts.insert(0, {**stats.attempts[0], "outcome": "interrupted", "started_at": 0.0})
        stats.expert_counts.insert(0, {})

    folder = doctored(output, tmp_path / "two", resumed)
    assert "attempt 2 of 2" in page_of(folder, tmp_path).text
    page = page_of(folder, tmp_path, "--attempt", "1")
    assert "attempt 1 of 2, 1970-01-01 00:00 UTC" in page.text
    assert "interrupted" in page.text


def test_folders_without_figures(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 65
    assert "holds no statistics (_stats.json)" in capsys.readouterr().err
    assert main(["report", str(output), "--attempt", "2"]) == 64
    assert "has attempts 1 to 1" in capsys.readouterr().err
    assert main(["report", str(output), "--out", "/dev/null/page.html"]) == 69
    (tmp_path / STATS_NAME).write_text("{}")
    assert main(["report", str(tmp_path)]) == 65
    assert "is not a statistics file of this version" in capsys.readouterr().err


def test_on_standard_output_and_without_torch(output: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from moegen.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "report", str(output), "--out", "-"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert HtmlPage(run.stdout).headings == SECTIONS


# --- charts ---------------------------------------------------------------------------------------------------------


def test_lines_have_gaps_where_nothing_is_known() -> None:
    svg = lines("t", [0, 1, 2, 3], [Series("a", [1.0, None, 2.0])], "x", "y")
    (data,) = re.findall(r'class="line s0" d="([^"]*)"', svg)
    assert data.count("M") == 2
    assert "None" not in svg


def test_a_stack_is_as_high_as_its_sum() -> None:
    svg = stacked("t", [0, 1], [Series("a", [1.0]), Series("b", [3.0])], "x", "y")
    heights = [
        [float(y) for y in re.findall(r" ([\d.]+)", data)] for data in re.findall(r'class="area[^"]*" d="([^"]*)"', svg)
    ]
    (bottom, middle), (also_middle, top) = ((max(ys), min(ys)) for ys in heights)
    assert middle == also_middle
    assert (bottom - middle) * 4 == pytest.approx(bottom - top, abs=0.5)


@pytest.mark.parametrize("values", [[0.0], [1e-9, 2e-9], [5e12]])
def test_any_size_can_be_drawn(values: list[float]) -> None:
    edges = [float(k) for k in range(len(values) + 1)]
    for svg in (
        lines("t", edges, [Series("a", values)], "x", "y"),
        stacked("t", edges, [Series("a", values)], "x", "y"),
    ):
        assert not re.search("nan|inf", svg)
    assert "nan" not in histogram("t", edges, [0] * len(values), "x", "y")


def test_shades_are_of_the_rows_mean() -> None:
    svg = heat_map("t", [("a", [0, 0, 10, 30]), ("b", [5, 5, 5, 5]), ("c", [0, 0, 0, 0])], "x")
    cells = {shade: data.count("M") for shade, data in re.findall(r'class="heat (h\d)" d="([^"]*)"', svg)}
    assert cells == {"h0": 2, "h4": 2, "h7": 1}  # runs of equal cells are one


def test_many_passes_are_folded_into_few_columns() -> None:
    columns = {
        "passes": [2] * 7,
        "seconds": [1.0, 3.0] * 3 + [2.0],
        "s_mfu": [0.2, 0.6] * 3 + [None],
        "most": [*range(7)],
    }
    passes = Passes(columns, max_columns=4)
    assert passes.count_edges == [0, 4, 8, 12, 14]
    assert passes.second_edges == [0, 4.0, 8.0, 12.0, 14.0]
    assert passes.mean_by_second("s_mfu") == [pytest.approx(0.5)] * 3 + [None]
    assert passes.mean_by_pass("s_mfu")[0] == pytest.approx(0.4)
    assert passes.sum_per_pass("seconds") == [1.0, 1.0, 1.0, 1.0]
    assert (passes.least("most"), passes.most("most")) == ([0, 2, 4, 6], [1, 3, 5, 6])
