"""Recurrent layers: states in slots, whatever else is in the pass."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace

import moegen.model.recurrent
import numpy as np
import pytest
import torch
import transformers
from moegen.errors import BudgetError, SpecError, UnsupportedModel
from moegen.memory.state_pool import LayerStates, StatePool, StateShape
from moegen.model.host import ModelHost
from moegen.model.recurrent import RecurrentModule, StateView
from moegen.model.seams import SEAMS
from moegen.plan.explain import explain
from moegen.plan.machine import Machine
from moegen.plan.outlook import Outlook
from moegen.plan.predict import simulate
from moegen.plan.search import choose_plan
from moegen.plan.workload import Workload
from moegen.run.certify import certify
from moegen.run.engine import Engine
from moegen.run.families import default_config, verdicts
from moegen.schedule.pages import PageLedger
from moegen.schedule.scheduler import Scheduler
from moegen.schedule.sequence import Request
from moegen.schedule.slots import SlotLedger, state_calls
from moegen.schedule.step import AttentionBatch, Span
from moegen.shape import ModelShape
from moegen.spec import Engine as EngineSpec
from moegen.spec import PlanOverrides, Sampling
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.engine.parts import plan, run
from tests.engine.test_families import reference_of, tiny

CPU = torch.device("cpu")
# One of every kind of state: gated delta rule, of Kimi beside latents, Mamba 1 and 2, convolution, lightning, and one
# inside attention.
KINDS = ("qwen3_next", "kimi_linear", "jamba", "granitemoehybrid", "nemotron_h", "lfm2_moe", "minimax", "zaya")
MORE = ("qwen3_next", "jamba", "zaya")  # in every size
SIZES = [
    {"attention_tokens": 512, "expert_tokens": 4096, "pass_tokens": 512, "kv_pages": 512},
    {"attention_tokens": 3, "expert_tokens": 17, "pass_tokens": 33, "page_tokens": 4, "kv_pages": 13},  # preemption
    {"attention_tokens": 13, "expert_tokens": 64, "pass_tokens": 16, "kv_pages": 100, "state_slots": 2},
]


@pytest.fixture(scope="module", autouse=True)
def _one_quiet_thread() -> Iterator[None]:
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    """References by family, made once."""
    return {family: reference_of(tiny(family)) for family in KINDS}


def engine(model: PreTrainedModel, *, staged: bool = False, **sizes: int) -> Engine:
    own = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=torch.float32, **SEAMS)
    own.load_state_dict(model.state_dict())
    chosen = plan(**sizes)
    return Engine(ModelHost(own, staged=staged, expert_tokens=chosen.expert_tokens), chosen, None)


def requests(rows: int = 8) -> list[Request]:
    """Ragged prompts of 1 to 40 tokens, answers of 1 to 9."""
    dice = random.Random(6)
    return [
        Request(row, tuple(dice.randrange(1, 97) for _ in range(dice.choice([1, 2, 3, 9, 26, 40]))),
                Sampling(max_tokens=dice.randint(1, 9)))
        for row in range(rows)
    ]  # fmt: skip


@torch.inference_mode()
def answer(model: PreTrainedModel, request: Request) -> tuple[int, ...]:
    """Greedy, each token from a forward of all before it, with no cache."""
    tokens = list(request.token_ids)
    for _ in range(request.params.max_tokens):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tuple(tokens[len(request.token_ids) :])


@pytest.fixture(scope="module")
def answers(models: dict[str, PreTrainedModel]) -> dict[str, list[tuple[int, ...]]]:
    return {family: [answer(model, request) for request in requests()] for family, model in models.items()}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [*((family, SIZES[1]) for family in KINDS), *((family, SIZES[i]) for family in MORE for i in (0, 2))],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_answers_are_transformers(
    family: str, sizes: dict[str, int], models: dict[str, PreTrainedModel],
    answers: dict[str, list[tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    preempted: list[int] = []
    preempt = Scheduler._preempt

    def counting(self: Scheduler, sequence) -> None:  # type: ignore[no-untyped-def]
        preempted.append(sequence.computed)
        preempt(self, sequence)

    monkeypatch.setattr(Scheduler, "_preempt", counting)
    with engine(models[family], staged=family not in ("minimax", "zaya"), **sizes) as running:
        finished, reports = run(running, requests())
    assert [finished[row].token_ids for row in range(len(finished))] == answers[family]
    assert max(report.running for report in reports) <= sizes.get("state_slots", 64)
    assert bool(preempted) == (sizes["kv_pages"] * sizes.get("page_tokens", 8) < 100)


@pytest.mark.parametrize("family", ["qwen3_next", "jamba", "zaya"])
def test_continuations_are_rated_as_transformers_does(family: str, models: dict[str, PreTrainedModel]) -> None:
    model, dice = models[family], random.Random(2)
    asked = [
        replace(request, continuations=tuple(
            tuple(dice.randrange(97) for _ in range(length)) for length in (1, 3, 6)[: 1 + request.row_index % 3]
        ), params=Sampling(max_tokens=6))
        for request in requests(6)
    ]  # fmt: skip
    with engine(model, pass_tokens=17, attention_tokens=5, state_slots=3) as running:
        finished, _ = run(running, asked)
    for request in asked:
        for rated, continuation in zip(finished[request.row_index].log_likelihoods, request.continuations, strict=True):
            with torch.inference_mode():
                logits = model(torch.tensor([[*request.token_ids, *continuation]]), use_cache=False).logits[0]
            places = range(len(request.token_ids) - 1, len(request.token_ids) - 1 + len(continuation))
            log_probs = logits.double().log_softmax(-1)
            expected = sum(float(log_probs[p, t]) for p, t in zip(places, continuation, strict=True))
            assert rated == pytest.approx(expected, abs=2e-3)  # float32, through a matrix per head


def test_a_shared_beginning_is_not_shared(models: dict[str, PreTrainedModel]) -> None:
    """Its keys and values could be, its state is not kept."""
    common = tuple(range(1, 25))
    asked = [Request(row, (*common, row + 30), Sampling(max_tokens=3)) for row in range(4)]
    with engine(models["qwen3_next"], page_tokens=4, prefix_tokens=24) as running:
        items = [item for item in running.generate(asked, prefix=common) if hasattr(item, "token_ids")]
    assert {item.row_index: item.token_ids for item in items} == {
        request.row_index: answer(models["qwen3_next"], request) for request in asked
    }


@pytest.mark.parametrize("staged", [True, False])
def test_a_stage_that_begins_anew_begins_with_the_old_states(staged: bool, models: dict[str, PreTrainedModel]) -> None:
    model = models["qwen3_next"]
    sizes = {"attention_tokens": 512, "pass_tokens": 200, "expert_tokens": 4096, "kv_pages": 200}
    with engine(model, staged=staged, **sizes) as running:
        running.states = StatePool(running.host.state_shapes, 64, CPU, can_begin_anew=True)
        expected, _ = run(running, requests())
        # Fails in the middle of a stage that has changed states already, more than once.
        call, fails = RecurrentModule.call, iter([3, 5, 11, 40])
        count, next_failure = 0, next(fails)

        def failing(self: RecurrentModule, hidden: torch.Tensor, view: StateView) -> list[torch.Tensor]:
            nonlocal count, next_failure
            count += 1
            if count == next_failure:
                next_failure = next(fails, -1)
                raise torch.OutOfMemoryError("Tried to allocate too much")
            return call(self, hidden, view)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(RecurrentModule, "call", failing)
            again, _ = run(running, requests())
        assert next_failure == -1
        assert again == expected


# The comparison must be able to fail: each of these breaks one part.


def test_certify_sees_states_that_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerStates, "scatter", lambda *_: None)
    with pytest.raises(UnsupportedModel, match="logits differ by"):
        certify(default_config("lfm2_moe"))


def test_certify_sees_slots_that_are_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = LayerStates.gather
    monkeypatch.setattr(LayerStates, "gather", lambda self, slots, device: gather(self, np.roll(slots, 1), device))
    with pytest.raises(UnsupportedModel, match="logits differ by"):
        certify(default_config("lfm2_moe"))


def test_certify_sees_a_state_that_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jamba's scan takes no state for more than one token."""
    monkeypatch.setattr(RecurrentModule, "_ignores", lambda *_: False)
    with pytest.raises(UnsupportedModel, match="logits differ by"):
        certify(default_config("jamba"))


def test_certify_sees_a_state_left_by_another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = moegen.model.recurrent.state_calls

    def never_fresh(batch: AttentionBatch, *, one_by_one: bool):  # type: ignore[no-untyped-def]
        return (replace(call, fresh=False) for call in calls(batch, one_by_one=one_by_one))

    monkeypatch.setattr(moegen.model.recurrent, "state_calls", never_fresh)
    with pytest.raises(UnsupportedModel, match="logits differ by"):
        certify(default_config("lfm2_moe"))


def test_certify_sees_time_steps_that_are_clamped_only_in_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moegen.model.recurrent, "_clamps_steps", lambda module: False)
    with pytest.raises(UnsupportedModel, match="logits differ by"):
        certify(default_config("nemotron_h"))


# Slots and their bytes.


def batch_of(*spans: tuple[int, int, int]) -> AttentionBatch:
    """(length, tokens of the sequence so far, slot) of each span."""
    made, first = [], 0
    for length, so_far, slot in spans:
        made.append(Span(first, length, so_far, [], slot))
        first += length
    nothing = np.zeros(first, np.int64)
    return AttentionBatch(0, first, tuple(made), nothing, nothing)


def test_decode_tokens_are_one_call_and_prompts_of_one_length_another() -> None:
    batch = batch_of((1, 9, 4), (1, 1, 2), (3, 3, 0), (1, 5, 1), (3, 3, 3), (3, 8, 5))
    found = {(call.fresh, call.rows.shape[1]): call for call in state_calls(batch, one_by_one=False)}
    assert {key: call.slots.tolist() for key, call in found.items()} == {
        (False, 1): [4, 1], (True, 1): [2], (True, 3): [0, 3], (False, 3): [5],
    }  # fmt: skip
    assert found[False, 1].rows.tolist() == [[0], [5]]
    assert found[True, 3].rows.tolist() == [[2, 3, 4], [6, 7, 8]]
    assert [part.slots.tolist() for part in found[True, 3].split(1)] == [[0], [3]]


def test_one_by_one_only_after_a_state() -> None:
    batch = batch_of((3, 3, 0), (2, 6, 1), (3, 9, 2), (1, 4, 3))
    calls = [(call.fresh, call.slots.tolist(), call.rows.tolist()) for call in state_calls(batch, one_by_one=True)]
    assert calls == [
        (True, [0], [[0, 1, 2]]), (False, [3], [[8]]),
        (False, [1, 2], [[3], [5]]), (False, [1, 2], [[4], [6]]), (False, [2], [[7]]),
    ]  # fmt: skip


def test_slots_are_lent_once() -> None:
    ledger = SlotLedger(3)
    held = [ledger.take() for _ in range(3)]
    assert (sorted(held), ledger.free) == ([0, 1, 2], 0)
    ledger.give_back(1)
    assert (ledger.free, ledger.take()) == (1, 1)


@pytest.mark.parametrize("slots", [1, 3, 50])
def test_no_more_sequences_run_than_there_are_slots(slots: int) -> None:
    scheduler = Scheduler(requests(40), PageLedger(24, 4), 30, slots=slots)
    most = 0
    while (step := scheduler.next_step()) is not None:
        held = [sequence.slot for sequence in scheduler.running]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(slots))
        most = max(most, len(held))
        for chunk in step.chunks:
            chunk.sequence.computed += chunk.length
        for sequence in step.sampled:
            sequence.tokens.append(0)
            if not sequence.answer_left:
                scheduler.end(sequence)
    assert 1 < most <= slots or slots == most == 1
    assert scheduler._slots.free == min(slots, 30)


def test_a_pool_has_the_bytes_of_its_slots(models: dict[str, PreTrainedModel]) -> None:
    with engine(models["qwen3_next"], state_slots=5) as running:
        each = sum(shape.nbytes for shape in running.host.state_shapes.values())
        assert running.states.nbytes == 5 * each
        text = models["qwen3_next"].config
        per_layer = (2 * 2 * 64 + 4 * 48) * 4 + 4 * 64 * 48  # a convolution over queries, keys and values; a matrix
        assert each == 4 * 3 * per_layer == 4 * text.layer_types.count("linear_attention") * per_layer


def test_states_come_back_as_they_were() -> None:
    pool = StatePool({"layer": StateShape({"conv 0": ((2,), torch.float32)})}, 4, CPU, can_begin_anew=True)
    layer, slots = pool.layers["layer"], np.array([2, 0])
    layer.scatter(slots, {"conv 0": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    pool.begin("layer", visit := object())
    pool.remember(slots, layer.gather(slots, CPU))
    layer.scatter(slots, {"conv 0": torch.zeros(2, 2)})
    pool.begin("layer", visit)
    assert layer.gather(np.array([0, 2]), CPU)["conv 0"].tolist() == [[3.0, 4.0], [1.0, 2.0]]
    layer.scatter(slots, {"conv 0": torch.zeros(2, 2)})
    pool.begin("layer", object())  # the next pass
    assert not layer.gather(slots, CPU)["conv 0"].any()


def test_an_engine_without_slots_for_states_is_refused(models: dict[str, PreTrainedModel]) -> None:
    with pytest.raises(BudgetError, match=r"engine\.plan\.state_slots"):
        engine(models["lfm2_moe"], state_slots=0)


# Plans.

SHAPE = ModelShape(
    model_type="qwen3_next", layers=48, hidden_size=2048, vocab_size=32_000, heads=16, experts=64, experts_per_token=8,
    max_position_embeddings=4096, dtype="bfloat16", weights=700_000_000, expert_weights=600_000_000,
    kv_per_token=12 * 1024, latent_kv_per_token=None, moe_layers=48, attention_width=2048, tied_head=False,
    state_per_sequence=36 * (32 * 128 * 128 + 8192 * 4),
)  # fmt: skip
MACHINE = Machine("cpu", "a processor", 2, 64 << 30, 0, native_bf16=True)
WORK = Workload.of(5000, (200, 600), (100,))


def test_slots_and_pages_share_the_budget() -> None:
    chosen = choose_plan(SHAPE, MACHINE, EngineSpec(host_memory="16GiB"), workload=WORK)
    assert chosen.host.state == chosen.state_slots * 4 * SHAPE.state_per_sequence
    assert chosen.host.used <= chosen.host.budget
    assert 20 < chosen.state_slots == chosen.max_sequences <= chosen.pass_tokens
    pages_of_all = chosen.state_slots * WORK.mean_context / chosen.page_tokens
    assert pages_of_all <= chosen.kv_pages
    assert WORK.concurrency(chosen) <= chosen.state_slots
    more = choose_plan(SHAPE, MACHINE, EngineSpec(host_memory="24GiB"), workload=WORK)
    assert more.state_slots > 1.3 * chosen.state_slots


def test_slots_by_hand_and_no_shared_beginning() -> None:
    by_hand = EngineSpec(host_memory="16GiB", plan=PlanOverrides(state_slots=7))
    chosen = choose_plan(SHAPE, MACHINE, by_hand, workload=replace(WORK, prefix_tokens=128))
    assert (chosen.state_slots, chosen.prefix_tokens) == (7, 0)
    decoding = simulate(chosen, replace(WORK, rows=60)).load.sequences
    assert decoding.max() == 7
    with pytest.raises(SpecError, match=r"engine\.plan\.state_slots"):
        PlanOverrides(state_slots=0)
    without = choose_plan(replace(SHAPE, state_per_sequence=0), MACHINE, by_hand, workload=WORK)
    assert (without.state_slots, without.host.state) == (0, 0)


def test_a_plan_says_what_a_sequence_takes() -> None:
    outlook = Outlook.of(SHAPE, MACHINE, EngineSpec(host_memory="16GiB"), "auto", None)
    text = explain(SHAPE, MACHINE, outlook)
    assert "state     76.5 MiB per running sequence" in text
    assert f"slots     {outlook.plan.state_slots} sequences run at once" in text
    assert outlook.to_mapping()["state_slots"] == outlook.plan.state_slots


def test_a_budget_without_room_for_one_slot_says_so() -> None:
    with pytest.raises(BudgetError, match="for state slots"):
        choose_plan(replace(SHAPE, state_per_sequence=1 << 31), MACHINE, EngineSpec(host_memory="4GiB"))


def test_no_such_family() -> None:
    with pytest.raises(SpecError, match=r"'gpt2' is none of the .* choose from afmoe, "):
        list(verdicts("gpt2"))
    (found,) = verdicts("lfm2_moe")
    assert (found.way, found.keeps_state, found.keeps_latents) == ("staged", True, False)
