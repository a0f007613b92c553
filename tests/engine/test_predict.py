"""The cost model and the simulation, over made-up rates."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import numpy as np
import pytest
from moegen.plan.cost import CostModel, Load
from moegen.plan.curve import at, on
from moegen.plan.explain import explain
from moegen.plan.footprint import Footprint
from moegen.plan.machine import Machine, Rates
from moegen.plan.outlook import Outlook
from moegen.plan.plan import Plan
from moegen.plan.predict import Fidelity, predict, simulate
from moegen.plan.search import choose_plan
from moegen.plan.workload import Workload
from moegen.spec import Engine, PlanOverrides

from tests.engine.test_plan import SHAPE

RATES = Rates(
    linear_flops_per_s={"float32": {1 << 20: {1: 5e9, 64: 100e9}}},
    expert_flops_per_s={"bfloat16": {1 << 20: {1: 10e9, 16: 80e9, 128: 150e9}}},
    decode_bytes_per_s={4: {1 << 14: 4e9, 1 << 20: 8e9}},
    prefill_flops_per_s={16: 5e9, 1024: 80e9},
    disk_bytes_per_s={1: 0.4e9, 4: 0.6e9},
    place_bytes_per_s=2e9,
    dram_read_bytes_per_s=12e9,
    pass_s=2e-3, layer_s=1e-3, sequence_s=1e-5, element_s=1e-8, logit_s=1e-9, runtime_bytes=500 << 20,
)  # fmt: skip
MACHINE = Machine("cpu", "a processor", 2, 16 << 30, 0, native_bf16=False, rates=RATES)


def footprint(plan: Plan) -> Footprint:
    return Footprint(SHAPE, plan.compute_dtype, plan.expert_dtype, plan.kv_dtype)


def decode(sequences: float, context: float) -> Load:
    values = (sequences, sequences, sequences, sequences, sequences * context, 0, 0, 0, sequences)
    return Load(*(np.array([float(value)]) for value in values))


def test_a_curve_is_exact_where_it_was_measured_and_straight_between_in_logarithms():
    curve = {1: 10.0, 4: 40.0, 64: 40.0}
    assert at(curve, [1, 2, 4, 16, 64]) == pytest.approx([10, 20, 40, 40, 40])
    assert at(curve, [0.01, 1e6]) == pytest.approx([10, 40])
    assert at(on({1: curve, 100: {1: 1000.0, 4: 4000.0, 64: 4000.0}}, 10), [1, 4]) == pytest.approx([100, 400])


def test_arithmetic_adds_up_on_a_cpu():
    plan = choose_plan(SHAPE, MACHINE, Engine(host_memory="6GiB"))
    passed = CostModel(footprint(plan), plan, RATES).time(decode(100, 300))
    assert passed.seconds == pytest.approx(sum(passed.terms.values()))
    assert passed.terms["disk"] == 0
    expected = 2 * 100 * 8 * 600e6 / 64 / at(RATES.expert_flops_per_s["bfloat16"][1 << 20], 12.5)
    assert passed.terms["experts"] == pytest.approx(expected, rel=1e-4)


def test_a_stream_goes_on_beside_arithmetic_and_the_longer_one_is_the_pass():
    plan = choose_plan(SHAPE, MACHINE, Engine(host_memory="1500MiB"))
    assert plan.disk_groups
    model = CostModel(footprint(plan), plan, RATES)
    few, many = model.time(decode(8, 300)), model.time(decode(4000, 300))
    assert few.binding == "disk"
    assert few.terms["disk"] <= few.seconds < few.terms["disk"] + sum(few.terms.values()) / 2
    assert many.binding != "disk"
    unhidden = CostModel(footprint(plan), replace(plan, stream_depth=0), RATES).time(decode(4000, 300))
    assert unhidden.seconds == pytest.approx(sum(unhidden.terms.values()))
    assert many.seconds < unhidden.seconds


def test_a_small_pass_streams_what_it_needs_and_what_was_read_ahead_of_the_router():
    plan = choose_plan(SHAPE, MACHINE, Engine(host_memory="1500MiB"))

    def disk_seconds(sequences: float, depth: int) -> float:
        model = CostModel(footprint(plan), replace(plan, stream_depth=depth), RATES)
        return float(model.time(decode(sequences, 300)).terms["disk"][0])

    assert disk_seconds(1, 0) < 0.8 * disk_seconds(500, 0)
    assert disk_seconds(1, 0) < disk_seconds(1, 1) < disk_seconds(500, 1)
    assert disk_seconds(1, plan.groups) == disk_seconds(500, plan.groups)


def test_the_simulation_runs_every_token_through_the_scheduler():
    plan = choose_plan(SHAPE, MACHINE, Engine(host_memory="6GiB"))
    workload = Workload(3, ((10, 4), (20, 1), (5, 6)))
    run = simulate(plan, workload)
    assert run.load.tokens.sum() == 35 + 4 + 1 + 6 - 3
    assert run.load.sampled.sum() == 11
    assert run.load.sequences.tolist() == [3, 2, 2, 2, 1, 1]
    assert run.load.prefill_pairs[0] == 10 * 11 / 2 + 20 * 21 / 2 + 5 * 6 / 2
    assert run.load.decode_kv_tokens.tolist() == [0, 17, 19, 21, 9, 10]


@pytest.mark.parametrize("lengths", [((100, 30),), ((20, 60), (400, 10), (90, 30))])
def test_a_large_job_simulated_smaller_comes_to_the_same(lengths):
    plan = replace(choose_plan(SHAPE, MACHINE, Engine(host_memory="6GiB")), kv_pages=3000, pass_tokens=1024)
    workload = Workload(4000, lengths)
    sampled = predict(footprint(plan), plan, RATES, workload)
    whole = predict(footprint(plan), plan, RATES, workload, Fidelity(sequences=1 << 30, steps=1 << 40))
    assert whole.generated_tokens == pytest.approx(4000 * workload.mean_answer, rel=0.03)
    assert sampled.seconds == pytest.approx(whole.seconds, rel=0.05)
    assert sampled.steady_tokens_per_s == pytest.approx(whole.steady_tokens_per_s, rel=0.05)


def test_a_hundred_thousand_rows_are_predicted_in_seconds():
    plan = choose_plan(SHAPE, MACHINE, Engine(host_memory="12GiB"))
    started = time.perf_counter()
    found = predict(footprint(plan), plan, RATES, Workload.of(100_000, [64, 512, 900], [16, 256]))
    assert time.perf_counter() - started < 20  # about three when nothing else runs
    assert found.generated_tokens == pytest.approx(100_000 * 136, rel=0.05)
    assert found.generated_tokens_per_s == pytest.approx(found.generated_tokens / found.seconds)


@pytest.mark.parametrize(
    "lengths",
    [((700, 20),) * 2, ((3000, 100),) * 2, ((3000, 10_100),) * 2, (*((50, 4),) * 28, (9000, 4), (50, 4))],
    ids=["short", "longer", "long answers", "one long prompt near the end"],
)
def test_jobs_that_generate_nothing_while_their_rows_enter_are_planned_and_predicted(lengths):
    workload = Workload(len(lengths), lengths)
    plan = choose_plan(SHAPE, MACHINE, Engine(host_memory="6GiB"), workload=workload)
    found = predict(footprint(plan), plan, RATES, workload)
    assert found.generated_tokens == sum(answer for _, answer in lengths)
    assert found.steady_tokens_per_s > 0


def test_planning_a_job_with_long_answers_takes_seconds():
    started = time.perf_counter()
    choose_plan(SHAPE, MACHINE, Engine(host_memory="6GiB"), workload=Workload.of(10_000, (500,), (2000,)))
    assert time.perf_counter() - started < 30  # about two when nothing else runs


def test_one_row_is_all_tail():
    plan = choose_plan(SHAPE, MACHINE, Engine(host_memory="6GiB"))
    found = predict(footprint(plan), plan, RATES, Workload(1, ((10, 5),)))
    assert (found.generated_tokens, found.passes, found.prompt_tokens) == (5, 5, 10)


def test_the_outlook_says_what_another_gibibyte_gives():
    workload = Workload.of(20_000, [300], [64])
    engine = Engine(host_memory="1400MiB")
    found = Outlook.of(SHAPE, MACHINE, engine, "auto", workload)
    assert found.prediction is not None
    assert found.host_gib_tokens_per_s is not None
    assert found.host_gib_tokens_per_s > 0
    assert found.device_gib_tokens_per_s is None
    text = explain(SHAPE, MACHINE, found)
    assert f"{found.prediction.binding} binds" in text
    assert f"host {found.host_gib_tokens_per_s:+,.1f}" in text
    assert found.few_bits_tokens_per_s is not None
    kept, eight, four, _ = found.few_bits_tokens_per_s.values()
    assert 0 < kept <= eight < four, "half of the bytes in memory; on disk too; a quarter"
    assert f"model.weights int8 {kept:+,.1f}, a checkpoint in 8 bits {eight:+,.1f}" in text
    mapping = found.to_mapping()
    assert mapping["prediction"]["generated_tokens_per_s"] == found.prediction.generated_tokens_per_s


def test_without_rates_or_rows_nothing_is_predicted_and_it_says_so():
    unmeasured = replace(MACHINE, rates=Rates())
    found = Outlook.of(SHAPE, unmeasured, Engine(), "auto", Workload.of(10, [5], [5]))
    assert found.prediction is None
    assert "run: moegen probe" in explain(SHAPE, unmeasured, found)
    assert "not predicted: the rows" in explain(SHAPE, MACHINE, Outlook.of(SHAPE, MACHINE, Engine(), "auto", None))


@pytest.mark.parametrize(("rows", "prompt", "answer"), [(256, 64, 8), (3000, 100, 20), (500, 16, 64)])
@pytest.mark.parametrize("share", [1.0, 0.2])
def test_the_phases_of_a_job_are_about_what_the_scheduler_makes_of_it(rows, prompt, answer, share):
    workload = Workload.of(rows, (prompt,), (answer,))
    plan = replace(choose_plan(SHAPE, MACHINE, Engine(host_memory="4GiB")), pass_tokens=1024, level_tokens=1024)
    plan = replace(
        plan, kv_pages=max(round(share * rows * (prompt + answer + plan.page_tokens) / plan.page_tokens), 64)
    )
    load, passes = workload.phases(plan)
    assert float(load.sampled @ passes) == pytest.approx(rows * answer)
    assert float(load.prefill_tokens @ passes) == pytest.approx(rows * prompt)
    assert float(passes.sum()) == pytest.approx(len(simulate(plan, workload).load.tokens), rel=0.2)


@pytest.mark.parametrize("budget", ["1500MiB", "6GiB"])
def test_a_long_job_gets_the_pass_size_that_its_simulation_is_fastest_with(budget):
    """Rows that entered together end together: large passes alternate with small ones, whose mean says too little."""
    workload, engine = Workload.of(20_000, (300,), (64,)), Engine(host_memory=budget)
    chosen = choose_plan(SHAPE, MACHINE, engine, workload=workload)
    seconds = predict(footprint(chosen), chosen, RATES, workload).seconds
    for pass_tokens in (512, 1024, 2048, 4096):
        fixed = replace(engine, plan=PlanOverrides(pass_tokens=pass_tokens))
        other = choose_plan(SHAPE, MACHINE, fixed, workload=workload)
        assert seconds <= 1.02 * predict(footprint(other), other, RATES, workload).seconds, pass_tokens


def test_a_job_of_few_passes_gets_the_plan_that_its_simulation_is_fastest_with():
    workload = Workload.of(300, (64,), (16,))
    engine = Engine(host_memory="2GiB")
    chosen = choose_plan(SHAPE, MACHINE, engine, workload=workload)
    seconds = predict(footprint(chosen), chosen, RATES, workload).seconds
    for pass_tokens in (1024, 2048, 4096, 8192):
        fixed = replace(engine, plan=PlanOverrides(pass_tokens=pass_tokens))
        other = choose_plan(SHAPE, MACHINE, fixed, workload=workload)
        assert seconds <= 1.02 * predict(footprint(other), other, RATES, workload).seconds


@pytest.mark.parametrize("busy_rate", [160e9, 600e9])  # at 16 rows per expert: larger passes gain something, or not
def test_a_short_job_is_levelled_at_the_smallest_size_that_costs_hardly_anything(busy_rate):
    dice = random.Random(0)
    lengths = tuple((dice.randint(20, 180), dice.randint(8, 128)) for _ in range(256))
    workload = Workload(len(lengths), lengths)
    rates = replace(RATES, expert_flops_per_s={"bfloat16": {1 << 20: {1: 10e9, 16: busy_rate, 128: 700e9}}})
    plan = choose_plan(SHAPE, replace(MACHINE, rates=rates), Engine(host_memory="6GiB"), workload=workload)
    passes = {}

    def seconds(level_tokens: int) -> float:
        levelled = replace(plan, level_tokens=level_tokens)
        passes[level_tokens] = simulate(levelled, workload).load.tokens
        return predict(footprint(plan), levelled, rates, workload).seconds

    sizes = [*(size for size in (32, 128, 512, 2048) if size < plan.pass_tokens), plan.pass_tokens]
    fastest = min(seconds(size) for size in sizes)
    assert seconds(plan.level_tokens) <= 1.02 * fastest
    assert all(seconds(size) > 1.02 * fastest for size in sizes if size < plan.level_tokens)
    for pass_tokens in (256, 512, 1024, 2048, 4096):  # compared as they would run: levelled
        fixed = Engine(host_memory="6GiB", plan=PlanOverrides(pass_tokens=pass_tokens))
        other = choose_plan(SHAPE, replace(MACHINE, rates=rates), fixed, workload=workload)
        assert seconds(plan.level_tokens) <= 1.001 * predict(footprint(other), other, rates, workload).seconds
    if busy_rate == 600e9:
        last = len(passes[32]) // 20
        assert passes[plan.level_tokens][-last:].mean() > 3 * passes[plan.pass_tokens][-last:].mean()


def test_weights_that_could_stay_move_only_for_a_clear_gain():
    """Streaming plans have larger passes, and this disk costs nothing: by prediction alone they would win, barely."""
    free = replace(RATES, disk_bytes_per_s={1: 1e12}, place_bytes_per_s=1e12)
    workload = Workload.of(4000, (64,), (32,))

    def best(rates: Rates) -> Plan:
        return choose_plan(SHAPE, replace(MACHINE, rates=rates), Engine(), workload=workload)

    assert best(free).streamed_groups == 0
    assert best(replace(free, layer_s=1.0)).streamed_groups > 0  # passes of four times the size save three quarters
