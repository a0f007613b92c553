"""The generator makes the committed table, its splits share no sentence pattern, and labels are evenly spread."""

import itertools
import re
from collections.abc import Iterator

import pyarrow.parquet as pq
import pytest
from tickets import PRIORITIES, QUEUES, TABLE, TABLE_ROWS, table_rows, templates, tickets

SPLITS = ("seen", "held_out")


def groups(node: dict) -> Iterator[dict[str, list[str]]]:
    """Every {"seen": [...], "held_out": [...]} of the template file."""
    if "seen" in node:
        yield node
    else:
        for inner in node.values():
            yield from groups(inner)


def patterns(split: str) -> list[str]:
    return [pattern for group in groups(templates()) for pattern in group[split]]


def wording(pattern: str) -> str:
    """A pattern without case, punctuation and spacing."""
    return " ".join(re.findall(r"\w+", pattern.lower()))


def test_the_committed_table_is_what_the_generator_makes():
    assert pq.read_table(TABLE).to_pylist() == [
        {name: row.get(name) for name in pq.read_schema(TABLE).names} for row in table_rows()
    ]


def test_the_table_has_the_promised_rows():
    rows = pq.read_table(TABLE).to_pylist()
    for split, count in TABLE_ROWS.items():
        assert sum(row["split"] == split for row in rows) == count
    assert len(rows) >= 2_000
    assert len({row["ticket_id"] for row in rows}) == len(rows)
    assert [row["created_at"] for row in rows] == sorted(row["created_at"] for row in rows)


def test_a_ticket_has_labels_exactly_when_it_has_text():
    for row in pq.read_table(TABLE).to_pylist():
        if row["text"] is None:
            assert row["label_queue"] is row["label_priority"] is row["split"] is None
        else:
            assert row["label_queue"] in QUEUES
            assert row["label_priority"] in PRIORITIES


def test_no_label_is_rare():
    rows = [row for row in pq.read_table(TABLE).to_pylist() if row["split"] == "held_out"]
    pairs = [(row["label_queue"], row["label_priority"]) for row in rows]
    for pair in itertools.product(QUEUES, PRIORITIES):
        assert pairs.count(pair) >= len(rows) / len(QUEUES) / len(PRIORITIES) / 3, pair


def test_splits_share_no_pattern():
    seen, held_out = ({wording(pattern) for pattern in patterns(split)} for split in SPLITS)
    assert len(seen) > 2 * len(held_out) > 200
    assert not seen & held_out


def spellings(pattern: str) -> Iterator[set[str]]:
    """The words of every text that a pattern's choices allow."""
    pieces = [piece.split("|") if at % 2 else [piece] for at, piece in enumerate(re.split(r"\[([^]]+)\]", pattern))]
    return (set(wording("".join(chosen)).split()) for chosen in itertools.product(*pieces))


def test_no_held_out_sentence_is_nearly_a_seen_one():
    kinds = {name: templates()[name] for name in ("queues", "priorities", "context")}
    for group in groups(kinds):
        seen = [words for pattern in group["seen"] for words in spellings(pattern)]
        for pattern in group["held_out"]:
            for words in spellings(pattern):
                assert max(len(words & other) / len(words | other) for other in seen) < 0.7, pattern


def test_splits_share_no_text():
    seen, held_out = ({t.text for t in itertools.islice(tickets(split, 1), 3_000)} for split in SPLITS)
    assert not seen & held_out


def test_held_out_patterns_say_new_sentences_in_mostly_known_words():
    seen, held_out = ({word for p in patterns(split) for word in wording(p).split()} for split in SPLITS)
    assert len(held_out - seen) / len(held_out) < 0.1


@pytest.mark.parametrize("split", SPLITS)
def test_equal_seeds_give_equal_tickets(split):
    first, again, other = (list(itertools.islice(tickets(split, seed), 50)) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize("split", SPLITS)
def test_every_place_in_a_pattern_is_filled(split):
    for ticket in itertools.islice(tickets(split, 5), 3_000):
        assert not set("{}[]|") & set(ticket.text), ticket.text


def test_the_answer_is_compact_json():
    ticket = next(tickets("seen", 0))
    assert ticket.answer == f'{{"queue":"{ticket.queue}","priority":"{ticket.priority}"}}'
