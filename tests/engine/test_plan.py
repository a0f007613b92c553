from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from moegen.errors import BudgetError, SpecError
from moegen.plan.cost import CostModel
from moegen.plan.explain import explain
from moegen.plan.footprint import Footprint
from moegen.plan.machine import Machine, Rates, host_memory_bytes, own_memory_bytes
from moegen.plan.nominal import nominal_rates
from moegen.plan.outlook import Outlook
from moegen.plan.search import choose_plan
from moegen.plan.workload import UNKNOWN
from moegen.shape import ModelShape
from moegen.spec import Engine, PlanOverrides
from moegen.units import parse_bytes

SHAPE = ModelShape(
    model_type="qwen3_moe", layers=8, hidden_size=1024, vocab_size=32_000, heads=16, experts=64, experts_per_token=8,
    max_position_embeddings=4096, dtype="bfloat16", weights=700_000_000, expert_weights=600_000_000,
    kv_per_token=4096, latent_kv_per_token=None, moe_layers=8, attention_width=2048, tied_head=False,
)  # fmt: skip
LATENT = replace(
    SHAPE, heads=128, kv_per_token=8 * 128 * 320, latent_kv_per_token=8 * 576, attention_width=128 * 320,
    absorbed_width=128 * (576 + 512), key_up_weights=8 * 128 * 128 * 512,
)  # fmt: skip
MACHINE = Machine("cpu", "a processor", 2, 16 << 30, 0, native_bf16=True)
DOTS = replace(MACHINE, dots_bf16=True)


def test_a_plan_stays_within_its_budget_and_fills_it():
    plan = choose_plan(SHAPE, MACHINE, Engine(host_memory="4GiB"))
    assert plan.host.budget == 4 << 30
    assert 0.95 * (4 << 30) < plan.host.used <= 4 << 30
    assert plan.max_sequence_tokens == plan.kv_pages * plan.page_tokens


def test_a_budget_that_is_too_small_names_the_smallest_that_would_do():
    with pytest.raises(BudgetError, match="smallest budget that would do is") as refused:
        choose_plan(SHAPE, MACHINE, Engine(host_memory="700MiB"))
    amount, unit = str(refused.value).rsplit(" ", 2)[-2:]
    smallest = parse_bytes(f"{float(amount) + 0.1}{unit}", "smallest")  # the message rounds to a tenth
    assert choose_plan(SHAPE, MACHINE, Engine(host_memory=str(smallest))).kv_pages >= 1
    with pytest.raises(BudgetError):
        choose_plan(SHAPE, MACHINE, Engine(host_memory=str(int(smallest * 0.8))))


def test_choices_made_by_hand_are_kept():
    fixed = PlanOverrides(
        attention_tokens=3, expert_tokens=5, pass_tokens=7, level_tokens=6, page_tokens=11, kv_pages=13
    )
    plan = choose_plan(SHAPE, MACHINE, Engine(plan=fixed))
    assert [getattr(plan, name) for name, value in asdict(fixed).items() if type(value) is int] == [
        3,
        5,
        7,
        6,
        11,
        13,
    ]


def test_passes_are_levelled_at_the_smallest_size_that_is_efficient():
    plan = choose_plan(SHAPE, MACHINE, Engine(host_memory="6GiB"))
    footprint = Footprint(SHAPE, plan.compute_dtype, plan.expert_dtype, plan.kv_dtype)
    model, steady = CostModel(footprint, plan, nominal_rates(MACHINE)), UNKNOWN.steady_pass(plan)

    def tokens_per_s(tokens: int) -> float:
        return tokens / float(model.time(steady.scaled(tokens / float(steady.tokens[0]))).seconds[0])

    assert 1 < plan.level_tokens < plan.pass_tokens
    assert tokens_per_s(plan.level_tokens) >= 0.95 * tokens_per_s(plan.pass_tokens)
    assert tokens_per_s(plan.level_tokens // 2) < 0.95 * tokens_per_s(plan.pass_tokens)


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
        (replace(MACHINE, native_bf16=False, host_memory_bytes=1250 << 20), "auto", "bfloat16"),  # would not fit
        (replace(MACHINE, rates=Rates({"float32": {1: {64: 2.0}}, "bfloat16": {1: {64: 1.0}}})), "auto", "float32"),
        (replace(MACHINE, native_bf16=False, rates=Rates({"float32": {1: {64: 1.0}}, "bfloat16": {1: {64: 2.0}}})),
         "auto", "bfloat16"),
    ],
)  # fmt: skip
def test_the_compute_dtype_is_the_faster_one_that_fits(machine, dtype, computed):
    assert choose_plan(SHAPE, machine, Engine(), dtype).compute_dtype == computed


@pytest.mark.parametrize(
    ("machine", "dtype", "computed", "rounded"),
    [
        (DOTS, "auto", "float32", True),
        (DOTS, "bfloat16", "float32", True),
        (DOTS, "float32", "float32", False),  # the job wants it exact
        (DOTS, "float16", "float32", False),
        (replace(DOTS, host_memory_bytes=1250 << 20), "auto", "bfloat16", False),  # would not fit while it is loaded
        (MACHINE, "auto", "bfloat16", False),
    ],
)
def test_activations_are_rounded_where_the_kernel_multiplies_bfloat16(machine, dtype, computed, rounded):
    plan = choose_plan(SHAPE, machine, Engine(), dtype)
    assert (plan.compute_dtype, plan.rounded) == (computed, rounded)
    assert plan.product_dtype == ("bfloat16" if rounded else computed)


def test_explain_says_in_what_is_multiplied():
    text = explain(SHAPE, DOTS, Outlook.of(SHAPE, DOTS, Engine(), "auto", None))
    assert "products of bfloat16, added in float32" in text
    assert "products of bfloat16" not in explain(SHAPE, MACHINE, Outlook.of(SHAPE, MACHINE, Engine(), "auto", None))


def test_the_pages_keep_the_models_dtype_whatever_computes():
    plan = choose_plan(SHAPE, replace(MACHINE, native_bf16=False), Engine())
    assert plan.kv_dtype == "bfloat16"
    assert plan.host.kv == plan.kv_pages * plan.page_tokens * 4096 * 2


def test_threads_are_one_where_there_is_no_work_for_two():
    assert choose_plan(SHAPE, MACHINE, Engine()).threads == 2
    assert choose_plan(replace(SHAPE, hidden_size=128), MACHINE, Engine()).threads == 1


def test_explain_says_what_expanded_latent_heads_cost():
    expanded = Engine(plan=PlanOverrides(latent_kv=False))
    text = explain(LATENT, MACHINE, Outlook.of(LATENT, MACHINE, expanded, "auto", None))
    assert f"640.0 KiB per token, kept as expanded heads: {128 * 320 / 576:.1f} times the latent's 9.0 KiB" in text
    assert "not measured" in text
    text = explain(LATENT, MACHINE, Outlook.of(LATENT, MACHINE, Engine(), "auto", None))
    assert "9.0 KiB per token, kept as latents: expanded heads would take 71.1 times that" in text


def test_latents_leave_room_for_many_more_sequences():
    engine = Engine(host_memory="4GiB", plan=PlanOverrides(pass_tokens=1024))
    heads = replace(engine, plan=replace(engine.plan, latent_kv=False))
    plans = [choose_plan(LATENT, MACHINE, how) for how in (engine, heads)]
    assert [plan.latent_kv for plan in plans] == [True, False]
    for plan, elements in zip(plans, (576, 128 * 320), strict=True):
        assert plan.host.kv == plan.kv_pages * plan.page_tokens * 8 * elements * 2
        assert plan.host.used <= 4 << 30
    assert plans[0].kv_pages > 30 * plans[1].kv_pages
    assert UNKNOWN.concurrency(plans[0]) > 5 * UNKNOWN.concurrency(plans[1])


def test_attention_over_latents_takes_arithmetic_and_not_bytes():
    plan = choose_plan(LATENT, MACHINE, Engine(host_memory="6GiB"))
    load = UNKNOWN.steady_pass(plan)
    flops = 2 * 8 * 128 * (576 + 512) * load.decode_kv_tokens
    rates = replace(nominal_rates(MACHINE), latent_flops_per_s=2e10)
    footprint = Footprint(LATENT, plan.compute_dtype, plan.expert_dtype, plan.kv_dtype)
    assert CostModel(footprint, plan, rates).time(load).terms["decode attention"] == pytest.approx(flops / 2e10)
    # Not measured: the multiply-adds per second where most heads share keys, here 4 for every 2 bytes.
    unmeasured = CostModel(footprint, plan, nominal_rates(MACHINE)).time(load)
    assert unmeasured.terms["decode attention"] == pytest.approx(flops / (4 * 2 * 5e9))


def test_experts_that_do_not_fit_are_streamed():
    plan = choose_plan(SHAPE, MACHINE, Engine(host_memory="1500MiB"))
    assert 0 <= plan.resident_groups < plan.groups
    assert plan.disk_groups == plan.groups - plan.resident_groups
    assert plan.stream_slots > plan.stream_depth >= 1
    assert plan.groups * plan.group_experts >= 64 > (plan.groups - 1) * plan.group_experts
    with pytest.raises(BudgetError):
        choose_plan(SHAPE, MACHINE, Engine(host_memory="1500MiB"), streamable=False)


def test_everything_is_resident_where_it_fits():
    plan = choose_plan(SHAPE, MACHINE, Engine(host_memory="6GiB"))
    assert (plan.resident_groups, plan.stream_slots, plan.stream_depth) == (plan.groups, 0, 0)


@pytest.mark.parametrize("mebibytes", range(1000, 4000, 333))
def test_a_budget_is_never_exceeded_and_more_is_never_slower(mebibytes):
    speeds = []
    for more in (0, 200):
        machine = replace(MACHINE, host_memory_bytes=(mebibytes + more) << 20)
        engine = Engine(host_memory=f"{mebibytes + more}MiB")
        plan = choose_plan(SHAPE, machine, engine)
        assert plan.host.used <= plan.host.budget == (mebibytes + more) << 20
        footprint = Footprint(SHAPE, plan.compute_dtype, plan.expert_dtype, plan.kv_dtype)
        load = UNKNOWN.steady_pass(plan)
        speeds.append(load.sampled[0] / CostModel(footprint, plan, nominal_rates(machine)).time(load).seconds[0])
    assert speeds[1] >= speeds[0]


def test_a_named_budget_is_no_more_than_the_machine_has():
    assert choose_plan(SHAPE, MACHINE, Engine(host_memory="99GiB")).host.budget == MACHINE.host_memory_bytes


GPU = replace(MACHINE, device="cuda", host_memory_bytes=64 << 30, device_memory_bytes=24 << 30)


@pytest.mark.parametrize("kv_home", ["device", "host"])
def test_on_a_gpu_both_budgets_hold(kv_home):
    for host, device in (("8GiB", "2GiB"), ("3GiB", "20GiB"), ("40GiB", "1600MiB")):
        engine = Engine(host_memory=host, device_memory=device, plan=PlanOverrides(kv_home=kv_home))
        plan = choose_plan(SHAPE, GPU, engine)
        assert plan.kv_home == kv_home
        assert (plan.host.kv > 0, plan.device_memory.kv > 0) == (kv_home == "host", kv_home == "device")
        assert plan.host.used <= plan.host.budget
        assert plan.device_memory.used <= plan.device_memory.budget
        assert plan.resident_groups + plan.host_groups + plan.disk_groups == plan.groups
        assert 0 <= plan.attention_on_host <= 1


def test_a_small_gpu_keeps_experts_on_the_host_once():
    plan = choose_plan(SHAPE, GPU, Engine(device_memory="1600MiB"))
    assert plan.host_groups == plan.groups - plan.resident_groups > 0
    assert plan.host.experts + plan.device_memory.experts == SHAPE.expert_weights * 2
    with pytest.raises(BudgetError, match=r"engine\.device_memory: 600\.0 MiB"):
        choose_plan(SHAPE, GPU, Engine(device_memory="600MiB"))


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
        (  # version 2, a limit on the group above its own
            {
                "proc/self/cgroup": "0::/jobs/night",
                "sys/fs/cgroup/jobs/memory.max": str(4 << 30),
                "sys/fs/cgroup/jobs/memory.current": str(1 << 30),
                "sys/fs/cgroup/jobs/night/memory.max": "max",
                "sys/fs/cgroup/jobs/night/memory.current": "5",
            },
            3 << 30,
        ),
        (  # version 1, nested, with page cache that counts as used
            {
                "proc/self/cgroup": "5:devices:/\n4:memory:/jobs/night\n0::/",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(1 << 62),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(7 << 30),
                "sys/fs/cgroup/memory/jobs/night/memory.limit_in_bytes": str(3 << 30),
                "sys/fs/cgroup/memory/jobs/night/memory.usage_in_bytes": str(2 << 30),
                "sys/fs/cgroup/memory/jobs/night/memory.stat": f"cache 5\ntotal_inactive_file {1 << 30}\n",
            },
            2 << 30,
        ),
        (  # a path that this mount does not show: the mount's own root is the container's group
            {
                "proc/self/cgroup": "0::/../elsewhere/c1",
                "sys/fs/cgroup/memory.max": str(2 << 30),
                "sys/fs/cgroup/memory.current": str(1 << 30),
            },
            1 << 30,
        ),
    ],
)
def test_a_containers_limit_is_the_machines_size(tmp_path, files, expected):
    for name, text in {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 << 20} kB\n", **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert host_memory_bytes(tmp_path) == expected


def test_memory_that_the_process_has_counts_as_far_as_plans_count_it_again(tmp_path, monkeypatch):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("VmRSS:\t 900 kB\nRssAnon:\t 300 kB\nRssFile:\t 600 kB\n")
    assert own_memory_bytes(tmp_path) == 300 << 10
    assert own_memory_bytes(tmp_path / "nowhere") == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("moegen.plan.machine.host_memory_bytes", lambda: 10 << 30)
    monkeypatch.setattr("moegen.plan.machine.own_memory_bytes", lambda: 3 << 30)
    machine = Machine.detect("cpu")
    assert machine.host_memory_bytes == 10 << 30
    replace(machine, rates=replace(machine.rates, runtime_bytes=1 << 30)).save()
    assert Machine.detect("cpu").host_memory_bytes == 11 << 30


def test_a_machine_can_be_described(tmp_path):
    rates = Rates({"float32": {64: {8: 5e9}}}, decode_bytes_per_s={4: {512: 1e9}}, pass_s=1e-3)
    machine = replace(MACHINE, rates=rates)
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(asdict(machine)))
    assert Machine.read(path) == machine


@pytest.mark.parametrize("text", ["{", "[]", '{"device": "cpu"}', '{"device": "cpu", "speed": 9}'])
def test_a_description_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"machine\.json"):
        Machine.read(path)
    with pytest.raises(SpecError, match="cannot be read"):
        Machine.read(tmp_path / "nowhere.json")


def test_rates_are_kept_for_this_hardware(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = replace(Machine.detect("cpu"), rates=Rates({"float32": {64: {8: 5e9}}}, dram_read_bytes_per_s=1e10))
    machine.save()
    assert Machine.detect("cpu").rates == machine.rates
