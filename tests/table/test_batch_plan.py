"""`plan.json`: written once, without secrets, and in the way of every other work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from moegen.errors import InputError, MoegenError, SpecError
from moegen.spec import JobSpec
from moegen.table.batch_plan import BatchPlan, batch_folder
from moegen.table.fingerprint import fingerprint
from moegen.table.reader import InputFile

FILE = InputFile("https://bucket/in.parquet?X-Signature=password", 100, "1", 25)
SPEC: dict[str, Any] = {
    "input": {"uri": "https://bucket/in.parquet?X-Signature=password"},
    "prompt": {"template": "PROMPT of {text}, see https://site/page?a=b"},
    "model": {"uri": "https://host/model?X-Signature=password"},
    "sampling": {"max_tokens": 8},
    "output": {"uri": "s3://bucket/out", "rows_per_part": 10},
}


def plan(file: InputFile = FILE, digests: tuple[str, str] = ("m", "t"), **sections: Any) -> BatchPlan:
    spec = JobSpec.from_mapping({name: {**SPEC.get(name, {}), **sections.get(name, {})} for name in {*SPEC, *sections}})
    return BatchPlan.of(spec, fingerprint(spec, *digests, [file]), digests, [file], file.rows)


def test_it_says_what_the_work_is_and_holds_no_credentials(tmp_path: Path) -> None:
    plan().write(str(tmp_path))
    text = (tmp_path / "plan.json").read_text()
    assert "password" not in text
    written = json.loads(text)
    file = {"uri": "https://bucket/in.parquet", "size_bytes": 100, "version": "1", "rows": 25}
    assert written["input_files"] == [file]
    assert (written["rows"], written["rows_per_part"], written["parts"]) == (25, 10, 3)
    assert written["spec"]["prompt"]["template"] == SPEC["prompt"]["template"]
    assert written["spec"]["sampling"]["max_tokens"] == 8
    assert len(written["fingerprint"]) == 64


def test_the_same_work_goes_on_and_the_file_stays(tmp_path: Path) -> None:
    plan().check(str(tmp_path))
    plan().write(str(tmp_path))
    before = (tmp_path / "plan.json").stat()
    again = plan(limits={"max_total_tokens": 5}, errors={"max_error_rate": 1}, checkpoint={"journal_seconds": 1})
    again.check(str(tmp_path))
    again.write(str(tmp_path))
    assert (tmp_path / "plan.json").stat() == before


@pytest.mark.parametrize(
    ("other", "error", "says"),
    [
        ({"sampling": {"max_tokens": 9}}, SpecError, r"sampling\.max_tokens differ"),
        ({"prompt": {"template": "SECRET {text}"}}, SpecError, r"prompt\.template differ"),
        ({"digests": ("other", "t")}, SpecError, r"\(the model differ\)"),
        ({"digests": ("m", "other")}, SpecError, r"its tokenizer differ"),
        (
            {"file": InputFile(FILE.uri, 100, "2", 25)},
            InputError,
            r"https://bucket/in\.parquet changed since the job began",
        ),
        (
            {"file": InputFile("s3://bucket/b.parquet", 100, "1", 25), "input": {"uri": "s3://bucket/b.parquet"}},
            SpecError,
            "the input files differ",
        ),
    ],
)
def test_other_work_is_refused_by_name_and_not_by_value(
    tmp_path: Path, other: dict[str, Any], error: type[MoegenError], says: str
) -> None:
    plan().write(str(tmp_path))
    with pytest.raises(error, match=says) as refusal:
        plan(**other).check(str(tmp_path))
    assert type(refusal.value) is error
    assert "new_run" in str(refusal.value)
    assert "SECRET" not in str(refusal.value)


def test_what_is_no_plan_is_told(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(InputError, match="is not a plan of this version"):
        plan().check(str(tmp_path))


def test_a_key_names_one_folder() -> None:
    assert batch_folder("s3://bucket/out/", "a.b-C_1") == "s3://bucket/out/_batch/a.b-C_1"
    for key in ("..", "a/b", "", "a b", "x" * 129):
        with pytest.raises(SpecError, match=r"job\.key"):
            batch_folder("out", key)
