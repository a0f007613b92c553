"""Writes `docs/families.md`: which families the engine runs, and how. A test holds the file to it.

python -m benchmarks.families
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import transformers
from moegen.run.families import Verdict, verdicts

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "families.md"
COMMAND = "python -m benchmarks.families"

_HEAD = f"""# Model families

Every causal language model family of transformers {transformers.__version__} whose code has the experts seam, tried on
its default config: a tiny random float32 model of it goes through the engine's passes (ragged sequences, chunked
prefill mixed with decode, small pages, few state slots, preemption) and through transformers' own forward. The same
comparison is made with a checkpoint's own config whenever one is loaded: a config may be refused where its family's
default is not. `moegen models` makes this table for the transformers that is installed.

- **staged**: equal, in two stages: attention and experts have batch sizes of their own.
- **seams**: equal, with whole layers: attention and experts are still batched inside them.
- **refused**: not shown equal, so not run; the message is the one that a user reads.

Written by `{COMMAND}`; do not edit.
"""


def document(found: Iterable[Verdict]) -> str:
    """`docs/families.md`."""
    rows = sorted(found, key=lambda v: (v.way == "refused", v.family))
    equal = sum(v.way != "refused" for v in rows)
    lines = [f"| `{v.family}` | {v.model_class} | {v.way} | {v.reason.replace('|', '/')} |" for v in rows]
    title = ["| model type | class | way | why refused |", "| --- | --- | --- | --- |"]
    count = f"{equal} families run, {len(rows) - equal} are refused.\n"
    latents = ", ".join(f"`{v.family}`" for v in rows if v.keeps_latents)
    states = ", ".join(f"`{v.family}`" for v in rows if v.keeps_state)
    return "\n".join(
        [
            _HEAD,
            count,
            "Their attention is latent, and pages keep the latents instead of every head's keys and values: "
            f"{latents}.\n",
            "Their recurrent layers carry a state, for which every running sequence has a slot beside its pages: "
            f"{states}.\n",
            *title,
            *lines,
            "",
        ]
    )


def main() -> None:
    text = document(verdicts())
    DOCUMENT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
