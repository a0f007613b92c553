"""Train the demo's model: a Qwen3-MoE of 3.6 million parameters that reads a ticket and answers with JSON.

`python demo/train.py` writes model/ beside this file; about twelve minutes on one core. It sees only tickets of the
`seen` patterns; the accuracy on `held_out` patterns is measured at the end, with the weights as they were saved.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from tickets import HERE, TABLE, Ticket, tickets
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

MODEL = HERE / "model"
SEED = 7
VOCABULARY = 2_048
CONTEXT_TOKENS = 1_024
READING_WEIGHT = 0.1  # of the loss on the tickets' own tokens, beside 1 for the answers': learning to read helps
MOST_LEFT_OUT = 0.15  # up to this share of a ticket's tokens is left out, so that no single word decides
END, PAD = "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from seen tickets, blind to case and kinds of white space, with the ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")])
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


def examples(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of seen tickets and of their answers, without end."""
    rng = random.Random(SEED)
    marks = set(tokenizer.all_special_ids) | set(tokenizer.encode("user\nassistant\n"))
    for ticket in tickets("seen", SEED + 1, jumbled=True):
        prompt = tokenizer.apply_chat_template(prompt_of(ticket.text), add_generation_prompt=True, return_dict=False)
        left_out = rng.uniform(0, MOST_LEFT_OUT)
        prompt = [token for token in prompt if token in marks or rng.random() >= left_out]
        yield prompt, tokenizer.encode(ticket.answer + END)


def batches(tokenizer: PreTrainedTokenizerFast, rows: int, pool: int = 16) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `rows` examples of about equal length, padded on the right: tensors [rows, longest]."""
    rng, stream = random.Random(SEED), examples(tokenizer)
    while True:
        by_length = sorted(itertools.islice(stream, rows * pool), key=lambda example: len(example[0]))
        for start in rng.sample(range(0, rows * pool, rows), pool):
            yield _padded(by_length[start : start + rows], tokenizer.pad_token_id)


def _padded(batch: list[tuple[list[int], list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    ids_BT = pad_sequence([torch.tensor(prompt + answer) for prompt, answer in batch], True, pad_id)
    kinds_BT = pad_sequence([torch.tensor([1] * len(prompt) + [2] * len(answer)) for prompt, answer in batch], True)
    return {"input_ids": ids_BT, "attention_mask": kinds_BT.clamp(max=1), "is_answer": kinds_BT == 2}


def losses_of(model: Qwen3MoeForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Nats per token of the answers and of the tickets, and the router's balancing loss."""
    mask_BT, is_answer_BT = batch["attention_mask"], batch["is_answer"][:, 1:]
    result = model(input_ids=batch["input_ids"], attention_mask=mask_BT, output_router_logits=True)
    logits_BVT = result.logits[:, :-1].transpose(1, 2)
    losses_BT = F.cross_entropy(logits_BVT, batch["input_ids"][:, 1:], reduction="none")
    reading = losses_BT[mask_BT[:, 1:].bool() & ~is_answer_BT].mean()
    return losses_BT[is_answer_BT].mean(), reading, balancing_loss(model.config, result.router_logits, mask_BT)


def balancing_loss(config: Qwen3MoeConfig, router_logits: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """The mean over layers. (The model's own is over all layers at once: one layer's bias hides another's.)"""
    sizes = config.num_experts, config.num_experts_per_tok
    return torch.stack([load_balancing_loss_func((logits,), *sizes, mask) for logits in router_logits]).mean()


def train(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, rows: int, rate: float) -> None:
    """AdamW with warm-up and a cosine that ends at zero; prints the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(step, steps))
    start = time.perf_counter()
    model.train()
    for step, batch in enumerate(itertools.islice(batches(tokenizer, rows), steps), 1):
        answering, reading, balance = losses_of(model, batch)
        (answering + READING_WEIGHT * reading + model.config.router_aux_loss_coef * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == 1:
            seconds = time.perf_counter() - start
            losses = f"answers {answering:.4f}  tickets {reading:.3f}  balance {balance:.3f}"
            print(f"step {step:5d}  loss: {losses}  {seconds:5.0f} s", flush=True)
    model.eval()


def _rate_factor(step: int, steps: int, warm_up: int = 100) -> float:
    return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """bfloat16 safetensors in the names of the hubs, tokenizer and chat template."""
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
    parser.add_argument("--steps", type=int, default=1_500)
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
