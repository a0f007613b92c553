"""What the demo reports is measured: wrong, missing and doubled answers are noticed, and no process is left behind."""

import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run import TABLE, DemoError, accuracy, child, command, inherited_env, joined


def write_answers(folder: Path, wrong: dict[str, str | None], rows: slice = slice(None)) -> None:
    """Two parts with the right answer for every ticket but those in `wrong`."""
    answers = [
        {
            "ticket_id": row["ticket_id"],
            "output": wrong.get(
                row["ticket_id"], json.dumps({"priority": row["label_priority"], "queue": row["label_queue"]})
            ),
        }
        for row in pq.read_table(TABLE).to_pylist()[rows]
    ]
    schema = pa.schema({"ticket_id": pa.string(), "output": pa.string()})
    for number, part in enumerate((answers[:1000], answers[1000:])):
        pq.write_table(pa.Table.from_pylist(part, schema), folder / f"part-{number:06d}-abc.parquet")


@pytest.fixture
def held_out_ids() -> list[str]:
    return [row["ticket_id"] for row in pq.read_table(TABLE).to_pylist() if row["split"] == "held_out"]


def held_out(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["split"] == "held_out"]


def test_right_answers_in_any_json_spelling_are_right(tmp_path):
    write_answers(tmp_path, {})
    assert accuracy(held_out(joined(tmp_path))) == 1.0


@pytest.mark.parametrize(
    "answer",
    [None, "", "billing", '{"queue":"billing"', "7", '{"queue":"nowhere","priority":"normal"}', '{"queue":"billing"}'],
)
def test_wrong_and_missing_answers_count_as_wrong(tmp_path, held_out_ids, answer):
    write_answers(tmp_path, dict.fromkeys(held_out_ids[:120], answer))
    assert accuracy(held_out(joined(tmp_path))) == pytest.approx(0.9)


def test_a_lost_ticket_is_an_error(tmp_path):
    write_answers(tmp_path, {}, rows=slice(1, None))
    with pytest.raises(DemoError, match="2212 tickets in, 2211 rows out"):
        joined(tmp_path)


def test_a_doubled_ticket_is_an_error(tmp_path):
    write_answers(tmp_path, {})
    (tmp_path / "part-000002-abc.parquet").write_bytes((tmp_path / "part-000001-abc.parquet").read_bytes())
    with pytest.raises(DemoError, match="rows out"):
        joined(tmp_path)


def test_no_output_is_an_error(tmp_path):
    with pytest.raises(DemoError, match="no part"):
        joined(tmp_path)


def test_a_child_and_its_own_children_end_with_the_block(tmp_path):
    log = tmp_path / "log"
    with child(["sh", "-c", "sleep 300 & echo $!; wait"], log, inherited_env()) as process:
        while not log.read_text().strip():
            time.sleep(0.05)
        assert process.poll() is None
    assert process.poll() is not None
    assert not running(int(log.read_text()))


def running(pid: int) -> bool:
    """Whether the process exists and is more than a zombie that waits for its parent."""
    for _ in range(40):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return False
        except (ProcessLookupError, FileNotFoundError):
            return False
        time.sleep(0.05)
    return True


def test_a_missing_command_says_what_to_do():
    with pytest.raises(DemoError, match="make install"):
        command("no-such-command")


def test_another_airflow_or_service_in_the_environment_is_not_used(monkeypatch):
    monkeypatch.setenv("AIRFLOW_HOME", "elsewhere")
    monkeypatch.setenv("MOEGEN_TOKEN", "secret")
    assert not {"AIRFLOW_HOME", "MOEGEN_TOKEN"} & inherited_env().keys()
