"""Latent attention: pages that keep latents, beside transformers' own forward and beside the same heads expanded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from moegen.errors import UnsupportedModel
from moegen.memory.kv_pool import KVPool, KVShape
from moegen.model import latent
from moegen.model.host import ModelHost
from moegen.model.latent import keep_latents
from moegen.model.seams import SEAMS
from moegen.model.tiny import tiny_config
from moegen.ops.attention import AttentionRule, paged_attention, span_attention
from moegen.ops.kv_pages import LatentPages
from moegen.ops.latent_heads import LatentHeads
from moegen.run.certify import TOLERANCE, certify, logit_difference, random_model, tiny_reference
from moegen.run.engine import Engine
from moegen.run.families import default_config
from moegen.schedule.sequence import Request
from moegen.schedule.step import AttentionBatch, Span
from moegen.shape import ModelShape
from moegen.spec import Sampling
from transformers import DeepseekV3Config, Mistral4Config, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.mistral4.modeling_mistral4 import Mistral4ForCausalLM

from tests.engine.parts import plan, run

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32,
    "beta_slow": 1, "original_max_position_embeddings": 4096,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "deepseek_v2": lambda: default_config("deepseek_v2"),
    "deepseek_v3": DeepseekV3Config,
    "YaRN, rotary halves, no q_lora": lambda: DeepseekV3Config(
        rope_parameters=YARN, rope_interleave=False, q_lora_rank=None
    ),
    **{name: lambda name=name: CONFIG_MAPPING[name]() for name in ("axk1", "glm4_moe_lite", "minicpm3", "youtu",
                                                                   "longcat_flash")},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def host(reference: PreTrainedModel, *, latent_kv: bool = True) -> ModelHost:
    """The reference's weights in the engine's hands, its layers whole."""
    model = type(reference)._from_config(copy.deepcopy(reference.config), dtype=torch.float32, **SEAMS)
    model.load_state_dict(reference.state_dict())
    return ModelHost(model, staged=False, expert_tokens=7, latent_kv=latent_kv)


def kept_bytes(model: ModelHost, dtype: torch.dtype) -> int:
    """Of one token, measured in the pool."""
    pool = KVPool(model.kv_shapes, 5, 4, dtype, CPU)
    tables = [table for pages in pool.layers.values() for table in pages.tables]
    assert all(pages.page_bytes * 5 == sum(t.nbytes for t in pages.tables) for pages in pool.layers.values())
    return sum(table.untyped_storage().nbytes() for table in tables) // 20


def shape_of(reference: PreTrainedModel) -> ModelShape:
    return ModelShape.of(reference.config, {name: tuple(t.shape) for name, t in reference.state_dict().items()})


# Families ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_latents_of_a_family_are_exact(name: str) -> None:
    reference = tiny_reference(CONFIGS[name]())
    model, shape = host(reference), shape_of(reference)
    text = reference.config.get_text_config()
    attentions = len(model.kv_shapes)
    assert kept_bytes(model, torch.bfloat16) == (text.kv_lora_rank + text.qk_rope_head_dim) * attentions * 2
    assert all(kept.latent for kept in model.kv_shapes.values())
    assert shape.latent_kv_per_token == sum(kept.elements_per_token for kept in model.kv_shapes.values())
    for on_host in (None, 0.5):
        assert logit_difference(model, reference, on_host) <= TOLERANCE


def test_latents_of_a_model_that_has_no_causal_auto_class_are_exact() -> None:
    """Its query grows with the position."""
    beyond = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}
    config = Mistral4Config(n_routed_experts=8, num_experts_per_tok=2)
    config.rope_parameters = {**config.rope_parameters, **beyond}
    small = tiny_config(config, 2)
    small.architectures = None
    reference = _random_of(Mistral4ForCausalLM, small)
    assert logit_difference(host(reference), reference) <= TOLERANCE / 10


def _random_of(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(2)
    model = kind._from_config(config, attn_implementation="eager", experts_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.7 / parameter.shape[-1] ** 0.5))
    return model


def test_deepseek_v3_at_its_true_rank_and_heads() -> None:
    """Few layers, few experts, a small hidden size; its attention has 128 heads over 512 + 64 elements of a token."""
    config = tiny_config(DeepseekV3Config(), 2)
    config.num_attention_heads = config.num_key_value_heads = 128
    config.kv_lora_rank, config.first_k_dense_replace = 512, 1
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (128, 64, 128)
    reference = random_model(config)
    model = host(reference)
    assert kept_bytes(model, torch.bfloat16) == (512 + 64) * 2 * 2
    assert shape_of(reference).kv_per_token == 128 * 320 * 2  # of expanded heads: 71 times as much
    assert logit_difference(model, reference) <= TOLERANCE


def test_a_module_of_other_parts_keeps_its_heads_and_certify_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = tiny_reference(DeepseekV3Config())
    for change in ({"expand_kv": None}, {"kv_lora_rank": "16"}, {"v_head_dim": 77}, {"kv_b_proj": None}):
        model = copy.deepcopy(reference)
        for layer in model.model.layers:
            for name, value in change.items():
                setattr(layer.self_attn, name, value)
        assert keep_latents(model, torch.float32) == 0
    monkeypatch.setattr(latent, "_is_latent", lambda module: False)
    with pytest.raises(UnsupportedModel, match=r"DeepseekV3Attention are not made of the known .*latent_kv: false"):
        certify(DeepseekV3Config())
    assert certify(DeepseekV3Config(), latent_kv=False) == "staged"


@pytest.mark.parametrize("part", ["absorb", "lift"])
def test_certify_sees_a_head_that_is_absorbed_wrongly(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(LatentHeads, part)

    def wrong(self: LatentHeads, x_SHI: torch.Tensor) -> torch.Tensor:
        return right(self, x_SHI.roll(1, dims=1)).roll(-1, dims=1)  # with the next head's matrix

    monkeypatch.setattr(LatentHeads, part, wrong)
    with pytest.raises(UnsupportedModel, match="logits differ by"):
        certify(DeepseekV3Config())


# A whole engine ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V3 in bfloat16, on disk."""
    folder = tmp_path_factory.mktemp("deepseek")
    tiny_reference(DeepseekV3Config()).bfloat16().save_pretrained(folder)
    return folder


def answers(folder: Path, **sizes: Any) -> dict[int, tuple[int, ...]]:
    requests = [
        Request(row, tuple((row * 31 + i * 7) % 90 for i in range(1 + row * row % 47)), Sampling(max_tokens=12))
        for row in range(10)
    ]
    with Engine.load(folder, plan(**sizes), staged=True, tokenizer=None) as engine:
        rows, _ = run(engine, requests)
        assert {shape.latent for shape in engine.host.kv_shapes.values()} == {sizes.get("latent_kv", True)}
    return {row: finished.token_ids for row, finished in rows.items()}


def test_answers_do_not_know_what_the_pages_keep(stored: Path) -> None:
    roomy = {"pass_tokens": 300, "attention_tokens": 128, "kv_pages": 200}
    narrow = {"pass_tokens": 30, "attention_tokens": 7, "page_tokens": 4, "kv_pages": 40}  # cut prompts, preemption
    expected = answers(stored, latent_kv=False, **roomy)
    assert answers(stored, **roomy) == expected
    assert answers(stored, **narrow, expert_dtype="bfloat16") == expected  # up-projections too, as they are stored


# Heads ---------------------------------------------------------------------------------------------------------------


def heads_of(dtype: torch.dtype, rank: int = 40, heads: int = 6) -> tuple[LatentHeads, torch.Tensor]:
    weight_HOR = torch.randn(heads, 24 + 16, rank, generator=torch.Generator().manual_seed(4)).to(dtype) / rank**0.5
    return LatentHeads.of(weight_HOR.flatten(0, 1), heads, 24, torch.bfloat16), weight_HOR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["panels", "plain"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 30), (30, 30), (4, 9)])
def test_absorbed_is_expanded(queries: int, keys: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways against a float64 expansion of every head; bfloat16 is computed in itself."""
    heads, weight_HOR = heads_of(dtype)
    generator = torch.Generator().manual_seed(keys)
    kept_LW = torch.randn(keys, 40 + 8, generator=generator).to(dtype)
    query_THD = torch.randn(queries, 6, 24 + 8, generator=generator).to(dtype)
    rule, span = AttentionRule(0.3), Span(0, queries, keys, [])
    expanded_LHO = torch.einsum("lr,hor->lho", kept_LW[:, :40].double(), weight_HOR.double())
    rope_LHE = kept_LW[:, None, 40:].double().expand(-1, 6, -1)
    keys_GLD = torch.cat([expanded_LHO[..., :24], rope_LHE], -1).transpose(0, 1)
    wanted = span_attention(query_THD.double(), keys_GLD, expanded_LHO[..., 24:].transpose(0, 1), 0, span, rule)
    tolerance = 2e-6 if dtype == torch.float32 else 0.05
    for absorb in (True, False):
        monkeypatch.setattr(LatentHeads, "_absorbing_pays", lambda *_, absorb=absorb: absorb)
        for at_once in (1, 1 << 20):  # one head at a time, and all
            monkeypatch.setattr("moegen.ops.latent_heads._EXPANDED_BYTES", at_once)
            out = span_attention(query_THD, kept_LW[None], kept_LW[None, :, :40], 0, span, replace(rule, latent=heads))
            assert torch.allclose(out.double(), wanted, atol=tolerance), (absorb, at_once)


def test_few_queries_absorb_and_prompts_expand() -> None:
    heads = LatentHeads.of(torch.zeros(2 * 256, 512), 2, 128, torch.float32)
    assert heads._absorbing_pays(1, 2, 576)
    assert heads._absorbing_pays(64, 4000, 576)
    assert not heads._absorbing_pays(512, 4000, 576)  # at 3.4 times the price of a pair
    assert not heads._absorbing_pays(100, 100, 576)
    assert heads.absorbed(1000, 576) == 1000
    assert 1 <= replace(heads, rank=1 << 24).absorbed(1000, 1 << 24) < 10


def test_plain_up_projections_are_views_and_panels_keep_what_is_stored() -> None:
    assert heads_of(torch.bfloat16)[0].nbytes == 0
    exact = LatentHeads.of(torch.ones(2 * 96, 64), 2, 32, torch.bfloat16)
    assert exact.nbytes == 2 * 2 * (32 * 64 + 64 * 32 + 64 * 64)
    rounded = LatentHeads.of(torch.full((2 * 96, 64), 0.1), 2, 32, torch.bfloat16)
    assert rounded.nbytes == 2 * exact.nbytes


# The kernel ----------------------------------------------------------------------------------------------------------


class Latents:
    """Sequences with random latents in shuffled pages, beside which lies what must never be met, and their queries."""

    def __init__(
        self, lengths: tuple[int, ...], heads: int, width: int, rank: int, page_tokens: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(page_tokens)
        used = [-(-n // page_tokens) for n in lengths]
        order = np.random.default_rng(0).permutation(sum(used)).tolist()
        kept = torch.full((sum(used), 1, page_tokens, width), 1e4, dtype=dtype)
        self.spans, self.kept = [], []
        for row, (length, pages) in enumerate(zip(lengths, used, strict=True)):
            span = Span(row, 1, length, [order.pop() for _ in range(pages)])
            self.kept.append(torch.randn(length, width, generator=generator).to(dtype))
            for token, latent_W in enumerate(self.kept[-1]):
                kept[span.pages[token // page_tokens], 0, token % page_tokens] = latent_W
            self.spans.append(span)
        self.pages = LatentPages.of(kept, rank)
        self.rank = rank
        self.query_SHW = torch.randn(len(lengths), heads, width, generator=generator)

    def batch(self, *spans: Span) -> AttentionBatch:
        nothing = np.zeros(len(spans), np.int64)
        return AttentionBatch(0, len(spans), spans, nothing, nothing)

    def kernel(self, rule: AttentionRule) -> torch.Tensor:
        return paged_attention(self.query_SHW, self.pages, self.batch(*self.spans), rule)

    def naive(self, rule: AttentionRule) -> torch.Tensor:
        """In float64, a sequence at a time."""
        out = []
        for query_HW, kept_LW in zip(self.query_SHW, self.kept, strict=True):
            first = max(len(kept_LW) - rule.sliding_window, 0) if rule.sliding_window else 0
            seen_LW = kept_LW[first:].double()
            out.append((query_HW.double() @ seen_LW.T * rule.scaling).softmax(-1) @ seen_LW[:, : self.rank])
        return torch.stack(out)


CASES = {
    "a head": ((1, 40, 7), 1, 24, 16, 4),
    "odd everything": ((1, 40, 129, 300), 7, 45, 37, 5),
    "two blocks of heads": ((5, 100), 100, 80, 64, 16),
    "long, in pieces": ((2500, 1024, 1025, 3), 9, 72, 64, 32),
    "pages of more than a step": ((700, 256, 257), 4, 40, 32, 256),
    "DeepSeek-V3": ((200, 33), 128, 576, 512, 32),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_a_softmax(name: str, dtype: torch.dtype) -> None:
    case = Latents(*CASES[name], dtype)
    for window in (None, 1, 30, 1100):
        rule = AttentionRule(2 / case.query_SHW.shape[-1] ** 0.5, window)
        assert torch.allclose(case.kernel(rule).double(), case.naive(rule), atol=1e-5), window


def test_neither_threads_nor_company_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case, rule = Latents((2500, 30, 1025, 400), 70, 80, 64, 32, torch.bfloat16), AttentionRule(0.2)
    together = case.kernel(rule)
    with monkeypatch.context() as patch:  # one thread, which is all that Numba has here, plays three
        patch.setattr("moegen.ops.paged_kernel.numba_threads", lambda: 3)
        assert torch.equal(case.kernel(rule), together)
    for row, span in enumerate(case.spans):
        alone = case.batch(replace(span, first=0))
        assert torch.equal(paged_attention(case.query_SHW[row : row + 1], case.pages, alone, rule)[0], together[row])


def test_decode_absorbs_some_sequences_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, _ = heads_of(torch.float32)
    case = Latents((9, 80, 33), 6, 48, 40, 16, torch.float32)
    query_SHD = case.query_SHW[..., : 24 + 8]
    rule = AttentionRule(0.2, latent=heads)
    whole = paged_attention(query_SHD, case.pages, case.batch(*case.spans), rule)
    monkeypatch.setattr("moegen.ops.latent_heads._ABSORBED_BYTES", 1)
    assert torch.equal(paged_attention(query_SHD, case.pages, case.batch(*case.spans), rule), whole)
    torch_way = paged_attention(query_SHD, case.pages, case.batch(*case.spans), rule, use_kernel=False)
    assert torch.allclose(whole, torch_way, atol=2e-6)


def test_a_latent_is_kept_once() -> None:
    shape = KVShape(1, 576, 512, latent=True)
    pages = KVPool({0: shape}, 3, 4, torch.bfloat16, CPU).layers[0]
    assert pages.page_bytes == 4 * 576 * 2 == 4 * shape.elements_per_token * 2
    keys, values = pages.rows(np.array([2, 0]))
    assert values.data_ptr() == keys.data_ptr() == keys[..., :512].data_ptr()
    assert values.shape == (2, 1, 4, 512)
