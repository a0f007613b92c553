"""What a job says it did: counted per pass, merged, measured against the machine, written beside the manifest."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest
from moegen.errors import InputError, Interrupted
from moegen.job.attempt import Attempt, peak_rss_bytes
from moegen.job.forecast import forecast
from moegen.job.progress import Progress
from moegen.job.stats_file import COUNTS_NAME, STATS_NAME, Stats
from moegen.job.worker import run_job
from moegen.plan.machine import Machine, Rates
from moegen.plan.search import choose_plan
from moegen.plan.workload import Workload
from moegen.run.figures import Yardstick
from moegen.run.history import History, Span
from moegen.run.stats import PassReport, Recorder, Traffic
from moegen.schedule.sequence import Request, Sequence
from moegen.schedule.step import Chunk, Step
from moegen.shape import ModelShape
from moegen.spec import Engine, Input, Sampling
from moegen.table.manifest import Manifest
from moegen.table.reader import TableReader

from tests.job.test_worker import part_bytes, spec, table_of
from tests.tiny import GEOMETRY, tiny_checkpoint

PLAN = {"kv_pages": 16, "page_tokens": 16}  # room for few rows at once, so that a job has many passes
LAYERS, EXPERTS, TOP_K = (GEOMETRY[name] for name in ("num_hidden_layers", "num_experts", "num_experts_per_tok"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def report_of(generated: int = 1, seconds: float = 0.5, **measured: Any) -> PassReport:
    return PassReport(
        tokens=generated + 2,
        decode_tokens=generated,
        generated_tokens=generated,
        running=4,
        seconds=seconds,
        **measured,
    )


# --- a pass ---------------------------------------------------------------------------------------------------------


def sequence(prompt: int, answered: int, computed: int) -> Sequence:
    request = Request(0, (1,) * prompt, Sampling(max_tokens=9))
    return Sequence(request, 0, [1] * (prompt + answered), computed, pages=[[0, 1]])


def test_a_pass_is_counted_where_it_happens() -> None:
    clock, moved = iter([0.0, 10.0, 11.0, 13.0, 14.0, 20.0]), iter([Traffic(), Traffic(100, 0, 1.5, 4.0)])
    recorder = Recorder(lambda: next(moved), now=lambda: next(clock))
    decoding, starting = sequence(5, 3, 7), sequence(4, 0, 1)
    step = Step([Chunk(decoding, 7, 1), Chunk(starting, 1, 3)], page_tokens=16)
    recorder.count("model.layers.0.mlp.experts", [3, 0, 5])
    recorder.count("model.layers.0.mlp.experts", np.array([0, 1, 1]))
    for _ in range(2):
        with recorder.timed("experts"):
            pass
    for one in (decoding, starting):  # as the engine does before it reports
        one.tokens.append(1)
    report = recorder.end_pass(step, running=2)
    assert (report.tokens, report.decode_tokens, report.prefill_tokens, report.generated_tokens) == (4, 1, 3, 2)
    assert report.seconds == 20.0
    assert (report.kv_tokens, report.attended_pairs) == (8 + 4, 8 + 2 + 3 + 4)
    assert (report.experts_s, report.attention_s) == (1.0 + 1.0, None)
    assert report.traffic == Traffic(100, 0, 1.5, 4.0)
    assert {layer: counts.tolist() for layer, counts in report.expert_counts.items()} == {
        "model.layers.0.mlp.experts": [3, 1, 6]
    }


def test_nothing_carries_over_into_the_next_pass() -> None:
    clock = iter(float(second) for second in range(99))
    recorder = Recorder(now=lambda: next(clock))
    recorder.count("warm-up", [9])
    recorder.begin()
    step = Step([Chunk(sequence(5, 3, 7), 7, 1)], page_tokens=16)
    with recorder.timed("attention"):
        recorder.count("a", [1])
    first, second = recorder.end_pass(step, 1), recorder.end_pass(step, 1)
    assert (first.attention_s, [*first.expert_counts]) == (1.0, ["a"])
    assert (second.seconds, second.attention_s, second.expert_counts, second.traffic) == (1.0, None, None, None)


# --- many passes ----------------------------------------------------------------------------------------------------


def test_passes_are_merged_pairwise_and_nothing_is_lost() -> None:
    history = History(max_spans=4)
    for number in range(11):
        history.add(report_of(number, 1.0, kv_tokens=10, expert_counts={"a": np.array([number, 20])}))
    assert [span.passes for span in history.spans] == [4, 4, 3]
    assert [span.generated_tokens for span in history.spans] == [0 + 1 + 2 + 3, 4 + 5 + 6 + 7, 8 + 9 + 10]
    total = history.total
    assert total is not None
    assert (total.passes, total.seconds, total.generated_tokens, total.kv_tokens) == (11, 11.0, 55, 110)
    assert (total.expert_tokens_min, total.expert_tokens_max, total.active_experts) == (0, 20, 21)
    assert (total.running, total.expert_tokens_mean) == (4.0, (5 + 20) / 2)
    assert history.expert_counts["a"].tolist() == [55, 220]


def test_a_long_job_takes_bounded_memory() -> None:
    history = History()
    for _ in range(9_000):
        history.add(report_of(3, 0.001))
    assert 1_000 <= len(history.spans) <= 2_000
    assert sum(span.passes for span in history.spans) == 9_000
    assert sum(span.generated_tokens for span in history.spans) == 27_000


def test_what_was_not_measured_everywhere_is_unknown() -> None:
    history = History(max_spans=2)
    for waited in (Traffic(waited_s=1.0), None, Traffic(waited_s=1.0)):
        history.add(report_of(traffic=waited))
    assert history.total is not None
    assert history.total.waited_s is None
    assert [span.waited_s for span in history.spans] == [None, 1.0]


def test_recent_passes_are_those_of_the_last_minutes() -> None:
    history = History()
    for generated in range(10):
        history.add(report_of(generated, 25.0))
    assert history.recent is not None
    assert 60 <= history.recent.seconds <= 150
    assert history.recent.generated_tokens == sum(range(10 - history.recent.passes, 10))


# --- figures --------------------------------------------------------------------------------------------------------

SHAPE = ModelShape(
    model_type="m", layers=2, hidden_size=10, vocab_size=100, heads=4, experts=4, experts_per_token=2,
    max_position_embeddings=512, dtype="float32", weights=1000 + 1000 + 600 + 8 * 50, expert_weights=8 * 50,
    kv_per_token=32, latent_kv_per_token=None, moe_layers=2, attention_width=20, tied_head=False,
)  # fmt: skip
RATES = Rates(
    linear_flops_per_s={"float32": {1000: {1: 10.0, 64: 80.0}}, "bfloat16": {1000: {64: 5000.0}}},
    expert_flops_per_s={"float32": {1000: {1: 20.0, 64: 100.0}}},
    disk_bytes_per_s={1: 50.0, 2: 100.0},
    dram_read_bytes_per_s=1000.0,
)
SPAN = Span.of(
    PassReport(
        tokens=10, decode_tokens=4, generated_tokens=5, running=5, seconds=2000.0, kv_tokens=30, attended_pairs=55,
        traffic=Traffic(disk_bytes=20_000, waited_s=25.0, busy_s=100.0),
        expert_counts={"a": np.array([10, 10, 0, 0]), "b": np.array([5, 5, 5, 5])},
    )
)  # fmt: skip


def yardstick(rates: Rates = RATES, **plan: Any) -> Yardstick:
    machine = replace(Machine.detect("cpu"), rates=rates)
    chosen = choose_plan(SHAPE, machine, Engine(device="cpu"))
    settled = {"compute_dtype": "float32", "expert_dtype": "float32", "kv_dtype": "float32"}
    return Yardstick(SHAPE, machine, replace(chosen, **settled, **plan))


def test_figures_by_hand() -> None:
    figures = yardstick(groups=4, group_experts=1, resident_groups=3, host_groups=0).measure(SPAN)
    body = 600 + 8 * 50 / 2  # neither the embedding nor the head, and two of four experts
    assert figures.s_mfu == pytest.approx(2 * (body * 10 + 1000 * 5 + 20 * 2 * 55) / 2000 / 100)
    dense, experts, kv = 1600 * 4, 6 * 50 * 4, 30 * 32 * 4
    assert figures.s_mbu == pytest.approx((dense + 0.75 * experts + kv) / 1000 / 2000)
    assert figures.disk_utilisation == pytest.approx(20_000 / 2000 / 100)
    assert (figures.link_utilisation, figures.overlap, figures.tokens_per_s) == (None, 0.75, 5 / 2000)


def test_the_busiest_memory_counts() -> None:
    slow_disk = replace(RATES, disk_bytes_per_s={1: 0.5})
    figures = yardstick(slow_disk, groups=4, group_experts=1, resident_groups=3, host_groups=0).measure(SPAN)
    assert figures.s_mbu == pytest.approx(0.25 * 6 * 50 * 4 / 0.5 / 2000)


def test_on_a_gpu_bytes_are_counted_where_they_lie() -> None:
    plan = {"device": "cuda", "kv_home": "host", "attention_on_host": 0.5}
    groups = {"groups": 4, "group_experts": 1, "resident_groups": 1, "host_groups": 2}
    needed = yardstick(**plan, **groups).needed_bytes(SPAN)
    experts, kv = 6 * 50 * 4, 30 * 32 * 4
    assert needed == {
        "device": 1600 * 4 + experts / 4, "link": experts / 2 + kv / 2, "disk": experts / 4, "dram": kv / 2,
    }  # fmt: skip


def test_what_the_probe_did_not_measure_is_null_never_zero() -> None:
    figures = asdict(yardstick(Rates()).measure(SPAN))
    assert {name for name, value in figures.items() if value is None} == {
        "s_mfu", "s_mbu", "disk_utilisation", "link_utilisation",
    }  # fmt: skip
    bare = asdict(yardstick().measure(Span.of(report_of())))
    assert {name for name, value in bare.items() if value is not None} == {"tokens_per_s"}


# --- the files ------------------------------------------------------------------------------------------------------


def test_both_files_come_back_as_they_were_written(tmp_path: Path) -> None:
    counts = [{"model.layers.0.mlp.experts": np.array([3, 0, 7])}, {}]
    Stats("work", [{"outcome": "interrupted"}, {"outcome": "finished"}], counts).write(str(tmp_path))
    found = Stats.read(str(tmp_path))
    assert found is not None
    assert (found.fingerprint, [entry["outcome"] for entry in found.attempts]) == ("work", ["interrupted", "finished"])
    assert found.expert_counts[0]["model.layers.0.mlp.experts"].tolist() == [3, 0, 7]
    assert found.expert_counts[1] == {}
    table = pa.ipc.open_file(tmp_path / COUNTS_NAME).read_all()
    assert table.column_names == ["attempt", "layer", "expert", "tokens"]
    assert table["attempt"].to_pylist() == [1, 1, 1]
    assert table["expert"].to_pylist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "content"),
    [(STATS_NAME, b"{"), (STATS_NAME, b"[]"), (STATS_NAME, b'{"version": 99}'), (COUNTS_NAME, b"nonsense")],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    Stats("work", [{}], [{"a": np.array([1])}]).write(str(tmp_path))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: is not a"):
        Stats.read(str(tmp_path))


def test_no_files_no_statistics(tmp_path: Path) -> None:
    assert Stats.read(str(tmp_path / "nowhere")) is None


def attempt_in(folder: Path) -> Attempt:
    return Attempt(Stats("work"), str(folder), yardstick(), None, {"model_uri": "m"})


@pytest.mark.parametrize(
    ("error", "outcome"), [(None, "finished"), (Interrupted("stop"), "interrupted"), (ValueError("no"), "failed")]
)
def test_an_attempt_is_written_however_it_ends(tmp_path: Path, error: Exception | None, outcome: str) -> None:
    def run(attempt: Attempt) -> None:
        with attempt.written():
            attempt.add(report_of())
            if error is not None:
                raise error

    if error is None:
        run(attempt_in(tmp_path))
    else:
        with pytest.raises(type(error), match=str(error)):
            run(attempt_in(tmp_path))
    found = Stats.read(str(tmp_path))
    assert found is not None
    assert [entry["outcome"] for entry in found.attempts] == [outcome]


def test_an_attempt_that_made_no_pass_leaves_nothing(tmp_path: Path) -> None:
    with attempt_in(tmp_path).written():
        pass
    assert list(tmp_path.iterdir()) == []


def test_storage_that_refuses_is_logged_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING), attempt_in(tmp_path / "file" / "out").written() as attempt:
        attempt.add(report_of())
    assert "statistics were not written" in caplog.text


def test_an_attempt_is_written_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moegen.job.attempt._EVERY_S", 0.0)
    attempt_in(tmp_path).add(report_of(7))
    found = Stats.read(str(tmp_path))
    assert found is not None
    assert (found.attempts[0]["outcome"], found.attempts[0]["total"]["generated_tokens"]) == ("running", 7)


def test_peak_memory(tmp_path: Path) -> None:
    peak = peak_rss_bytes()
    assert peak is not None
    assert peak > 50 << 20
    assert peak_rss_bytes(tmp_path / "no such file") is None


def test_a_forecast_needs_a_measured_machine_and_a_known_table() -> None:
    workload = Workload(500, ((10, 5),))
    assert not RATES.measured
    assert forecast(yardstick(), workload, 100) is None
    measured = replace(
        RATES, decode_bytes_per_s={4: {1024: 1e9}}, prefill_flops_per_s={64: 1e9}, layer_s=1e-4, pass_s=1e-3
    )
    assert measured.measured
    assert forecast(yardstick(measured), None, 100) is None
    promised = forecast(yardstick(measured), workload, 100)
    assert promised is not None
    assert promised.tokens_per_s == pytest.approx(500 / promised.seconds)
    assert (promised.rows, promised.mean_prompt_tokens, promised.mean_answer_tokens) == (100, 10, 5)


# --- whole jobs -----------------------------------------------------------------------------------------------------


def attempts_of(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / STATS_NAME).read_text())["attempts"]


@dataclass(frozen=True)
class Done:
    """A job that ran through."""

    output: Path
    manifest: Manifest
    told: list[Progress]

    @property
    def attempt(self) -> dict[str, Any]:
        (attempt,) = attempts_of(self.output)
        return attempt

    @property
    def total(self) -> dict[str, Any]:
        return self.attempt["total"]


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder, told = tmp_path_factory.mktemp("job"), list[Progress]()
    job = spec(model, table_of(folder, 60), folder / "out", engine={"plan": PLAN})
    return Done(folder / "out", run_job(job, report=told.append), told)


def test_the_figures_of_a_job_are_those_of_its_manifest(done: Done) -> None:
    attempt, total = done.attempt, done.total
    assert (attempt["outcome"], attempt["resumed_rows"]) == ("finished", 0)
    assert total["generated_tokens"] == done.manifest.completion_tokens
    assert total["prefill_tokens"] == done.manifest.prompt_tokens
    assert total["decode_tokens"] == done.manifest.completion_tokens - done.manifest.rows
    assert total["tokens"] == total["prefill_tokens"] + total["decode_tokens"]
    assert 0 < total["seconds"] <= done.manifest.seconds
    assert attempt["throughput"]["measured_tokens_per_s"] == total["tokens_per_s"]
    assert done.told[-1].engine is not None
    assert done.told[-1].engine["passes"] == total["passes"]


def test_passes_add_up_to_the_total(done: Done) -> None:
    passes, total = done.attempt["passes"], done.total
    for name in ("passes", "tokens", "decode_tokens", "generated_tokens", "kv_tokens", "attended_pairs"):
        assert sum(passes[name]) == total[name], name
    assert sum(passes["seconds"]) == pytest.approx(total["seconds"], rel=1e-4)
    assert set(passes) == set(total) >= {item.name for item in fields(Span)}


def test_plan_model_machine_and_memory_are_told(done: Done) -> None:
    attempt = done.attempt
    assert attempt["plan"]["kv_pages"] == PLAN["kv_pages"]
    assert (attempt["model"]["experts"], attempt["machine"]["device"]) == (EXPERTS, "cpu")
    assert attempt["peak_rss_bytes"] > 100 << 20
    assert attempt["load_s"] > 0


def test_readers_of_the_folder_do_not_meet_the_figures(done: Done) -> None:
    assert {STATS_NAME, COUNTS_NAME} <= {path.name for path in done.output.iterdir()}
    assert pa.dataset.dataset(done.output).count_rows() == 60
    assert TableReader(Input(str(done.output)), ()).rows == 60


def test_every_token_is_counted_at_its_experts(done: Done) -> None:
    counts = pa.ipc.open_file(done.output / COUNTS_NAME).read_all().to_pylist()
    tokens, passes = done.total["tokens"], done.total["passes"]
    layers = sorted({row["layer"] for row in counts})
    met = [*[tokens] * (LAYERS - 1), done.total["generated_tokens"]]  # the last layer's, those that are sampled from
    for layer, its_tokens in zip(layers, met, strict=True):
        own = [row for row in counts if row["layer"] == layer]
        assert [row["expert"] for row in own] == list(range(EXPERTS))
        assert sum(row["tokens"] for row in own) == its_tokens * TOP_K
    mean = done.total["expert_tokens_mean"]
    assert mean == pytest.approx(sum(met) * TOP_K / EXPERTS / passes / LAYERS)
    assert done.total["expert_tokens_min"] <= mean <= done.total["expert_tokens_max"]
    assert 0 < done.total["active_experts"] <= passes * LAYERS * EXPERTS


def test_nothing_streams_when_all_is_resident(done: Done) -> None:
    total = done.total
    assert (total["disk_bytes"], total["link_bytes"], total["waited_s"], total["overlap"]) == (0, 0, 0.0, None)
    assert total["link_utilisation"] is None  # a CPU has no link


def test_what_streams_is_counted(model: Path, tmp_path: Path) -> None:
    plan = {**PLAN, "group_experts": 1, "resident_groups": 1, "stream_slots": 2, "stream_depth": 1}
    run_job(spec(model, table_of(tmp_path, 20), tmp_path / "out", engine={"plan": plan}))
    (attempt,) = attempts_of(tmp_path / "out")
    total, sizes = attempt["total"], attempt["model"]
    a_pass = sizes["expert_weights"] * 4 * 3 // 4  # float32, and one of four groups stays
    assert 0 < total["disk_bytes"] <= (total["passes"] + 1) * a_pass  # reading ahead goes on at the end
    assert sum(attempt["passes"]["disk_bytes"]) == total["disk_bytes"]
    assert total["link_bytes"] == 0
    assert 0 < total["waited_s"] < total["experts_s"] < total["seconds"]
    assert total["transfer_s"] > 0
    assert 0 <= total["overlap"] <= 1


def measured_machine() -> Machine:
    """This one, as if a probe had measured what S-MFU and S-MBU want."""
    curve = {1000: {1: 1e9, 64: 1e11}}
    rates = Rates(linear_flops_per_s={"float32": curve}, expert_flops_per_s={"float32": curve},
                  dram_read_bytes_per_s=1e10)  # fmt: skip
    return replace(Machine.detect("cpu"), rates=rates)


def test_utilisations_come_with_a_probe(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = spec(model, table_of(tmp_path, 20), tmp_path / "out", output={"mode": "new_run"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run_job(job)
    total = attempts_of(tmp_path / "out")[0]["total"]
    assert (total["s_mfu"], total["s_mbu"]) == (None, None)
    measured_machine().save()
    run_job(job)
    (attempt,) = attempts_of(tmp_path / "out")  # new_run: what was measured before belongs to what was removed
    assert 0 < attempt["total"]["s_mfu"] < 1
    assert 0 < attempt["total"]["s_mbu"] < 1
    assert attempt["total"]["s_mfu"] == pytest.approx(_mean_by_second(attempt["passes"], "s_mfu"), rel=1e-3)


def _mean_by_second(passes: dict[str, list[float]], name: str) -> float:
    pairs = list(zip(passes[name], passes["seconds"], strict=True))
    return sum(value * seconds for value, seconds in pairs) / sum(seconds for _, seconds in pairs)


@pytest.fixture
def interrupted(model: Path, tmp_path: Path) -> Callable[[], Any]:
    """Runs a job until two of its six parts are there."""
    job = spec(model, table_of(tmp_path, 60), tmp_path / "out", output={"rows_per_part": 10}, engine={"plan": PLAN})
    told: list[Progress] = []
    with pytest.raises(Interrupted):
        run_job(job, report=told.append, stopping=lambda: told[-1].rows_committed >= 20)
    return lambda: run_job(job)


def test_a_resumed_job_says_which_attempt_did_what(interrupted: Callable[[], Any], tmp_path: Path) -> None:
    (first,) = attempts_of(tmp_path / "out")
    assert (first["outcome"], first["resumed_rows"]) == ("interrupted", 0)
    manifest = interrupted()
    before, second = attempts_of(tmp_path / "out")
    assert before == first
    assert (second["outcome"], second["resumed_rows"]) == ("finished", manifest.resumed_rows)
    generated = first["total"]["generated_tokens"] + second["total"]["generated_tokens"]
    assert generated >= manifest.completion_tokens  # rows that were given up in the middle were begun twice

    written = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("_[se]*")}
    interrupted()  # nothing is left: nothing is measured, and nothing is written
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("_[se]*")} == written


def test_figures_that_cannot_be_read_or_written_cost_no_answer(
    interrupted: Callable[[], Any], model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out" / STATS_NAME).unlink()
    (tmp_path / "out" / STATS_NAME).mkdir()  # nothing can be read from it, or put in its place
    interrupted()
    assert (tmp_path / "out/_SUCCESS").exists()
    assert "statistics were not written" in caplog.text
    run_job(spec(model, tmp_path / "in.jsonl", tmp_path / "straight", output={"rows_per_part": 10}))
    assert part_bytes(tmp_path / "out") == part_bytes(tmp_path / "straight")


def test_damaged_figures_of_an_earlier_attempt_are_replaced(interrupted: Callable[[], Any], tmp_path: Path) -> None:
    (tmp_path / "out" / STATS_NAME).write_text("{")
    interrupted()
    assert [attempt["outcome"] for attempt in attempts_of(tmp_path / "out")] == ["finished"]
