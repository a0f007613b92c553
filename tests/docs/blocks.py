"""The fenced code blocks of the documentation, and what each kind of them must be able to do."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", *ROOT.glob("*/README.md")])
_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block. `line` is that of its fence, from 1."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """A shell block's commands as words, without comments and redirections; continued lines are one command."""
        lines = self.text.replace("\\\n", " ").splitlines()
        commands = (shlex.split(line, comments=True) for line in lines)
        return [words[: words.index(">")] if ">" in words else words for words in commands if words]


def blocks(language: str | None = None) -> Iterator[Block]:
    """Every block of every page, or those in one language."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in _FENCE.finditer(text):
            block = Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])
            if language in (None, block.language):
                yield block


def tables(page: str) -> Iterator[tuple[str, list[list[str]]]]:
    """(heading above, rows of cells without the header) of each table of a page of docs/."""
    heading, rows = "", []
    for line in [*(ROOT / "docs" / page).read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            # A bar in a code span would be written as \|; none is needed so far.
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            yield heading, rows[2:]
            rows = []
        if line.startswith("#"):
            heading = line.lstrip("# ")
