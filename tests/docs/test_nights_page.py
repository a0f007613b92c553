"""The page on durable execution says of every night what tests/airflow/test_nights.py finds in the morning."""

from __future__ import annotations

import pytest

from tests.airflow.nights import NIGHTS, figures
from tests.docs.blocks import ROOT, tables

PAGE = "durable-execution.md"


def test_the_figures_are_those_of_the_nights():
    text = (ROOT / "docs" / PAGE).read_text(encoding="utf-8")
    assert figures() in text, f"paste the output of `python tests/airflow/nights.py` into {PAGE}"


@pytest.mark.parametrize("night", NIGHTS, ids=lambda night: night.name)
def test_every_event_is_told_in_words(night):
    (told,) = [rows for heading, rows in tables(PAGE) if heading == "What happens"]
    assert any(row[0].replace("**", "").startswith(night.event) for row in told)
