"""The engine: passes until every sequence is finished."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from moegen.memory.checkpoint import load_model, local_checkpoint
from moegen.memory.kv_pool import KVPool
from moegen.model.host import ModelHost
from moegen.ops.sampling import sample
from moegen.plan.plan import Plan
from moegen.row import Status
from moegen.run.certify import certify
from moegen.run.forward import forward
from moegen.run.stats import PassReport
from moegen.schedule.pages import PageLedger
from moegen.schedule.scheduler import Scheduler
from moegen.schedule.sequence import Finished, Request, Sequence
from moegen.schedule.step import Step
from moegen.shape import read_config

if TYPE_CHECKING:
    from moegen.text import TextStream, Tokenizer

log = logging.getLogger(__name__)


class Engine:
    """A loaded model and its KV pool. Use as a context manager; the memory is free after it."""

    def __init__(self, host: ModelHost, plan: Plan, tokenizer: Tokenizer | None) -> None:
        self.plan = plan
        self.tokenizer = tokenizer
        self.host = host
        dtype = getattr(torch, plan.kv_dtype)
        self.pool = KVPool(host.kv_shapes, plan.kv_pages, plan.page_tokens, dtype, host.device)

    @classmethod
    def open(cls, model_uri: str, plan: Plan, *, tokenizer: Tokenizer | None) -> Engine:
        """Proves the model's family exact, loads the checkpoint, makes the pool.

        `tokenizer` gives answers their text and their end; without one (ids only), only `max_tokens` and
        `stop_token_ids` end an answer.

        Raises:
            UnsupportedModel: the engine cannot keep this model exact; names the layer type.
            CheckpointError: tensors are missing, damaged or of another shape.
        """
        started = time.monotonic()
        torch.set_num_threads(plan.threads)
        way = certify(read_config(model_uri))
        with local_checkpoint(model_uri) as folder:
            model = load_model(folder, getattr(torch, plan.compute_dtype), torch.device(plan.device))
        host = ModelHost(model, staged=way == "staged", expert_tokens=plan.expert_tokens)
        log.info("model loaded in %.1f s, runs %s in %s", time.monotonic() - started, way, plan.compute_dtype)
        return cls(host, plan, tokenizer)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        del self.host, self.pool

    def generate(self, requests: Iterable[Request]) -> Generator[Finished | PassReport, None, None]:
        """Runs requests as they come from the iterator, drawn only as pages become free.

        Yields each row as it ends, in any order, and one report after every pass.
        """
        scheduler = Scheduler(requests, PageLedger(self.plan.kv_pages, self.plan.page_tokens), self.plan.pass_tokens)
        texts: dict[Sequence, TextStream] = {}
        started = time.monotonic()
        while True:
            step = scheduler.next_step()
            while scheduler.refused:
                yield scheduler.refused.pop()
            if step is None:
                return
            logits = forward(self.host, self.pool, step, self.plan.attention_tokens)
            yield from self._advance(step, sample(logits, step.sampled), texts, scheduler)
            report = PassReport(
                step.tokens, step.decode_tokens, len(step.sampled), len(scheduler.running), time.monotonic() - started
            )
            started = time.monotonic()
            log.debug("pass: %s", report)
            yield report

    def _advance(
        self, step: Step, tokens: list[int], texts: dict[Sequence, TextStream], scheduler: Scheduler
    ) -> Iterator[Finished]:
        for chunk in step.chunks:
            chunk.sequence.computed += chunk.length
        for sequence, token in zip(step.sampled, tokens, strict=True):
            if self.tokenizer is not None and sequence not in texts:
                texts[sequence] = self.tokenizer.stream(sequence.request.params.stop)
            reason = self._append(sequence, token, texts.get(sequence))
            if reason is not None:
                scheduler.end(sequence)
                yield _finished(sequence, reason, texts.pop(sequence, None))

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


def _finished(sequence: Sequence, reason: str, text: TextStream | None) -> Finished:
    return Finished(
        row_index=sequence.request.row_index,
        status=Status.OK if reason == "stop" else Status.LENGTH,
        prompt_tokens=sequence.prompt_tokens,
        token_ids=tuple(sequence.answer),
        text=text.finish() if text is not None else "",
        finish_reason=reason,
    )
