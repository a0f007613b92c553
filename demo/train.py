"""Train the demo's model: a Qwen3-MoE of 3.5 million parameters that reads a ticket and answers with JSON.

`python demo/train.py` writes model/ beside this file; about ten minutes on two cores. It sees only tickets of the
`seen` patterns; the accuracy on `held_out` patterns is measured once, at the end, with the weights as they were saved.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from tickets import HERE, TABLE, Ticket, tickets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

MODEL = HERE / "model"
SEED = 7
VOCABULARY = 1_024
CONTEXT_TOKENS = 1_024
TICKET_WEIGHT = 0.2  # of a ticket's token in the loss, beside 1 of an answer's: learning to read helps to answer
END, PAD = "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from seen tickets, with the ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, "<|im_start|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = itertools.islice(tickets("seen", SEED), 20_000)
    tokenizer.train_from_iterator((f"user\n{ticket.text}assistant\n{ticket.answer}" for ticket in sample), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Random weights: 4 layers of width 128, 16 experts of which 2 answer for a token."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.08,  # about 1/sqrt(hidden_size); the default 0.02 is for widths of thousands
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3MoeForCausalLM(config)


def prompt_of(text: str) -> list[dict[str, str]]:
    """A ticket as chat messages."""
    return [{"role": "user", "content": text}]


def examples(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[list[int], list[float]]]:
    """Token ids of seen tickets with their answers, without end, and each token's weight in the loss."""
    for ticket in tickets("seen", SEED + 1):
        prompt = tokenizer.apply_chat_template(prompt_of(ticket.text), add_generation_prompt=True, return_dict=False)
        answer = tokenizer.encode(ticket.answer + END)
        yield prompt + answer, [TICKET_WEIGHT] * len(prompt) + [1.0] * len(answer)


def batches(tokenizer: PreTrainedTokenizerFast, rows: int, pool: int = 16) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `rows` examples of about equal length, padded on the right: tensors [rows, longest]."""
    rng, stream = random.Random(SEED), examples(tokenizer)
    while True:
        by_length = sorted(itertools.islice(stream, rows * pool), key=lambda example: len(example[0]))
        for start in rng.sample(range(0, rows * pool, rows), pool):
            yield _padded(by_length[start : start + rows], tokenizer.pad_token_id)


def _padded(batch: list[tuple[list[int], list[float]]], pad_id: int) -> dict[str, torch.Tensor]:
    ids_BT = pad_sequence([torch.tensor(ids) for ids, _ in batch], batch_first=True, padding_value=pad_id)
    weights_BT = pad_sequence([torch.tensor(weights) for _, weights in batch], batch_first=True)
    return {"input_ids": ids_BT, "attention_mask": (weights_BT > 0).long(), "weights": weights_BT}


def loss_of(model: Qwen3MoeForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted cross entropy, nats per unit of weight, and the router's balancing loss."""
    result = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits_BTV, targets_BT = result.logits[:, :-1], batch["input_ids"][:, 1:]
    losses_BT = F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none")
    weights_BT = batch["weights"][:, 1:]
    return (losses_BT * weights_BT).sum() / weights_BT.sum(), result.aux_loss


def train(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, rows: int, rate: float) -> None:
    """AdamW with warm-up and a cosine that ends at zero; prints the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(step, steps))
    start = time.perf_counter()
    model.train()
    for step, batch in enumerate(itertools.islice(batches(tokenizer, rows), steps), 1):
        loss, balance = loss_of(model, batch)
        (loss + model.config.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == 1:
            seconds = time.perf_counter() - start
            print(f"step {step:5d}  loss {loss:.4f}  balance {balance:.3f}  {seconds:5.0f} s", flush=True)
    model.eval()


def _rate_factor(step: int, steps: int, warm_up: int = 100) -> float:
    return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """bfloat16 safetensors in the names of the hubs, tokenizer and chat template."""
    model.config.output_router_logits = False  # the balancing loss is for training only
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def answers(folder: Path, texts: list[str], rows: int = 64) -> list[str]:
    """What transformers' own `generate` answers, greedily, with the checkpoint in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    out: list[str] = []
    for start in range(0, len(texts), rows):
        chats = [prompt_of(text) for text in texts[start : start + rows]]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**batch, max_new_tokens=32, do_sample=False)
        out += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return out


@torch.inference_mode()
def expert_shares(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Share of the (token, expert) pairs that each expert gets on seen tickets: [layers, experts], rows sum to 1."""
    batch = next(batches(tokenizer, 64))
    result = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
    logits_LTE = torch.stack(result.router_logits)
    chosen = logits_LTE[:, batch["attention_mask"].flatten().bool()].topk(model.config.num_experts_per_tok).indices
    counts = torch.stack([torch.bincount(layer.flatten(), minlength=model.config.num_experts) for layer in chosen])
    return counts / counts.sum(1, keepdim=True)


def report(folder: Path, split: str) -> float:
    """Exact-match accuracy over one split of the table; prints it and the first wrong answers."""
    rows = [row for row in pq.read_table(TABLE).to_pylist() if row["split"] == split]
    wanted = [Ticket(row["text"], row["label_queue"], row["label_priority"], row["customer"]).answer for row in rows]
    got = answers(folder, [row["text"] for row in rows])
    wrong = [(row["text"], w, g) for row, w, g in zip(rows, wanted, got, strict=True) if w != g]
    accuracy = 1 - len(wrong) / len(rows)
    print(f"accuracy {accuracy:.4f} ({split}, {len(rows):,} rows)")
    for text, right, answer in wrong[:10]:
        print(f"  {text!r}\n    should be {right}, is {answer}")
    return accuracy


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--rows", type=int, default=32, help="tickets per step")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--out", type=Path, default=MODEL)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the weights, depend on it; two gain little at this size
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}")
    train(model, tokenizer, options.steps, options.rows, options.rate)
    shares = expert_shares(model, tokenizer)
    print(
        f"least used expert {shares.min():.3f}, most used {shares.max():.3f} of a layer's tokens (even: 1/16 = 0.063)"
    )
    save(model, tokenizer, options.out)
    report(options.out, "seen")
    report(options.out, "held_out")


if __name__ == "__main__":
    main()
