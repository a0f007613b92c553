"""int8 pages in whole models: beside transformers, and however rows are batched."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from moegen.errors import SpecError
from moegen.memory.kv_pool import KVPool, KVShape
from moegen.ops.kv_pages import CodedPages
from moegen.plan.explain import explain
from moegen.plan.footprint import Footprint
from moegen.plan.outlook import Outlook
from moegen.plan.search import choose_plan
from moegen.plan.workload import UNKNOWN
from moegen.run.certify import engine_model, logit_difference, random_model
from moegen.run.engine import Engine
from moegen.schedule.sequence import Finished
from moegen.shape import ModelShape
from moegen.spec import Engine as Asked
from moegen.spec import PlanOverrides, from_mapping
from moegen.text import Tokenizer
from transformers import Gemma2Config, GptOssConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.engine.parts import plan, run
from tests.engine.test_batching import _requests, preempted
from tests.engine.test_plan import LATENT, MACHINE, SHAPE

__all__ = ["preempted"]
pytestmark = pytest.mark.usefixtures("one_thread")

CODED = Asked(plan=PlanOverrides(kv_dtype="int8"))
SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ALL_EXPERTS = {"num_experts_per_tok": 4}  # a router that chooses would turn any rounding into another expert
CONFIGS = {  # grouped heads; sinks and windows; soft cap and windows, in layers that run whole
    "qwen3_moe": (Qwen3MoeConfig(**SMALL, **ALL_EXPERTS, num_experts=4, moe_intermediate_size=32), True),
    "gpt_oss": (GptOssConfig(**SMALL, **ALL_EXPERTS, num_local_experts=4, sliding_window=4), True),
    "gemma2": (Gemma2Config(**SMALL, sliding_window=4), False),
}


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """To 255 levels of the largest magnitude of a token and KV head."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / step) * step


def _rounding_attention(module, query, key, value, mask, **options):  # type: ignore[no-untyped-def]
    """transformers' own attention of the model, over rounded keys and values."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, _rounded(key), _rounded(value), mask, **options)


ALL_ATTENTION_FUNCTIONS.register("rounding", _rounding_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("rounding", eager_mask)


def _rounding(reference: PreTrainedModel) -> PreTrainedModel:
    rounding = copy.deepcopy(reference)
    rounding.set_attn_implementation("rounding")
    return rounding


@pytest.mark.parametrize(("config", "staged"), CONFIGS.values(), ids=CONFIGS)
def test_logits_are_transformers_within_the_rounding_of_8_bits(config: PreTrainedConfig, staged: bool) -> None:
    """Ragged, chunked, preempted and with a shared prefix: within 5 % of the largest logit, over random weights.

    And equal to a transformers model whose own attention rounds its keys and values.
    """
    reference = random_model(config)
    host = engine_model(reference, staged=staged)
    assert logit_difference(host, reference) < 1e-5
    assert 1e-4 < logit_difference(host, reference, kv_dtype=torch.int8) < 0.05
    assert logit_difference(host, _rounding(reference), kv_dtype=torch.int8) < 1e-4
    for share in (0.0, 0.5):
        assert logit_difference(host, _rounding(reference), share, torch.int8) < 1e-4


@pytest.mark.parametrize("wrong", ["larger", "exchanged", "of the pass"])
def test_this_comparison_sees_wrong_scales(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = CodedPages.kept

    def wrongly(self: CodedPages, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        key_codes, value_codes, key_scales, value_scales = kept(self, keys, values)
        if wrong == "larger":
            return key_codes, value_codes, key_scales, value_scales * 1.1
        if wrong == "exchanged":
            return key_codes, value_codes, value_scales, key_scales
        return key_codes, value_codes, key_scales.mean().expand_as(key_scales), value_scales

    config, staged = CONFIGS["qwen3_moe"]
    reference = random_model(config)
    host = engine_model(reference, staged=staged)
    monkeypatch.setattr(CodedPages, "kept", wrongly)
    assert logit_difference(host, reference, kv_dtype=torch.int8) > 0.1


SIZES = [
    {"attention_tokens": 1, "expert_tokens": 1, "page_tokens": 1, "kv_pages": 96, "pass_tokens": 7},
    {"attention_tokens": 3, "expert_tokens": 17, "page_tokens": 4, "kv_pages": 24, "pass_tokens": 64},
    {"attention_tokens": 33, "expert_tokens": 100, "page_tokens": 5, "kv_pages": 16, "pass_tokens": 200},
]


def test_answers_do_not_know_how_rows_are_batched(checkpoint: Path, tokenizer: Tokenizer, preempted: list[int]) -> None:
    prefix = tuple(range(40, 72))
    requests = [replace(r, token_ids=prefix + r.token_ids) if r.row_index % 3 else r for r in _requests(greedy=False)]

    def answers(shared: tuple[int, ...] = (), **sizes: int) -> dict[int, Finished]:
        own = plan(kv_dtype="int8", prefix_tokens=len(shared), **sizes)
        with Engine.load(checkpoint, own, staged=True, tokenizer=tokenizer) as engine:
            assert all(isinstance(pages, CodedPages) for pages in engine.pool.layers.values())
            items = [item for item in engine.generate(requests, prefix=shared) if isinstance(item, Finished)]
            return {item.row_index: item for item in items}

    roomy = answers(pass_tokens=1024, kv_pages=512, page_tokens=32, attention_tokens=512)
    assert len(roomy) == len(requests)
    assert not preempted
    for sizes in SIZES:
        larger = {**sizes, "kv_pages": sizes["kv_pages"] + -(-32 // sizes["page_tokens"])}
        assert answers(**larger) == roomy
        assert answers(prefix, **larger) == roomy
    assert preempted
    with Engine.load(checkpoint, plan(), staged=True, tokenizer=tokenizer) as engine:
        exact, _ = run(engine, requests)
    assert exact != roomy  # or nothing was rounded


def test_the_planner_counts_codes_and_scales(checkpoint: Path) -> None:
    shape = ModelShape.read(str(checkpoint))
    chosen = choose_plan(shape, MACHINE, CODED)
    assert chosen.kv_dtype == "int8"
    with Engine.load(checkpoint, replace(plan(), kv_dtype="int8"), staged=True, tokenizer=None) as engine:
        kept = sum(table.nbytes for pages in engine.pool.layers.values() for table in pages.tables)
        own = engine.plan
    footprint = Footprint(shape, chosen.compute_dtype, chosen.expert_dtype, chosen.kv_dtype)
    assert footprint.kv_token * own.page_tokens * own.kv_pages == kept
    assert footprint.kv_token == 2 * 2 * 2 * (8 + 4)  # layers, heads, key and value: elements, and a scale


def test_more_rows_run_at_once_where_pages_bind() -> None:
    plans = [
        choose_plan(SHAPE, MACHINE, Asked(host_memory="2GiB", plan=PlanOverrides(kv_dtype=dtype, pass_tokens=4096)))
        for dtype in ("auto", "int8")
    ]
    assert [chosen.kv_dtype for chosen in plans] == ["bfloat16", "int8"]
    assert plans[1].host.kv == plans[1].kv_pages * plans[1].page_tokens * Footprint(SHAPE, "", "", "int8").kv_token
    assert UNKNOWN.concurrency(plans[1]) > 1.7 * UNKNOWN.concurrency(plans[0])


def test_the_plan_says_so() -> None:
    text = explain(SHAPE, MACHINE, Outlook.of(SHAPE, MACHINE, CODED, "auto", None))
    assert "of int8 codes and their scales, instead of 8.0 KiB of bfloat16, per token" in text
    assert choose_plan(SHAPE, MACHINE, Asked()).kv_dtype == "bfloat16", "never by itself"


def test_latents_are_no_codes() -> None:
    with pytest.raises(SpecError, match=r"engine\.plan\.kv_dtype: 'int8' is for keys and values of heads"):
        KVPool({0: KVShape(1, 24, 16, latent=True)}, 4, 4, torch.int8, torch.device("cpu"))
    with pytest.raises(SpecError, match=r"engine\.plan\.kv_dtype: 'int8' cannot be used for latents.*latent_kv: false"):
        choose_plan(LATENT, MACHINE, CODED)
    heads = Asked(plan=PlanOverrides(kv_dtype="int8", latent_kv=False))
    assert choose_plan(LATENT, MACHINE, heads).kv_dtype == "int8"
    with pytest.raises(SpecError, match=r"engine\.plan\.kv_dtype: 'int4' cannot be used"):
        from_mapping(Asked, {"plan": {"kv_dtype": "int4"}}, "engine")
