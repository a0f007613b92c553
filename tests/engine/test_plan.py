from __future__ import annotations

from dataclasses import replace

import pytest
from moegen.errors import BudgetError, SpecError
from moegen.plan.explain import explain
from moegen.plan.machine import Machine, Rates, host_memory_bytes
from moegen.plan.search import choose_plan
from moegen.shape import ModelShape
from moegen.spec import Engine, PlanOverrides
from moegen.units import parse_bytes

SHAPE = ModelShape(
    model_type="qwen3_moe", layers=8, hidden_size=1024, vocab_size=32_000, heads=16, experts=64, experts_per_token=8,
    max_position_embeddings=4096, dtype="bfloat16", weights=700_000_000, expert_weights=600_000_000,
    kv_per_token=4096, latent_kv_per_token=None,
)  # fmt: skip
MACHINE = Machine("cpu", "a processor", 2, 16 << 30, 0, native_bf16=True)


def test_a_plan_stays_within_its_budget_and_fills_it():
    plan = choose_plan(SHAPE, MACHINE, Engine(host_memory="4GiB"))
    used = plan.weight_bytes + plan.kv_bytes + plan.activation_bytes
    assert plan.memory_bytes == 4 << 30
    assert 0.8 * (4 << 30) < used + (512 << 20) <= 4 << 30
    assert plan.max_sequence_tokens == plan.kv_pages * plan.page_tokens


def test_a_budget_that_is_too_small_names_the_smallest_that_would_do():
    with pytest.raises(BudgetError, match="smallest budget that would do is") as refused:
        choose_plan(SHAPE, MACHINE, Engine(host_memory="1GiB"))
    amount, unit = str(refused.value).rsplit(" ", 2)[-2:]
    smallest = parse_bytes(f"{float(amount) + 0.1}{unit}", "smallest")  # the message rounds to a tenth
    assert choose_plan(SHAPE, MACHINE, Engine(host_memory=str(smallest))).kv_pages >= 1
    with pytest.raises(BudgetError):
        choose_plan(SHAPE, MACHINE, Engine(host_memory=str(int(smallest * 0.8))))


def test_choices_made_by_hand_are_kept():
    fixed = PlanOverrides(attention_tokens=3, expert_tokens=5, pass_tokens=7, page_tokens=11, kv_pages=13)
    plan = choose_plan(SHAPE, MACHINE, Engine(plan=fixed))
    assert (plan.attention_tokens, plan.expert_tokens, plan.pass_tokens, plan.page_tokens, plan.kv_pages) == (
        3, 5, 7, 11, 13,
    )  # fmt: skip


def test_a_pool_fixed_by_hand_that_does_not_fit_is_refused():
    with pytest.raises(BudgetError):
        choose_plan(SHAPE, MACHINE, Engine(host_memory="4GiB", plan=PlanOverrides(kv_pages=10**6)))


@pytest.mark.parametrize(
    ("machine", "dtype", "computed"),
    [
        (MACHINE, "auto", "bfloat16"),
        (replace(MACHINE, native_bf16=False), "auto", "float32"),
        (replace(MACHINE, native_bf16=False), "float32", "float32"),
        (MACHINE, "float16", "float32"),
        (replace(MACHINE, native_bf16=False, host_memory_bytes=5 << 30), "auto", "bfloat16"),  # would not fit
        (replace(MACHINE, rates=Rates({"float32": {64: 2.0}, "bfloat16": {64: 1.0}})), "auto", "float32"),
        (replace(MACHINE, native_bf16=False, rates=Rates({"float32": {64: 1.0}, "bfloat16": {64: 2.0}})), "auto",
         "bfloat16"),
    ],
)  # fmt: skip
def test_the_compute_dtype_is_the_faster_one_that_fits(machine, dtype, computed):
    assert choose_plan(SHAPE, machine, Engine(), dtype).compute_dtype == computed


def test_the_pages_keep_the_models_dtype_whatever_computes():
    plan = choose_plan(SHAPE, replace(MACHINE, native_bf16=False), Engine())
    assert plan.kv_dtype == "bfloat16"
    assert plan.kv_bytes == plan.kv_pages * plan.page_tokens * 4096 * 2


def test_threads_are_one_where_there_is_no_work_for_two():
    assert choose_plan(SHAPE, MACHINE, Engine()).threads == 2
    assert choose_plan(replace(SHAPE, hidden_size=128), MACHINE, Engine()).threads == 1


def test_explain_says_what_expanded_latent_heads_cost():
    latent = replace(SHAPE, kv_per_token=8 * 128 * 320, latent_kv_per_token=8 * 576)
    text = explain(latent, MACHINE, choose_plan(latent, MACHINE, Engine()))
    assert f"{8 * 128 * 320 / (8 * 576):.1f} times the latent's" in text
    assert "not measured" in text


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(SpecError, match="tpu"):
        Machine.detect("tpu")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8 << 30),
        ({"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "5"}, 8 << 30),
        ({"sys/fs/cgroup/memory.max": str(3 << 30), "sys/fs/cgroup/memory.current": str(1 << 30)}, 2 << 30),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(5 << 30),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(1 << 30),
            },
            4 << 30,
        ),
    ],
)
def test_a_containers_limit_is_the_machines_size(tmp_path, files, expected):
    for name, text in {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 << 20} kB\n", **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert host_memory_bytes(tmp_path) == expected


def test_rates_are_kept_for_this_hardware(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = replace(Machine.detect("cpu"), rates=Rates({"float32": {64: 5e9}}, dram_read_bytes_per_s=1e10))
    machine.save()
    assert Machine.detect("cpu").rates == machine.rates
