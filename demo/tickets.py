"""Support tickets with labels, from the sentence patterns in templates.yaml; equal seeds give equal tickets.

`python demo/tickets.py` writes tickets.parquet beside this file.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

Split = Literal["seen", "held_out"]

HERE = Path(__file__).parent
TABLE = HERE / "tickets.parquet"
TABLE_SEED = 20_260_101
TABLE_ROWS: dict[Split, int] = {"held_out": 1_200, "seen": 1_000}
NULL_ROWS = 12  # tickets whose text was never typed in, as in every real table

QUEUES = ("billing", "delivery", "returns", "account", "technical", "sales", "privacy")
PRIORITIES = ("low", "normal", "high", "urgent")  # rising
_PRIORITY_WEIGHTS = (0.17, 0.45, 0.2, 0.18)

_FILLERS = {
    "product": "headphones|coffee machine|router|office chair|monitor|keyboard|webcam|printer|tablet|desk lamp|"
    "smart watch|speaker|vacuum cleaner|backpack|charger|docking station|camera|toaster",
    "software": "LedgerOne|Boardly|TimeSheet Pro|Stockroom|Mailwing|Formwork|"
    "the desktop app|the mobile app|the web app",
    "os": "Windows 11|macOS|Linux|Android|iOS|my old laptop|Windows 10",
    "plan": "Basic|Team|Starter|Free",
    "plan2": "Business|Enterprise|Premium|Pro",
    "name": "Anna Keller|Ben Okafor|Chloe Martin|David Lind|Elif Demir|Farah Nasser|Georg Huber|Hana Sato|Ivan Petrov|"
    "Julia Costa|Kofi Mensah|Lena Vogt|Marco Rossi|Nina Berg|Omar Haddad|Priya Nair|Rosa Diaz|Sven Olsen|Tara Singh|"
    "Wei Chen",
    "company": "Northwind Ltd|Alder & Sons|Bluebird GmbH|Cedar Labs|Delta Foods|Eastgate Hotels|Fjord Shipping|"
    "Granite Works",
    "city": "Berlin|Lyon|Porto|Vienna|Leeds|Gdansk|Turin|Ghent|Malmo|Zurich|Dublin|Seville",
    "city2": "Oslo|Basel|Krakow|Milan|Bruges|Cork|Paris|Graz",
    "month": "January|February|March|April|May|June|July|August|September|October|November|December",
    "weekday": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday",
}  # fmt: skip


@dataclass(frozen=True)
class Ticket:
    """What a customer wrote, and where it belongs."""

    text: str
    queue: str
    priority: str
    customer: str

    @property
    def answer(self) -> str:
        """The JSON that the model shall give."""
        return json.dumps({"queue": self.queue, "priority": self.priority}, separators=(",", ":"))


@cache
def templates() -> dict[str, Any]:
    """Patterns by split under `queues.<queue>`, `priorities.<priority>`, `context`, `greeting` and `closing`."""
    return yaml.safe_load((HERE / "templates.yaml").read_text(encoding="utf-8"))


def tickets(split: Split, seed: int, jumbled: bool = False) -> Iterator[Ticket]:
    """Tickets of one split, without end; `jumbled` ones, for training, have stray words and words out of order."""
    rng = random.Random(f"{split} {seed}")
    while True:
        yield _ticket(split, rng, jumbled)


def _ticket(split: Split, rng: random.Random, jumbled: bool) -> Ticket:
    queue = rng.choice(QUEUES)
    priority = rng.choices(PRIORITIES, _PRIORITY_WEIGHTS)[0]
    slots = {name: rng.choice(values.split("|")) for name, values in _FILLERS.items()}
    matter = templates()["queues"][queue]
    body = [matter, *_cues(priority, rng)]
    body += [templates()["context"]] * rng.choices((0, 1, 2), (0.3, 0.4, 0.3))[0]
    rng.shuffle(body)
    patterns = dict.fromkeys(rng.choice(group[split]) for group in body)  # nobody writes the same sentence twice
    sentences = [_fill(pattern, slots, rng) for pattern in patterns]
    if jumbled:
        neutral = [_fill(rng.choice(group[split]), slots, rng) for group in (matter, templates()["context"])]
        cues = [_fill(rng.choice(group[split]), slots, rng) for group in templates()["priorities"].values()]
        sentences = _jumble(sentences, " ".join(neutral).split(), " ".join(cues).split(), rng)
    parts = [" ".join(sentences)]
    if rng.random() < 0.6:
        parts.insert(0, _fill(rng.choice(templates()["greeting"][split]), slots, rng))
    if rng.random() < 0.6:
        parts.append(_fill(rng.choice(templates()["closing"][split]), slots, rng))
    text = rng.choice((" ", "\n", "\n\n")).join(parts)
    return Ticket(_typed_by_hand(text, rng), queue, priority, slots["name"])


def _jumble(sentences: list[str], neutral: list[str], cues: list[str], rng: random.Random) -> list[str]:
    """Some sentences with their words shuffled; in half of the tickets stray words, single words of cues among them."""
    mixed = [" ".join(_shuffled(text.split(), rng)) if rng.random() < 0.25 else text for text in sentences]
    if rng.random() < 0.5:
        stray = _shuffled(neutral, rng)[: rng.randint(3, 10)] + rng.sample(cues, rng.randint(0, 3))
        mixed.insert(rng.randint(0, len(mixed)), " ".join(_shuffled(stray, rng)))
    return mixed


def _shuffled(words: list[str], rng: random.Random) -> list[str]:
    return rng.sample(words, len(words))


def _cues(priority: str, rng: random.Random) -> list[dict[str, list[str]]]:
    """The pattern groups that make this priority: none for normal; urgent tickets sometimes carry a high cue too."""
    groups = [templates()["priorities"][priority]] if priority != "normal" else []
    if priority in ("urgent", "high") and rng.random() < 0.25:
        groups.append(templates()["priorities"]["high"])
    return groups


def _fill(pattern: str, slots: dict[str, str], rng: random.Random) -> str:
    text = re.sub(r"\[([^]]+)\]", lambda match: rng.choice(match[1].split("|")), pattern)
    text = re.sub(r"\{(\w+)\}", lambda match: slots.get(match[1]) or _NUMBERS[match[1]](rng), text)
    return text[0].upper() + text[1:]


_NUMBERS: dict[str, Callable[[random.Random], str]] = {
    "order": lambda rng: rng.choice(("order ", "order #", "order no. ")) + str(rng.randint(10_000, 99_999)),
    "invoice": lambda rng: f"{rng.choice(('INV-', 'R', '#'))}{rng.randint(1_000, 99_999)}",
    "amount": lambda rng: f"{rng.randint(5, 900)}.{rng.randint(0, 99):02d} {rng.choice(('EUR', 'USD', 'euros'))}",
    "date": lambda rng: rng.choice((f"{rng.randint(1, 28)} {_month(rng)}", f"{_month(rng)} {rng.randint(1, 28)}")),
    "n": lambda rng: str(rng.randint(2, 90)),
    "error": lambda rng: rng.choice(
        (f"E{rng.randint(100, 999)}", f"{rng.randint(400, 599)}", f"0x{rng.getrandbits(16):X}")
    ),
    "version": lambda rng: f"{rng.randint(2, 9)}.{rng.randint(0, 12)}",
    "phone": lambda rng: f"0{rng.randint(100, 999)} {rng.randint(100_000, 999_999)}",
    "customer_no": lambda rng: f"{rng.choice('CKX')}-{rng.randint(10_000, 99_999)}",
}  # fmt: skip


def _month(rng: random.Random) -> str:
    return rng.choice(_FILLERS["month"].split("|"))


def _typed_by_hand(text: str, rng: random.Random) -> str:
    """Typing errors in a third of the tickets, and now and then no capitals, only capitals, or no punctuation."""
    for _ in range(rng.choices((0, 1, 2, 3), (0.66, 0.2, 0.1, 0.04))[0]):
        text = _typo(text, rng)
    habit = rng.random()
    if habit < 0.10:
        return text.lower()
    if habit < 0.13:
        return text.upper()
    return re.sub(r"[,;:!?]|\.(?!\d)", "", text) if habit < 0.18 else text


def _typo(text: str, rng: random.Random) -> str:
    long_words = list(re.finditer(r"[A-Za-z]{6,}", text))
    if not long_words:
        return text
    word = rng.choice(long_words)
    at = rng.randrange(word.start() + 1, word.end() - 1)
    middle = rng.choice((text[at + 1] + text[at], text[at + 1], text[at] * 2 + text[at + 1]))  # swap, drop, double
    return text[:at] + middle + text[at + 2 :]


def table_rows() -> list[dict[str, Any]]:
    """The rows of tickets.parquet, oldest first: both splits and the null texts, shuffled."""
    rng = random.Random(TABLE_SEED)
    labelled = [
        {"customer": t.customer, "text": t.text, "split": split, "label_queue": t.queue, "label_priority": t.priority}
        for split, count in TABLE_ROWS.items()
        for t, _ in zip(tickets(split, TABLE_SEED), range(count), strict=False)
    ]
    names = _FILLERS["name"].split("|")
    rows = labelled + [{"customer": rng.choice(names), "text": None} for _ in range(NULL_ROWS)]
    rng.shuffle(rows)
    created_at = datetime(2026, 1, 5, 7)
    for number, row in enumerate(rows):
        created_at += timedelta(seconds=rng.randint(5, 900))
        row |= {"ticket_id": f"T-{100_000 + number}", "created_at": created_at}
    return rows


def write_table(path: Path = TABLE) -> None:
    """Write `table_rows()` as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("ticket_id", "customer", "created_at", "text", "split", "label_queue", "label_priority")
    schema = pa.schema([(name, pa.timestamp("s") if name == "created_at" else pa.string()) for name in names])
    pq.write_table(pa.Table.from_pylist(table_rows(), schema), path, compression="zstd")


if __name__ == "__main__":
    write_table()
