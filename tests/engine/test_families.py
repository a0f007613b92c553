"""Every family of the installed transformers with the experts seam: equal, by two comparisons, or refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

import moegen.model.seams
import moegen.ops.attention
import moegen.run.forward
import pytest
import torch
import transformers
from moegen.errors import BudgetError, UnsupportedModel
from moegen.memory.kv_pool import KVPool, groups_of
from moegen.model.host import ModelHost
from moegen.model.seams import SEAMS
from moegen.model.stages import StagedLayer
from moegen.model.tiny import decoder_layers, layers_of_every_kind, tiny_config
from moegen.ops.attention import AttentionRule
from moegen.ops.kv_pages import LayerPages
from moegen.plan.footprint import Footprint
from moegen.row import Status
from moegen.run.certify import certify, engine_model, logit_difference, tiny_reference
from moegen.run.engine import Engine
from moegen.run.families import default_config, families, judge
from moegen.schedule.sequence import Request
from moegen.shape import ModelShape
from moegen.spec import Sampling
from transformers import AutoModelForCausalLM, GptOssConfig, PhimoeConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.families import COMMAND, DOCUMENT, document
from tests.engine.parts import plan, run

RECURRENT = ("bailing_hybrid", "granitemoehybrid", "jamba", "kimi_linear", "lfm2_moe", "minimax", "nemotron_h",
             "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "zaya")  # fmt: skip
CACHE_DIFFERS = ("nemotron_h",)  # clamps the time steps of many tokens and not those of one
INDEXERS = ("axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4")
UNKNOWN_INDEXERS = ("deepseek_v4", "qwen4_exp_text")
PROMPT_LENGTHS, ANSWER_TOKENS = (1, 21, 8, 13), 7
# Sizes unlike those of `certify`, all of which cut these sequences elsewhere.
PLAN = plan(attention_tokens=8, expert_tokens=23, pass_tokens=17, page_tokens=3, kv_pages=16)


@pytest.fixture(scope="module", autouse=True)
def _one_quiet_thread() -> Iterator[None]:
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


def tiny(family: str) -> PreTrainedConfig:
    config = default_config(family)
    with torch.device("meta"):
        full = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return tiny_config(config, layers_of_every_kind(decoder_layers(full)))


def reference_of(config: PreTrainedConfig) -> transformers.PreTrainedModel:
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(101)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(noise * 0.3)
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return model


def engine_of(config: PreTrainedConfig, reference: transformers.PreTrainedModel, way: str) -> Engine:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, **SEAMS)
    model.load_state_dict(reference.state_dict())
    return Engine(ModelHost(model, staged=way == "staged", expert_tokens=PLAN.expert_tokens), PLAN, None)


def prompts_of(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def generated(reference: transformers.PreTrainedModel, prompt: list[int]) -> tuple[int, ...]:
    """transformers' own greedy answer, with its own cache, where that cache gives what a forward without one gives."""
    ids = torch.tensor([prompt])
    cached = reference.config.model_type not in CACHE_DIFFERS
    out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, use_cache=cached)
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", families())
def test_family_is_equal_or_refused(family: str) -> None:
    verdict = judge(family)
    if verdict.way == "refused":
        assert re.match(rf"{family}: (layer type|layers of type) [A-Z]\w+", verdict.reason), verdict.reason
        assert "\n" not in verdict.reason
        return
    config = tiny(family)
    reference = reference_of(config)
    engine = engine_of(config, reference, verdict.way)
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    shape = ModelShape.of(config, shapes)
    assert (shape.latent_kv_per_token or shape.kv_per_token) == _kv_per_token(engine.host)
    assert 4 * shape.state_per_sequence == sum(kept.nbytes for kept in engine.host.state_shapes.values())
    if shape.windows:
        assert shape.windows == tuple(kept.window for kept in engine.host.kv_shapes.values())
        groups = Footprint(shape, "float32", "float32", "float32").layer_groups
        assert groups == groups_of(engine.host.kv_shapes.values())
    prompts = prompts_of(config.get_text_config().vocab_size)
    requests = [Request(row, tuple(p), Sampling(max_tokens=ANSWER_TOKENS)) for row, p in enumerate(prompts)]
    finished, _ = run(engine, requests)
    for row, prompt in enumerate(prompts):
        assert finished[row].status is Status.LENGTH
        assert finished[row].token_ids == generated(reference, prompt), f"row {row}"


def test_at_least_forty_five_families_run() -> None:
    ways = [judge(family).way for family in families()]
    assert sum(way != "refused" for way in ways) >= 45
    assert ways.count("staged") >= 35


def test_recurrent_families_keep_their_state_in_slots() -> None:
    assert tuple(family for family in sorted(families()) if judge(family).keeps_state) == RECURRENT


@pytest.mark.parametrize("family", INDEXERS)
def test_sparse_attention_runs(family: str) -> None:
    assert judge(family).way != "refused"


@pytest.mark.parametrize("family", UNKNOWN_INDEXERS)
def test_sparse_attention_of_another_kind_is_refused_by_name(family: str) -> None:
    assert re.search(r"\w+Indexer\b.* cannot be kept exact", judge(family).reason)


def test_document_is_what_the_run_gives() -> None:
    assert DOCUMENT.read_text() == document(map(judge, families())), f"rewrite it with: {COMMAND}"


# A config may differ from its family's default.

LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "factor": 32.0, "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "short_mscale": 1.0, "long_mscale": 1.0,
}  # fmt: skip
SPARSE_AFTER_FULL = ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (lambda: PhimoeConfig(rope_parameters=LONGROPE), "PhimoeRotaryEmbedding with rope_type 'longrope'"),
        (
            lambda: Qwen3MoeConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "Qwen3MoeRotaryEmbedding with rope_type 'dynamic'",
        ),
        (
            lambda: CONFIG_MAPPING["minimax_m3_vl_text"](layer_types=SPARSE_AFTER_FULL),
            "MiniMaxM3VLIndexer",
        ),
    ],
    ids=["longrope", "dynamic rope", "sparse layers after full ones"],
)
def test_config_with_a_feature_that_depends_on_the_batch_is_refused(config, names: str) -> None:
    with pytest.raises(UnsupportedModel, match=names):
        certify(config())


@pytest.mark.parametrize(
    ("family", "changes", "layers"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 3, "mlp_only_layers": [2]}, 6),  # dense layers by a rule, not by a list
        ("afmoe", {"num_dense_layers": 6}, 8),
        ("ernie4_5_moe", {"moe_layer_start_index": 3}, 4),
        ("mixtral", {}, 2),
        ("flint", {}, 6),
    ],
)
def test_tiny_model_has_a_layer_of_every_kind(family: str, changes: dict, layers: int) -> None:
    with torch.device("meta"):
        full = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**changes))
    assert layers_of_every_kind(decoder_layers(full)) == layers


# The comparison itself must be able to fail: each of these breaks one part of the engine.


def _gpt_oss() -> PreTrainedConfig:
    return GptOssConfig()  # windows, sinks, biases, transposed experts


def test_certify_sees_a_missing_window(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(scaling, window, sinks, softcap):  # type: ignore[no-untyped-def]
        return AttentionRule(scaling, None, sinks, softcap)

    monkeypatch.setattr(moegen.model.seams, "AttentionRule", full)
    with pytest.raises(UnsupportedModel, match=r"GptOssAttention cannot be kept exact \(logits differ by"):
        certify(_gpt_oss())


def test_certify_sees_missing_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    def sinkless(scaling, window, sinks, softcap):  # type: ignore[no-untyped-def]
        return AttentionRule(scaling, window, None, softcap)

    monkeypatch.setattr(moegen.model.seams, "AttentionRule", sinkless)
    with pytest.raises(UnsupportedModel, match="logits differ by"):
        certify(_gpt_oss())


def test_certify_sees_lost_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = ModelHost.logits

    def at_zero(self, token_ids, positions, *rest):  # type: ignore[no-untyped-def]
        return logits(self, token_ids, torch.zeros_like(positions), *rest)

    monkeypatch.setattr(ModelHost, "logits", at_zero)
    with pytest.raises(UnsupportedModel, match="logits differ by"):
        certify(Qwen3MoeConfig())


def test_certify_sees_unwritten_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerPages, "put", lambda *_: None)
    with pytest.raises(UnsupportedModel, match="logits differ by"):
        certify(Qwen3MoeConfig())


def test_certify_sees_tokens_that_no_indexer_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_of_them(places_TK: torch.Tensor, keys: int) -> torch.Tensor:
        return torch.ones(len(places_TK), keys, dtype=torch.bool)

    monkeypatch.setattr(moegen.ops.attention, "_chosen", all_of_them)
    with pytest.raises(UnsupportedModel, match="logits differ by"):
        certify(default_config("deepseek_v32"))


def test_sparse_attention_over_pages_on_the_host_is_refused() -> None:
    reference = tiny_reference(default_config("deepseek_v32"))
    with pytest.raises(BudgetError, match=r"engine\.plan\.kv_home"):
        logit_difference(engine_model(reference, staged=True), reference, on_host=0.5)


def test_certify_sees_a_lost_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = moegen.model.seams.grouped_experts

    def lossy(module, supply, hidden, ids, weights, **options):  # type: ignore[no-untyped-def]
        return whole(module, supply, hidden, ids, weights.masked_fill(ids == 0, 0), **options)

    monkeypatch.setattr(moegen.model.seams, "grouped_experts", lossy)
    with pytest.raises(UnsupportedModel, match="logits differ by"):
        certify(Qwen3MoeConfig())


def test_certify_falls_back_to_whole_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    staged = StagedLayer.forward

    def without_residual(self, hidden, **kwargs):  # type: ignore[no-untyped-def]
        return staged(self, hidden, **kwargs) - hidden

    monkeypatch.setattr(StagedLayer, "forward", without_residual)
    assert certify(Qwen3MoeConfig()) == "seams"


def test_this_comparison_sees_a_mixed_up_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The independent comparison above can fail too."""
    config = tiny("qwen3_moe")
    reference = reference_of(config)
    prompt = prompts_of(97)[1]
    request = Request(0, tuple(prompt), Sampling(max_tokens=ANSWER_TOKENS))

    def answer() -> tuple[int, ...]:
        finished, _ = run(engine_of(config, reference, "staged"), [request])
        return finished[0].token_ids

    assert answer() == generated(reference, prompt)
    kept = LayerPages.kept
    monkeypatch.setattr(LayerPages, "kept", lambda self, keys, values: kept(self, keys, keys))
    assert answer() != generated(reference, prompt)


def _kv_per_token(host: ModelHost) -> int:
    return sum(shape.elements_per_token for shape in host.kv_shapes.values())


def test_pool_has_the_bytes_that_the_layers_ask_for() -> None:
    config = tiny("mimo_v2_flash")  # sliding layers have twice the heads
    host = engine_of(config, reference_of(config), "staged").host
    pool = KVPool(host.kv_shapes, 5, 2, torch.float32, torch.device("cpu"))
    kept = sum(t.nbytes for layer in pool.layers.values() for t in (layer.keys_PGCD, layer.values_PGCD))
    assert kept == 5 * 2 * 4 * _kv_per_token(host)
