"""Every code block of the documentation does what it says: compiles, loads, validates or parses."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import subprocess
from itertools import pairwise

import pytest
import yaml
from moegen.cli import _parser
from moegen.spec import JobSpec

from tests.docs.blocks import ROOT, Block, blocks

LANGUAGES = {"python", "yaml", "json", "sh", "text"}  # text is output of a program or a drawing: nothing to check
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def of(language: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", list(blocks(language)), ids=str)


def is_dag(block: Block) -> bool:
    return "with DAG(" in block.text


def test_every_block_is_in_a_language_that_is_checked():
    assert {block.language for block in blocks()} <= LANGUAGES
    assert all(any(blocks(language)) for language in LANGUAGES - {"text"})


@of("python")
def test_python_compiles_and_imports_what_there_is(block):
    tree = ast.parse(block.text, str(block))
    compile(tree, str(block), "exec")
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(ast.Module(imports, []), str(block), "exec"), {})


@pytest.mark.parametrize("block", [block for block in blocks("python") if is_dag(block)], ids=str)
def test_a_dag_loads(block, tmp_path):
    from airflow.dag_processing.dagbag import DagBag
    from airflow.serialization.serialized_objects import DagSerialization

    path = tmp_path / "from_the_docs.py"
    path.write_text(block.text, encoding="utf-8")
    bag = DagBag(str(path))
    assert bag.import_errors == {}
    assert len(bag.dags) == block.text.count("with DAG(")
    for dag in bag.dags.values():
        assert DagSerialization.from_dict(DagSerialization.to_dict(dag)).task_ids == dag.task_ids


@of("yaml")
def test_yaml_parses_and_a_job_file_is_valid(block):
    found = yaml.safe_load(block.text)
    assert isinstance(found, dict)
    if "model" in found:
        JobSpec.from_mapping(found)


@of("json")
def test_json_parses(block):
    json.loads(block.text)


@of("sh")
def test_a_shell_block_is_shell(block):
    done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, timeout=20)
    assert done.returncode == 0, done.stderr


def parses(parse, words: list[str]) -> None:
    """Fails with what the parser says when it refuses the words."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse(words)
    except SystemExit:
        pytest.fail(said.getvalue())


@of("sh")
def test_commands_parse(block):
    for program, *words in block.commands():
        match program:
            case "moegen":
                parses(_parser().parse_args, words)
            case "make":
                assert {word for word in words if "=" not in word} <= TARGETS
            case "airflow":
                from airflow.cli.cli_parser import get_parser

                parses(get_parser().parse_args, words)
            case "docker":
                assert words[0] == "compose"
            case "python":
                assert (ROOT / words[0]).is_file()
            case "curl" | "export":
                pass
            case _:
                pytest.fail(f"{program}: nobody checks this command; add it here")


def test_job_overrides_on_a_command_line_are_fields():
    """`--set` in shell blocks, over a specification that has what is required."""
    least = {
        "input": {"uri": "in"},
        "prompt": {"column": "text"},
        "model": {"uri": "model"},
        "sampling": {"max_tokens": 1},
        "output": {"uri": "out"},
    }
    from moegen.spec import set_field

    for block in blocks("sh"):
        for words in block.commands():
            mapping = json.loads(json.dumps(least))
            for before, word in pairwise(words):
                if before == "--set":
                    set_field(mapping, word)
            JobSpec.from_mapping(mapping)
