"""The committed checkpoint is small, is stored as hubs store Qwen3-MoE, and answers tickets of unseen patterns."""

import json

import pyarrow.parquet as pq
from safetensors import safe_open
from tickets import TABLE, Ticket
from train import END, MODEL, answers, build_tokenizer, prompt_of
from transformers import AutoConfig, AutoTokenizer


def test_all_files_together_are_under_8_mb():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 8_000_000


def test_weights_are_bf16_with_one_tensor_per_expert():
    config = AutoConfig.from_pretrained(MODEL)
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    experts = {name for name in names if ".experts." in name}
    assert experts == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in range(config.num_hidden_layers)
        for expert in range(config.num_experts)
        for part in ("gate", "up", "down")
    }


def test_answers_at_least_nine_in_ten_of_60_held_out_tickets_exactly():
    rows = [row for row in pq.read_table(TABLE).to_pylist() if row["split"] == "held_out"][:60]
    wanted = [Ticket(row["text"], row["label_queue"], row["label_priority"], row["customer"]).answer for row in rows]
    got = answers(MODEL, [row["text"] for row in rows])
    assert sum(map(str.__eq__, wanted, got)) >= 54, [
        pair for pair in zip(wanted, got, strict=True) if len(set(pair)) > 1
    ]


def test_the_chat_template_makes_the_prompt_of_the_training():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rendered = tokenizer.apply_chat_template(prompt_of("Hi"), add_generation_prompt=True, tokenize=False)
    assert rendered == f"<|im_start|>user\nHi{END}\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == END


def test_the_tokenizer_is_reproducible_and_reads_every_byte():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert (
        json.loads(build_tokenizer().backend_tokenizer.to_str())["model"]
        == json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    )
    assert tokenizer.decode(tokenizer.encode("Größe 12\n\t中文 🙂")) == "größe 12 中文 🙂"
