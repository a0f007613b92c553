"""The engine: passes until every sequence is finished."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moegen.errors import BudgetError, UnsupportedModel
from moegen.memory.checkpoint import Checkpoint, local_checkpoint
from moegen.memory.device_limit import limit_allocations
from moegen.memory.kv_pool import KVPool, groups_of
from moegen.memory.state_pool import StatePool
from moegen.memory.stored_experts import ExpertSource
from moegen.memory.weight_home import Arithmetic, WeightHomes
from moegen.memory.weight_stream import StreamedExperts, WeightStream
from moegen.model.host import ModelHost
from moegen.ops.host_memory import keep_freed_memory
from moegen.ops.hosted_attention import HostedAttention
from moegen.ops.likelihood import rate_continuations, token_logprobs
from moegen.ops.link import Link
from moegen.ops.micro_batch import MicroBatch
from moegen.ops.sampling import sample
from moegen.ops.threads import use_threads
from moegen.ops.weight_codes import OWN_CODINGS
from moegen.plan.plan import Plan
from moegen.row import RowError, Status
from moegen.run.certify import certify
from moegen.run.forward import forward
from moegen.run.masks import Masks
from moegen.run.stats import PassReport, Recorder, Traffic
from moegen.schedule.pages import LayerGroup
from moegen.schedule.scheduler import WINDOW_ROWS, Scheduler
from moegen.schedule.sequence import Begun, Finished, Request, Sequence
from moegen.schedule.step import Step
from moegen.shape import read_config

if TYPE_CHECKING:
    from moegen.text import TextStream, Tokenizer

log = logging.getLogger(__name__)


class Engine:
    """A loaded model and its KV pool. Use as a context manager; the memory is free after it."""

    def __init__(
        self,
        host: ModelHost,
        plan: Plan,
        tokenizer: Tokenizer | None,
        recorder: Recorder | None = None,
        borrowed: ExitStack | None = None,
        link: Link | None = None,
    ) -> None:
        """`recorder` is the host's observer, if it has one; `borrowed` is closed with the engine.

        `link` is used where a GPU's KV pages are on the host; None: one of the engine's own.
        """
        self.plan = plan
        self.tokenizer = tokenizer
        self.host = host
        self.recorder = recorder or Recorder()
        self._borrowed = borrowed or ExitStack()
        self._attention = MicroBatch(plan.attention_tokens, "attention")
        self.pool = _pool(host, plan, link or Link(host.device))
        self.pool.make_present(plan.ready_pages, plan.threads)
        self.states = _states(host, plan)

    @classmethod
    def open(cls, model_uri: str, plan: Plan, *, tokenizer: Tokenizer | None) -> Engine:
        """Proves the model's family exact, loads the checkpoint, makes the pool.

        `tokenizer` gives answers their text and their end; without one (ids only), only `max_tokens` and
        `stop_token_ids` end an answer.

        Raises:
            UnsupportedModel: the engine cannot keep this model exact; names the layer type.
            CheckpointError: tensors are missing, damaged or of another shape.
            StorageError: the disk or a file fails.
            BudgetError: the device has no room for what the plan puts there.
        """
        started = time.monotonic()
        use_threads(plan.threads)
        keep_freed_memory()
        way = certify(read_config(model_uri), latent_kv=plan.latent_kv)
        with ExitStack() as stack:
            folder = stack.enter_context(local_checkpoint(model_uri))
            engine = cls.load(folder, plan, staged=way == "staged", tokenizer=tokenizer)
            engine._borrowed.push(stack.pop_all())
        log.info("model loaded in %.1f s, runs %s in %s", time.monotonic() - started, way, plan.compute_dtype)
        return engine

    @classmethod
    def load(cls, folder: Path, plan: Plan, *, staged: bool, tokenizer: Tokenizer | None) -> Engine:
        """As `open`, of a local checkpoint whose family is known to be exact."""
        device, compute_dtype = torch.device(plan.device), getattr(torch, plan.compute_dtype)
        expert_dtype, readers = getattr(torch, plan.expert_dtype), max(plan.reader_threads, 1)
        with _loading(), ExitStack() as stack:
            if plan.device_memory.budget:
                limit_allocations(device, plan.device_memory.budget)
            checkpoint = stack.enter_context(Checkpoint(folder))
            model, sources = checkpoint.load_dense(compute_dtype, device)
            _require_executable(plan, sources)
            homes = stack.enter_context(
                WeightHomes.settle(
                    sources,
                    checkpoint.files,
                    Arithmetic(device, compute_dtype, expert_dtype, OWN_CODINGS.get(plan.weights), plan.rounded),
                    group_experts=plan.group_experts,
                    resident_groups=plan.resident_groups,
                    host_groups=plan.host_groups,
                    readers=readers,
                )
            )
            slots, depth = plan.stream_slots, plan.stream_depth
            stream = WeightStream(homes, checkpoint.files, slots=slots, depth=depth, readers=readers)
            stack.enter_context(stream)
            reading = readers if depth else 1  # without depth, the thread that computes reads
            link = Link(device)
            recorder = Recorder(lambda: Traffic.of(stream.figures, reading, plan.device, link.bytes_to_device))
            host = ModelHost(
                model,
                staged=staged,
                expert_tokens=plan.expert_tokens,
                latent_kv=plan.latent_kv,
                supplies={layer: StreamedExperts(stream, pieces) for layer, pieces in homes.pieces.items()},
                stored_dtype=expert_dtype,
                rounded=plan.rounded,
                observer=recorder,
            )
            return cls(host, plan, tokenizer, recorder, stack.pop_all(), link)
        raise AssertionError  # no context above swallows errors

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self._borrowed.close()
        del self.host, self.pool, self.states

    def generate(
        self, requests: Iterable[Request], *, prefix: tuple[int, ...] = (), window: int = WINDOW_ROWS
    ) -> Generator[Begun | Finished | PassReport, None, None]:
        """Runs requests as they come from the iterator, drawn `window` at a time and only as pages become free.

        Of `prefix`, token ids with which most of them begin, the plan's `prefix_tokens` are computed once for all; not
        so where layers carry a state.

        Yields which rows enter before the pass in which they do, each row as it ends, in any order, and one report
        after every pass.
        """
        plan = self.plan
        shared = () if self.host.state_shapes else prefix[: plan.prefix_tokens]
        slots = plan.max_sequences
        scheduler = Scheduler(requests, plan.ledger(), plan.pass_tokens, plan.level_tokens, window, shared, slots)
        texts: dict[Sequence, TextStream] = {}
        self.recorder.begin()
        with Masks() as masks:
            while True:
                step = scheduler.next_step()
                while scheduler.refused:
                    yield scheduler.refused.pop()
                if step is None:
                    return
                if scheduler.begun:
                    yield Begun(tuple(scheduler.begun))
                    scheduler.begun.clear()
                masks.begin(step.sampled)
                yield from self._advance(step, self._next_tokens(step, masks), texts, scheduler, masks)
                report = self.recorder.end_pass(step, len(scheduler.running))
                log.debug("pass: %s", report)
                yield report

    def _next_tokens(self, step: Step, masks: Masks) -> list[int]:
        """One pass: the next token of every sequence that is complete so far; continuations are rated on the way."""
        tokens: list[int] = []
        first, plan = 0, self.plan
        kept = torch.from_numpy(step.kept)
        pieces = forward(
            self.host, self.pool, step, self._attention, states=self.states, logit_tokens=plan.logit_tokens, keep=kept
        )
        for logits in pieces:
            sampled = step.sampled[first : first + len(logits)]
            if sampled:
                allowed = masks.take()
                own = logits[: len(sampled)]
                new = sample(own, sampled, None if allowed is None else allowed[first : first + len(sampled)])
                token_logprobs(own, sampled, new)
                tokens += new
            if len(sampled) < len(logits):
                rest = logits[len(sampled) :]
                start = first + len(sampled) - len(step.sampled)
                rate_continuations(rest, step.scored[start : start + len(rest)])
            first += len(logits)
        return tokens

    def _advance(
        self, step: Step, tokens: list[int], texts: dict[Sequence, TextStream], scheduler: Scheduler, masks: Masks
    ) -> Iterator[Finished]:
        for chunk in step.chunks:
            chunk.sequence.computed += chunk.length
        yield from _advance_scored(step, scheduler, keeps_state=bool(self.host.state_shapes))
        for sequence, token in zip(step.sampled, tokens, strict=True):
            if self.tokenizer is not None and sequence not in texts:
                texts[sequence] = self.tokenizer.stream(sequence.request.params.stop)
            given_up = masks.failed(sequence)
            reason = None if given_up else self._append(sequence, token, texts.get(sequence))
            if given_up or reason is not None:
                scheduler.end(sequence)
                masks.forget(sequence)
                text = texts.pop(sequence, None)
                yield _given_up(sequence) if reason is None else _finished(sequence, reason, text)

    def _append(self, sequence: Sequence, token: int, text: TextStream | None) -> str | None:
        """Adds the token; why the answer ends with it, or None."""
        params = sequence.request.params
        sequence.tokens.append(token)
        ends = params.stop_token_ids
        if token in ends or (self.tokenizer and not params.ignore_eos and token in self.tokenizer.eos_token_ids):
            return "stop"
        if text is not None and text.push(token):
            return "stop"
        return "length" if len(sequence.tokens) - sequence.prompt_tokens == params.max_tokens else None


@contextmanager
def _loading() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise BudgetError(
            f"engine.device_memory: the device has no room for the model and its pages ({reason}); lower it by what "
            "else is on the device"
        ) from error


def _pool(host: ModelHost, plan: Plan, link: Link) -> KVPool:
    there, hosted = host.device, None
    if plan.kv_home == "host" and host.device.type != "cpu":
        there, hosted = torch.device("cpu"), HostedAttention(link, plan.attention_on_host)
    dtype, groups = getattr(torch, plan.kv_dtype), _groups(host, plan)
    return KVPool(host.kv_shapes, plan.kv_pages, plan.page_tokens, dtype, there, hosted, groups)


def _groups(host: ModelHost, plan: Plan) -> tuple[LayerGroup, ...]:
    """As the plan counted them; none: all layers keep all tokens. The plan knows the config, the host ran the layers.

    Raises:
        UnsupportedModel: they disagree.
    """
    if plan.kv_windows == (None,):
        return ()
    groups = groups_of(host.kv_shapes.values())
    if tuple(group.window for group in groups) != plan.kv_windows:
        raise UnsupportedModel(
            f"{host.model.config.model_type}: its layers' windows are not those of its config.json; give "
            "engine.plan.free_windows: false to keep all keys and values"
        )
    return groups


def _states(host: ModelHost, plan: Plan) -> StatePool:
    """Where the pages are."""
    if host.state_shapes and not plan.state_slots:
        raise BudgetError(
            "engine.plan.state_slots: the model's recurrent layers carry states that were not planned for; give the "
            "number of sequences that are to run at once"
        )
    home = host.device if plan.kv_home == "device" else torch.device("cpu")
    return StatePool(host.state_shapes, plan.max_sequences, home, can_begin_anew=host.device.type != "cpu")


def _require_executable(plan: Plan, sources: Mapping[str, ExpertSource]) -> None:
    whole = [layer for layer, source in sources.items() if not source.addressable]
    if whole and plan.resident_groups < plan.groups:
        raise BudgetError(
            f"engine: the budget keeps {plan.resident_groups} of {plan.groups} groups of experts in memory, but the "
            f"checkpoint stores those of {whole[0]} in a way that cannot be read in parts; give the engine memory for "
            "all of them"
        )


def _finished(sequence: Sequence, reason: str, text: TextStream | None) -> Finished:
    return Finished(
        row_index=sequence.request.row_index,
        status=Status.OK if reason == "stop" else Status.LENGTH,
        prompt_tokens=sequence.prompt_tokens,
        token_ids=tuple(sequence.answer),
        text=text.finish() if text is not None else "",
        finish_reason=reason,
        sample=sequence.request.sample,
        logprobs=tuple(sequence.logprobs),
    )


def _advance_scored(step: Step, scheduler: Scheduler, *, keeps_state: bool) -> Iterator[Finished]:
    """The next continuation of every sequence that has computed one, or its end.

    Its prompt's keys and values are still there; a state would have gone on, so with one the prompt is computed again.
    """
    for chunk in step.chunks:
        sequence = chunk.sequence
        if sequence.scoring is None or not chunk.completes:
            continue
        tokens = sequence.scoring.next_tokens()
        if tokens is None:
            scheduler.end(sequence)
            yield Finished(
                row_index=sequence.request.row_index,
                status=Status.OK,
                prompt_tokens=sequence.prompt_tokens,
                log_likelihoods=tuple(sequence.scoring.log_likelihoods),
            )
        else:  # it takes the place of the one before, in the same pages
            sequence.tokens, sequence.computed = tokens, 0 if keeps_state else sequence.prompt_tokens


def _given_up(sequence: Sequence) -> Finished:
    message = "the answer became too complex for the grammar library; simplify output_schema or regex"
    return Finished(
        row_index=sequence.request.row_index,
        status=Status.ERROR,
        prompt_tokens=sequence.prompt_tokens,
        error=RowError("grammar_failed", message, "generate"),
        sample=sequence.request.sample,
    )
