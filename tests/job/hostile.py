"""Inputs and specifications that somebody will hand in one night, each with how the job must end.

Everything is built by code. A case is a folder of files, changes to a plain specification, and what is expected: an
exit code, and for tables that can be read, how many rows have which status before the model is asked (`ready`: it will
be).
"""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Build = Callable[[], bytes]


@dataclass(frozen=True)
class Hostile:
    """One case.

    Attributes:
        files: name -> its bytes; the input is the folder that they are in, unless `spec` says otherwise.
        spec: field by its full name -> value, over the plain specification.
        job: the whole job file's bytes, instead of a specification.
        exit_code: of a dry run, and of a run.
        rows: status -> rows, where the code is 0.
        said: part of the message, where it is not.
        run: whether the model is to answer the rows too.
    """

    name: str
    files: Mapping[str, Build] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)
    job: Build | None = None
    exit_code: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)
    said: str = ""
    run: bool = False


# --- files ----------------------------------------------------------------------------------------------------------


def parquet(columns: Any, **options: Any) -> Build:
    """A Parquet file of a table, or of columns by name."""

    def build() -> bytes:
        made = columns() if callable(columns) else columns
        sink = io.BytesIO()
        pq.write_table(made if isinstance(made, pa.Table) else pa.table(made), sink, **options)
        return sink.getvalue()

    return build


def arrow(columns: Mapping[str, Any], *, stream: bool = False) -> Build:
    """An Arrow IPC file or stream."""

    def build() -> bytes:
        table, sink = pa.table(dict(columns)), io.BytesIO()
        with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue()

    return build


def text(*lines: str | bytes, end: bytes = b"\n") -> Build:
    """Lines, each with an end."""
    return lambda: b"".join((line.encode() if isinstance(line, str) else line) + end for line in lines)


def cut(build: Build, share: float) -> Build:
    """The beginning of a file."""
    return lambda: build()[: int(len(build()) * share)]


def damaged(build: Build, share: float) -> Build:
    """A file with 64 bytes of noise in it."""

    def make() -> bytes:
        data = bytearray(build())
        at = int(len(data) * share)
        data[at : at + 64] = np.random.default_rng(0).bytes(64)
        return bytes(data)

    return make


def zipped(build: Build) -> Build:
    return lambda: gzip.compress(build())


def _invalid_utf8() -> pa.Table:
    raw = pa.array([b"ok", b"caf\xe9", None, b"fine"], pa.binary())
    return pa.table({"prompt": pa.Array.from_buffers(pa.string(), 4, raw.buffers()), "n": range(4)})


def _wide() -> pa.Table:
    return pa.table({"prompt": ["a", "b"], **{f"c{i:04d}": [i, None] for i in range(2000)}})


def _nested() -> pa.Table:
    deep: Any = "end"
    for _ in range(20):
        deep = {"k": [deep]}
    return pa.table(
        {
            "prompt": ["a", "b", None],
            "deep": pa.array([deep, None, deep]),
            "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
            "vector": pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32(), 2)),
            "money": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("-2.00")], pa.decimal128(38, 2)),
            "when": pa.array([datetime.datetime(2026, 1, 1), None, None], pa.timestamp("ns")),
            "span": pa.array([datetime.timedelta(1), None, None], pa.duration("us")),
            "bytes": pa.array([b"\x00\xff", None, b""]),
        }
    )


def _two_columns_of_one_name() -> pa.Table:
    return pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])


def _feather_1() -> bytes:
    return b"FEA1" + b"\x00" * 60 + b"FEA1"


PLAIN = parquet({"prompt": ["a", "b", "c"], "n": [1, 2, 3]})
MANY = parquet(lambda: {"prompt": [f"prompt {i}" for i in range(3000)]}, row_group_size=500)
LINES = text('{"prompt": "a", "n": 1}', '{"prompt": "b", "n": 2}')

COLUMNAR = (
    Hostile("parquet without rows", {"t.parquet": parquet(pa.table({"prompt": pa.array([], pa.string())}))}, run=True),
    Hostile("parquet without rows or row groups beside one with", {
        "a.parquet": parquet({"prompt": pa.array([], pa.string()), "n": pa.array([], pa.int64())}), "b.parquet": PLAIN,
    }, rows={"ready": 3}),
    Hostile("parquet without columns", {"t.parquet": parquet(pa.table({}))}, exit_code=64, said="no column 'prompt'"),
    Hostile("one giant row group", {
        "t.parquet": parquet(lambda: {"prompt": [f"prompt {i % 999} " + "x" * 100 for i in range(20_000)]},
                             row_group_size=20_000),
    }, rows={"ready": 20_000}),
    Hostile("three thousand row groups", {
        "t.parquet": parquet(lambda: {"prompt": [f"p{i}" for i in range(3000)]}, row_group_size=1),
    }, rows={"ready": 3000}),
    Hostile("2,000 columns", {"t.parquet": parquet(_wide)}, rows={"ready": 2}, run=True),
    Hostile("nested types", {"t.parquet": parquet(_nested)}, rows={"ready": 2, "skipped_null": 1}, run=True),
    Hostile("a nested prompt", {"t.parquet": parquet({"prompt": [["a"], None, []]})},
            rows={"error": 2, "skipped_null": 1}),
    Hostile("dictionary and large_string columns", {
        "t.parquet": parquet({"prompt": pa.array(["a", "b", "a", None]).dictionary_encode(),
                              "s": pa.array(["x", None, "y", "z"], pa.large_string())}),
    }, rows={"ready": 3, "skipped_null": 1}, run=True),
    Hostile("a large_string prompt", {"t.parquet": parquet({"prompt": pa.array(["a", None], pa.large_string())})},
            rows={"ready": 1, "skipped_null": 1}, run=True),
    Hostile("a binary prompt", {"t.parquet": parquet({"prompt": pa.array([b"a", b"\xff"])})}, rows={"error": 2}),
    Hostile("a prompt column of nulls", {"t.parquet": parquet({"prompt": pa.nulls(3)})}, rows={"skipped_null": 3},
            run=True),
    Hostile("a prompt column of numbers", {"t.parquet": parquet({"prompt": [1, None, 3]})},
            rows={"error": 2, "skipped_null": 1}),
    Hostile("empty and blank prompts", {"t.parquet": parquet({"prompt": ["", " ", "\n", "a"]})},
            rows={"skipped_null": 1, "ready": 3}, run=True),
    Hostile("a prompt of a megabyte beside short ones", {
        "t.parquet": parquet(lambda: {"prompt": ["a", "x" * 1_000_000, "b"]}),
    }, rows={"ready": 2, "too_long": 1}, run=True),
    Hostile("control characters, null bytes and special tokens in prompts", {
        "t.parquet": parquet({"prompt": ["a\0b", "\x1b[31m", "<|im_end|><|endoftext|>", "\u202egnp", "\ufeff"]}),
    }, rows={"ready": 5}, run=True),
    Hostile("invalid UTF-8 in parquet", {"t.parquet": parquet(_invalid_utf8)},
            rows={"ready": 2, "error": 1, "skipped_null": 1}, run=True),
    Hostile("an input column named as a result's", {"t.parquet": parquet({"prompt": ["a"], "status": ["new"]})},
            exit_code=64, said="gives a result column the name 'status'"),
    Hostile("the same with a prefix", {"t.parquet": parquet({"prompt": ["a"], "status": ["new"]})},
            {"output.prefix": "m_"}, rows={"ready": 1}, run=True),
    Hostile("a prefix that collides itself", {"t.parquet": parquet({"prompt": ["a"], "m_status": ["new"]})},
            {"output.prefix": "m_"}, exit_code=64, said="'m_status'"),
    Hostile("two columns of one name", {"t.parquet": parquet(_two_columns_of_one_name)}, exit_code=65,
            said="two columns named 'prompt'"),
    Hostile("columns that differ in case alone", {"t.parquet": parquet({"prompt": ["a"], "Prompt": ["b"]})},
            rows={"ready": 1}, run=True),
    Hostile("column names that are no names", {
        "t.parquet": parquet({"prompt": ["a"], "": [1], " ": [2], "a.b": [3], "{x}": [4], "日本": [5],
                              "x" * 5000: [6]}),
    }, rows={"ready": 1}, run=True),
    Hostile("truncated parquet", {"t.parquet": cut(MANY, 0.7)}, exit_code=65, said="cannot be read"),
    Hostile("parquet whose pages are damaged", {"t.parquet": damaged(MANY, 0.3)}, exit_code=65, said="cannot be read"),
    Hostile("parquet whose footer is damaged", {"t.parquet": damaged(MANY, 0.97)}, exit_code=65, said="cannot be read"),
    Hostile("parquet's magic and nothing else", {"t.parquet": lambda: b"PAR1PAR1"}, exit_code=65,
            said="cannot be read"),
    Hostile("an empty parquet file", {"t.parquet": bytes}, exit_code=65, said="cannot be read"),
    Hostile("JSON lines named parquet", {"t.parquet": LINES}, exit_code=65, said="of another format"),
    Hostile("noise named JSON lines", {"t.jsonl": lambda: bytes(range(256))}, rows={"error": 2}),
    Hostile("a web page named csv", {"t.csv": text("<!doctype html>", "<html><body>404</body></html>")}, exit_code=64,
            said="no column 'prompt'"),
    Hostile("a type that changes between files", {
        "a.parquet": PLAIN, "b.parquet": parquet({"prompt": ["a"], "n": ["one"]}),
    }, exit_code=65, said="column 'n' is string, but int64 in an earlier file"),
    Hostile("the same, left out", {
        "a.parquet": PLAIN, "b.parquet": parquet({"prompt": ["a"], "n": ["one"]}),
    }, {"input.columns": ["prompt"]}, exit_code=65, said="column 'n'"),
    Hostile("a column that later files lack", {
        "a.parquet": PLAIN, "b.parquet": parquet({"prompt": ["d"]}), "c.parquet": parquet({"more": [1], "prompt": "e"}),
    }, rows={"ready": 5}, run=True),
    Hostile("a prompt column that a later file lacks", {"a.parquet": PLAIN, "b.parquet": parquet({"n": [4]})},
            exit_code=65, said="has no column 'prompt'"),
    Hostile("a broken file among good ones", {"a.parquet": PLAIN, "b.parquet": cut(PLAIN, 0.5), "c.parquet": PLAIN},
            exit_code=65, said="b.parquet"),
    Hostile("truncated arrow", {"t.arrow": cut(arrow({"prompt": ["a"] * 5000}), 0.6)}, exit_code=65,
            said="cannot be read"),
    Hostile("a truncated arrow stream", {"t.arrow": cut(arrow({"prompt": ["a"] * 5000}, stream=True), 0.6)},
            exit_code=65, said="cannot be read"),
    Hostile("feather version 1", {"t.feather": _feather_1}, exit_code=65, said="version 1"),
    Hostile("folders and leftovers of other programs", {
        "_SUCCESS": bytes, ".t.parquet.crc": bytes, "_temporary/0/t.parquet": bytes, "a=1/t.parquet": PLAIN,
        "notes.txt": bytes,
    }, rows={"ready": 3}, run=True),
    Hostile("a folder without any table", {"notes.txt": bytes, "_t.parquet": PLAIN}, exit_code=65, said="no files"),
    Hostile("a file that is not there", spec={"input.uri": "nowhere.parquet"}, exit_code=65, said="not found"),
    Hostile("a glob that matches nothing", spec={"input.uri": "in/*.parquet"}, exit_code=65, said="no files"),
    Hostile("a path through two folders of one column", {"k=1/k=2/t.parquet": PLAIN}, exit_code=65, said="twice"),
)  # fmt: skip

TEXT = (
    Hostile("an empty JSONL file", {"t.jsonl": bytes}, rows={}, run=True),
    Hostile("JSONL of blank lines", {"t.jsonl": text("", "  ", "\t")}, rows={}),
    Hostile("JSONL with one broken line", {"t.jsonl": text('{"prompt": "a"}', '{"prompt": "b"', '{"prompt": "c"}')},
            rows={"ready": 2, "error": 1}, run=True),
    Hostile("JSONL cut in its last line", {"t.jsonl": cut(LINES, 0.9)}, rows={"ready": 1, "error": 1}),
    Hostile("JSON lines that are no objects", {"t.jsonl": text("[]", "1", "null", '"text"', "NaN", '{"prompt": "a"}')},
            rows={"error": 5, "ready": 1}, run=True),
    Hostile("JSON nested 100,000 deep", {"t.jsonl": text("[" * 100_000, '{"prompt": "a"}')},
            rows={"error": 1, "ready": 1}),
    Hostile("JSON numbers without end", {"t.jsonl": text('{"prompt": "a", "n": 1e999, "m": ' + "9" * 4000 + "}")},
            rows={"ready": 1}, run=True),
    Hostile("JSON with NaN, which is none", {"t.jsonl": text('{"prompt": "a", "n": NaN}', '{"prompt": "b", "n": 1}')},
            rows={"ready": 2}, run=True),
    Hostile("a lone surrogate", {"t.jsonl": text('{"prompt": "\\ud800", "n": "\\udfff"}', '{"prompt": "a"}')},
            rows={"error": 1, "ready": 1}, run=True),
    Hostile("a key twice in a line", {"t.jsonl": text('{"prompt": "a", "prompt": "b"}')}, rows={"ready": 1}),
    Hostile("a pretty-printed JSON array", {"t.jsonl": text("[", '  {"prompt": "a"},', '  {"prompt": "b"}', "]")},
            rows={"error": 3, "ready": 1}),
    Hostile("a column of every type", {
        "t.jsonl": lambda: "\n".join(json.dumps({"prompt": v}) for v in ["a", 1, 2.5, True, None, [], {}]).encode(),
    }, rows={"ready": 1, "error": 5, "skipped_null": 1}, run=True),
    Hostile("JSONL with a byte order mark and Windows line ends", {
        "t.jsonl": lambda: b"\xef\xbb\xbf" + text('{"prompt": "a"}', '{"prompt": "b"}', end=b"\r\n")(),
    }, rows={"ready": 2}, run=True),
    Hostile("UTF-16", {"t.jsonl": lambda: '{"prompt": "a"}'.encode("utf-16")}, exit_code=65, said="UTF-16"),
    Hostile("Latin-1", {"t.jsonl": text(b'{"prompt": "caf\xe9"}', '{"prompt": "a"}')}, rows={"error": 1, "ready": 1}),
    Hostile("gz with garbage", {"t.jsonl.gz": lambda: b"\x1f\x8b" + bytes(range(200))}, exit_code=65,
            said="cannot be read"),
    Hostile("gz that is no gz", {"t.jsonl.gz": LINES}, exit_code=65, said="cannot be read"),
    Hostile("gz that is cut", {"t.jsonl.gz": cut(zipped(LINES), 0.8)}, exit_code=65, said="cannot be read"),
    Hostile("gz with garbage behind it", {"t.jsonl.gz": lambda: zipped(LINES)() + b"garbage"}, exit_code=65,
            said="cannot be read"),
    Hostile("an empty CSV file", {"t.csv": bytes}, exit_code=65, said="has no header line"),
    Hostile("CSV of a header alone", {"t.csv": text("id,prompt")}, rows={}, run=True),
    Hostile("CSV with ragged rows", {"t.csv": text("id,prompt", "1,a", "2", "3,b,c", "4,d")},
            rows={"ready": 2, "error": 2}, run=True),
    Hostile("CSV with quoted newlines", {"t.csv": text("id,prompt", '1,"a', "", 'b"', '2,"say ""hi"""')},
            rows={"ready": 2}, run=True),
    Hostile("CSV with a quote that never ends", {"t.csv": text("id,prompt", "1,a", '2,"b', "3,c", "4,d")},
            rows={"ready": 1, "error": 1}),
    Hostile("CSV with a byte order mark", {"t.csv": lambda: b"\xef\xbb\xbf" + text("prompt", "a", "b")()},
            rows={"ready": 2}, run=True),
    Hostile("CSV with null bytes", {"t.csv": text("id,prompt", "1,a\0b", "2,c")}, rows={"ready": 2}),
    Hostile("CSV with the header's name twice", {"t.csv": text("prompt,prompt", "a,b")}, exit_code=65, said="twice"),
    Hostile("CSV with semicolons", {"t.csv": text("id;prompt", "1;a")}, exit_code=64, said="'id;prompt'"),
    Hostile("a field of two million characters", {"t.csv": lambda: b"prompt\n" + b"x" * 2_000_000 + b"\nshort\n"},
            rows={"too_long": 1, "ready": 1}),
)  # fmt: skip

CHAT = {"prompt.column": None, "prompt.messages_column": "m"}
ROWS = (
    Hostile("messages of every wrong shape", {
        "t.jsonl": lambda: "\n".join(json.dumps({"m": m}) for m in [
            [{"role": "user", "content": "hi"}], "[]", "not JSON", 5, [], [5], [{"role": "user"}],
            [{"role": "user", "content": {"a": 1}}], [{"content": "x"}], None, [{"role": 5, "content": "x"}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        ]).encode(),
    }, CHAT, rows={"ready": 1, "skipped_null": 3, "error": 8}, run=True),
    Hostile("messages nested without end", {"t.jsonl": text(json.dumps({"m": "[" * 100_000}))}, CHAT,
            rows={"error": 1}),
    Hostile("token ids outside the vocabulary", {
        "t.jsonl": text(*(json.dumps({"m": ids}) for ids in
                          ([1, 2], [-1], [10**6], [10**30], [True], [1.5], [], "[3]"))),
    }, {"prompt.column": None, "prompt.token_ids_column": "m"}, rows={"ready": 2, "error": 5, "skipped_null": 1},
            run=True),
    Hostile("sampling parameters of every wrong kind", {
        "t.jsonl": lambda: "\n".join(json.dumps({"prompt": "a", "p": p}) for p in [
            None, {}, {"max_tokens": 1}, {"max_tokens": 0}, {"max_tokens": "many"}, {"temperature": -1},
            {"temperature": 1e-310}, {"temperature": 1e300}, {"top_p": 2}, {"stop": [""]}, {"seed": 2**70},
            {"unknown": 1}, [1], "text", {"max_tokens": 10**30}, {"stop": ["x"] * 1000}, {"stop_token_ids": [10**30]},
        ]).encode(),
    }, {"sampling.params_column": "p"}, rows={"ready": 7, "invalid_params": 9, "too_long": 1}, run=True),
    Hostile("a template that names no column", {"t.parquet": PLAIN},
            {"prompt.column": None, "prompt.template": "{prompt} {colour}"}, exit_code=64, said="'colour'"),
    Hostile("a template that reaches into objects", {"t.parquet": PLAIN},
            {"prompt.column": None, "prompt.template": "{prompt.__class__.__mro__}"}, exit_code=64, said="no column"),
    Hostile("a template with a stray brace", {"t.parquet": PLAIN},
            {"prompt.column": None, "prompt.template": "{prompt} }"}, exit_code=64, said="prompt.template"),
    Hostile("a filter that runs code", {"t.parquet": PLAIN}, {"input.filter": "__import__('os').abort()"},
            exit_code=64, said="input.filter"),
    Hostile("a filter of ten thousand brackets", {"t.parquet": PLAIN}, {"input.filter": "(" * 9000}, exit_code=64,
            said="input.filter"),
    Hostile("a filter over a struct", {"t.parquet": parquet({"prompt": ["a"], "s": [{"x": 1}]})},
            {"input.filter": "s == 1"}, exit_code=64, said="cannot be compared"),
    Hostile("more shards than rows", {"t.parquet": PLAIN}, {"input.shard": "6/1000"}, rows={}, run=True),
    Hostile("a limit beyond all numbers", {"t.parquet": PLAIN}, {"input.limit": 10**30}, rows={"ready": 3}),
)  # fmt: skip


# --- specifications -------------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """Nine lines of YAML that mean a billion words."""
    lines = ["a0: &a0 [" + ", ".join(["lol"] * 10) + "]"]
    lines += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]" for i in range(1, 9)]
    return "\n".join([*lines, "input: {uri: *a8}"]).encode()


def _job(*lines: str) -> Build:
    return lambda: "\n".join(lines).encode()


SPECS = (
    Hostile("an unknown section", spec={"inputs.uri": "x"}, exit_code=64, said="did you mean 'input'"),
    Hostile("an unknown key", spec={"sampling.max_token": 3}, exit_code=64, said="did you mean 'max_tokens'"),
    Hostile("a key that is a number", spec={"sampling": {7: 3}}, exit_code=64, said="sampling.7: unknown key"),
    Hostile("a section that is a list", spec={"sampling": [1]}, exit_code=64, said="not a mapping"),
    Hostile("a section that is null", spec={"input": None}, exit_code=64, said="input.uri: missing"),
    Hostile("text where a number belongs", spec={"sampling.max_tokens": "four"}, exit_code=64, said="whole number"),
    Hostile("true where a number belongs", spec={"sampling.max_tokens": True}, exit_code=64, said="whole number"),
    Hostile("a number where text belongs", spec={"model.uri": 5}, exit_code=64, said="model.uri"),
    Hostile("a mapping where text belongs", spec={"prompt.column": {"a": 1}}, exit_code=64, said="prompt.column"),
    Hostile("a list in a list", spec={"sampling.stop": [["a"]]}, exit_code=64, said="sampling.stop[0]"),
    Hostile("an integer beyond floats", spec={"sampling.temperature": 10**400}, exit_code=64,
            said="sampling.temperature"),
    Hostile("not a number", spec={"sampling.top_p": float("nan")}, exit_code=64, said="sampling.top_p"),
    Hostile("infinity", spec={"checkpoint.journal_seconds": float("inf")}, exit_code=64, said="journal_seconds"),
    Hostile("absurdly many tokens", {"t.parquet": PLAIN}, {"sampling.max_tokens": 10**30}, rows={"too_long": 3}),
    Hostile("absurdly many rows per part", {"t.parquet": PLAIN}, {"output.rows_per_part": 10**30}, rows={"ready": 3},
            run=True),
    Hostile("no rows per part", spec={"output.rows_per_part": 0}, exit_code=64, said="rows_per_part"),
    Hostile("absurdly many pages", {"t.parquet": PLAIN}, {"engine.plan.kv_pages": 10**18}, exit_code=64,
            said="KV pages"),
    Hostile("no memory", {"t.parquet": PLAIN}, {"engine.host_memory": "1KiB"}, exit_code=64, said="memory"),
    Hostile("memory of no unit", {"t.parquet": PLAIN}, {"engine.host_memory": "12 parsecs"}, exit_code=64,
            said="host_memory"),
    Hostile("a device that does not exist", {"t.parquet": PLAIN}, {"engine.device": "abacus"}, exit_code=64,
            said="abacus"),
    Hostile("a scheme that does not exist", spec={"input.uri": "gopher://x/y.parquet"}, exit_code=64, said="gopher"),
    Hostile("a null byte in a name", spec={"input.uri": "a\0b.parquet"}, exit_code=64, said="null byte"),
    Hostile("a name beyond all limits", spec={"input.uri": "x" * 5000 + ".parquet"}, exit_code=65, said="too long"),
    Hostile("an output within the input", spec={"output.uri": "in/out"}, exit_code=64, said="read as input"),
    Hostile("a job key that climbs", {"t.parquet": PLAIN}, {"job.key": "../../etc"}, exit_code=64, said="job.key",
            run=True),
    Hostile("a model that is not there", {"t.parquet": PLAIN}, {"model.uri": "nowhere"}, exit_code=65, said="nowhere"),
    Hostile("a schema that is none", {"t.parquet": PLAIN}, {"output_schema": {"type": "colour"}}, exit_code=64,
            said="output_schema"),
    Hostile("a regular expression that never closes", {"t.parquet": PLAIN}, {"regex": "(a"}, exit_code=64,
            said="regex"),
    Hostile("an empty job file", job=bytes, exit_code=64, said="mapping"),
    Hostile("a job file of one word", job=_job("moegen"), exit_code=64, said="mapping"),
    Hostile("a job file that is a table", job=PLAIN, exit_code=64, said="job.yaml"),
    Hostile("a job file of two documents", job=_job("input: {uri: a}", "---", "input: {uri: b}"), exit_code=64,
            said="YAML"),
    Hostile("a key twice in YAML", job=_job("input: {uri: a, uri: b}"), exit_code=64, said="'uri' is there twice"),
    Hostile("a section twice in YAML", job=_job("input: {uri: a}", "input: {uri: b}"), exit_code=64, said="twice"),
    Hostile("a bomb of anchors", job=bomb, exit_code=64, said="anchors"),
    Hostile("an anchor that holds itself", job=_job("input: &a {uri: [*a]}"), exit_code=64, said="itself"),
    Hostile("YAML nested without end", job=_job("input: " + "[" * 5_000), exit_code=64, said="deep"),
    Hostile("YAML nested deeply and closed", job=_job("input: " + "[" * 800 + "]" * 800), exit_code=64, said="deep"),
    Hostile("YAML that makes Python objects", job=_job("input: !!python/object/apply:os.system ['true']"),
            exit_code=64, said="python/object"),
    Hostile("a job file of two megabytes", job=_job("# " + "x" * 2_000_000), exit_code=64, said="MiB"),
    Hostile("a number of ten thousand digits", job=_job("sampling: {max_tokens: " + "9" * 10_000 + "}"),
            exit_code=64, said="digits"),
    Hostile("a value of 200,000 characters", spec={"output.mode": "x" * 200_000}, exit_code=64, said="output.mode"),
)  # fmt: skip

CORPUS = (*COLUMNAR, *TEXT, *ROWS, *SPECS)
