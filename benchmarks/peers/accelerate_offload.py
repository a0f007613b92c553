"""transformers with accelerate's disk offload: what does not fit `cpu_memory` is read from disk at every forward."""

from __future__ import annotations

import tempfile

import torch
from transformers import AutoModelForCausalLM
from transformers_static import generate
from turn import Generate, Turn, take


def open_engine(turn: Turn) -> Generate:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        turn.checkpoint,
        dtype=getattr(torch, turn.settings["dtype"]),
        device_map="auto",
        max_memory={"cpu": turn.settings["cpu_memory"]},
        offload_folder=tempfile.mkdtemp(prefix="moegen-bench-offload-", dir=turn.settings["folder"]),
    ).eval()
    return lambda rows: generate(model, rows, turn.settings["batch"])


if __name__ == "__main__":
    take(open_engine)
