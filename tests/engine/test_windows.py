"""Layers with a sliding window: pages that no query sees any more are given back, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from moegen.errors import UnsupportedModel
from moegen.plan.cost import CostModel
from moegen.plan.explain import explain
from moegen.plan.footprint import Footprint
from moegen.plan.nominal import nominal_rates
from moegen.plan.outlook import Outlook
from moegen.plan.search import choose_plan
from moegen.plan.workload import Workload
from moegen.run.certify import engine_model, logit_difference, random_model
from moegen.run.engine import Engine
from moegen.schedule.pages import PageLedger
from moegen.schedule.sequence import Finished, Request
from moegen.shape import ModelShape
from moegen.spec import Engine as Asked
from moegen.spec import PlanOverrides, Sampling
from moegen.text import Tokenizer
from transformers import AutoModelForCausalLM, Gemma2Config, GenerationConfig, GptOssConfig, PreTrainedConfig

from tests.engine.parts import plan, run
from tests.engine.test_batching import _requests, preempted
from tests.engine.test_coded_kv import SMALL
from tests.engine.test_plan import MACHINE, SHAPE
from tests.tiny import tiny_checkpoint

__all__ = ["preempted"]
pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = 11
FULL, SLIDING = "full_attention", "sliding_attention"


def _gpt_oss(*kinds: str) -> PreTrainedConfig:
    sizes = {**SMALL, "num_hidden_layers": len(kinds), "num_experts_per_tok": 2, "num_local_experts": 4}
    return GptOssConfig(**sizes, sliding_window=4, layer_types=list(kinds))


MODELS = {  # sinks: every other layer, all layers, five of six; soft cap, in layers that run whole
    "gpt_oss": (_gpt_oss(SLIDING, FULL), True),
    "all slide": (_gpt_oss(SLIDING, SLIDING), True),
    "five of six": (_gpt_oss(*[SLIDING] * 5, FULL), True),
    "gemma2": (Gemma2Config(**SMALL, sliding_window=4), False),
}


@pytest.mark.parametrize(("config", "staged"), MODELS.values(), ids=MODELS)
def test_logits_are_transformers(config: PreTrainedConfig, staged: bool) -> None:
    """Of sequences of up to 22 tokens, several times the window: chunked, preempted, with a shared prefix."""
    reference = random_model(config)
    host = engine_model(reference, staged=staged)
    assert {shape.window for shape in host.kv_shapes.values()} >= {4}
    assert logit_difference(host, reference) < 1e-4
    for share in (0.0, 0.5, 1.0):
        assert logit_difference(host, reference, share) < 1e-4


@pytest.mark.parametrize("name", ["gpt_oss", "all slide"])
def test_this_comparison_sees_pages_that_are_given_back_too_early(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trim = PageLedger.trim

    def early(self: PageLedger, held: list[list[int]], computed: int, shared: int = 0) -> None:
        before = [list(own) for own in held]
        trim(self, held, computed + self.page_tokens, shared)
        held[:] = before  # still read, but by now somebody else's

    config, staged = MODELS[name]
    reference = random_model(config)
    host = engine_model(reference, staged=staged)
    monkeypatch.setattr(PageLedger, "trim", early)
    assert logit_difference(host, reference) > 1e-2


@pytest.fixture(scope="module", params=[0, 1], ids=["uniform", "mixed"])
def windowed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windowed")
    tiny_checkpoint(folder, seed=6, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=request.param)
    return folder


def _windows(checkpoint: Path) -> tuple[int | None, ...]:
    return choose_plan(ModelShape.read(str(checkpoint)), MACHINE, Asked()).kv_windows


SIZES = [
    {"attention_tokens": 1, "expert_tokens": 1, "page_tokens": 1, "pass_tokens": 7},
    {"attention_tokens": 3, "expert_tokens": 17, "page_tokens": 4, "pass_tokens": 64},
    {"attention_tokens": 33, "expert_tokens": 100, "page_tokens": 5, "pass_tokens": 200},
]


def test_answers_do_not_know_what_is_given_back(windowed: Path, tokenizer: Tokenizer, preempted: list[int]) -> None:
    prefix = tuple(range(40, 72))
    requests = [replace(r, token_ids=prefix + r.token_ids) if r.row_index % 3 else r for r in _requests(greedy=False)]
    requests += [Request(len(requests), (*prefix, 5), Sampling(max_tokens=3), continuations=((1, 2, 3, 4), (4,)))]
    windows = _windows(windowed)
    assert windows == ((WINDOW,) if len(windows) == 1 else (None, WINDOW))

    def answers(shared: tuple[int, ...] = (), **sizes: object) -> dict[int, Finished]:
        own = plan(prefix_tokens=len(shared), **sizes)
        with Engine.load(windowed, own, staged=True, tokenizer=tokenizer) as engine:
            items = [item for item in engine.generate(requests, prefix=shared) if isinstance(item, Finished)]
        return {item.row_index: replace(item, log_likelihoods=tuple(round(x, 3) for x in item.log_likelihoods))
                for item in items}  # fmt: skip

    kept = answers(pass_tokens=1024, kv_pages=512, page_tokens=32, attention_tokens=512)
    assert len(kept) == len(requests)
    assert not preempted
    for sizes in SIZES:
        own = {**sizes, "kv_windows": windows}
        ledger = PageLedger(0, own["page_tokens"], windows, own["pass_tokens"])
        longest = max(ledger.most_pages(len(r.token_ids) + r.params.max_tokens) for r in requests)
        rating = ledger.most_pages(len(prefix) + 4, whole=True)
        assert answers(**own, kv_pages=max(longest, rating) + 1) == kept
        assert answers(prefix, **own, kv_pages=longest + rating) == kept
    assert preempted
    coded = answers(**SIZES[1], kv_pages=200, kv_dtype="int8")
    assert answers(**SIZES[2], kv_pages=200, kv_dtype="int8", kv_windows=windows) == coded


def test_greedy_is_transformers_generate(windowed: Path) -> None:
    """Of answers eight times as long as the window, in a pool that all tokens would not fit."""
    model = AutoModelForCausalLM.from_pretrained(windowed, dtype=torch.float32)
    requests = [Request(row, tuple(range(9 * row, 9 * row + 30)), Sampling(max_tokens=90)) for row in range(6)]
    windows = _windows(windowed)
    sizes = {"page_tokens": 4, "pass_tokens": 40, "kv_windows": windows}
    pages = 6 * 30 * windows.count(None) + 6 * 8 + 30
    with Engine.load(windowed, plan(**sizes, kv_pages=pages), staged=True, tokenizer=None) as engine:
        rows, passes = run(engine, requests)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    for request in requests:
        ids = torch.tensor([request.token_ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=90)
        assert rows[request.row_index].token_ids == tuple(out[0, 30:].tolist())
    assert sum(report.tokens for report in passes) == 6 * (30 + 89), "nobody was preempted"
    assert pages < 6 * 30 * len(windows)


def test_the_pool_is_what_the_planner_counts(windowed: Path) -> None:
    shape = ModelShape.read(str(windowed))
    chosen = replace(choose_plan(shape, MACHINE, Asked(plan=PlanOverrides(kv_pages=50))), threads=1)
    with Engine.load(windowed, chosen, staged=True, tokenizer=None) as engine:
        tables = {id(table): table for pages in engine.pool.layers.values() for table in pages.tables}
    assert chosen.host.kv == sum(table.nbytes for table in tables.values())
    kept = choose_plan(shape, MACHINE, Asked(plan=PlanOverrides(kv_pages=50, free_windows=False)))
    assert kept.kv_windows == (None,)
    assert kept.host.kv == chosen.host.kv * len(chosen.kv_windows)


def test_a_config_that_tells_of_other_windows_is_not_believed(windowed: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"layers' windows are not those of its config.*free_windows: false"):
        Engine.load(windowed, plan(kv_windows=(None, WINDOW + 1)), staged=True, tokenizer=None)


HALF = replace(SHAPE, windows=(128, None) * 4)


def test_more_rows_run_at_once_where_pages_bind() -> None:
    work = Workload.of(100_000, (2000,), (1000,))
    fixed = {"pass_tokens": 512, "resident_groups": 0}
    plans = [
        choose_plan(
            HALF, MACHINE, Asked(host_memory="2GiB", plan=PlanOverrides(free_windows=free, **fixed)), "auto", work
        )
        for free in (True, False)
    ]
    assert [own.kv_windows for own in plans] == [(None, 128), (None,)]
    for own in plans:
        layers = 8 // len(own.kv_windows)
        assert own.host.kv == own.kv_pages * own.page_tokens * 4096 * 2 * layers // 8
        assert own.host.used <= own.host.budget
    assert 1.7 < work.concurrency(plans[0]) / work.concurrency(plans[1]) < 2
    assert plans[0].max_sequence_tokens > 1.8 * plans[1].max_sequence_tokens


def test_decode_attention_reads_no_more_than_the_window() -> None:
    chosen = choose_plan(SHAPE, MACHINE, Asked())
    load = Workload.of(1000, (6000,), (1,)).steady_pass(chosen)
    load = replace(load, decode_sequences=load.tokens * 0 + 10.0, decode_kv_tokens=load.tokens * 0 + 10 * 1280.0)
    whole, half = (
        CostModel(Footprint(shape, "bfloat16", "bfloat16", "bfloat16"), chosen, nominal_rates(MACHINE)).time(load)
        for shape in (SHAPE, HALF)
    )
    assert half.terms["decode attention"] == pytest.approx(0.55 * whole.terms["decode attention"])


def test_the_plan_says_so() -> None:
    text = explain(HALF, MACHINE, Outlook.of(HALF, MACHINE, Asked(), "auto", None))
    assert "of one of 2 groups of layers; 1 of them keep the last 128 tokens alone" in text
    text = explain(SHAPE, MACHINE, Outlook.of(SHAPE, MACHINE, Asked(), "auto", None))
    assert "groups of layers" not in text
    assert Footprint(HALF, "bfloat16", "bfloat16", "bfloat16").page(32) == 32 * 4096


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (GptOssConfig(num_hidden_layers=4), (128, None, 128, None)),
        (Gemma2Config(num_hidden_layers=2, sliding_window=None), ()),
        (GptOssConfig(num_hidden_layers=2, layer_types=[FULL] * 2), ()),
        (GptOssConfig(num_hidden_layers=2, layer_types=[SLIDING, "chunked_attention"]), ()),
    ],
    ids=["gpt_oss", "no window", "none slides", "a kind of its own"],
)
def test_windows_are_read_from_the_config(config: PreTrainedConfig, windows: tuple[int | None, ...]) -> None:
    assert ModelShape.of(config, {}).windows == windows
