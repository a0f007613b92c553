"""The job specification: what a person writes, frozen and validated; and the states of a job.

A specification is a nested mapping (YAML or JSON). Each section is one dataclass below; a field's
comment is its meaning. An unknown key, a wrong type or a value out of range is a `SpecError` that
names the field, the value and what would do.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from datetime import date, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from moegen.condition import parse
from moegen.errors import SpecError
from moegen.spec_text import read_mapping

_T = typing.TypeVar("_T")
_SHARD = re.compile(r"\d{1,9}/\d{1,9}")
_SHOWN = 300  # characters of a value, in an error
JOB_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # it names a folder, and a part of a URL

JsonText = typing.NewType("JsonText", str)
"""A mapping as JSON text. A specification may hold the mapping itself; as text it is frozen, and the order of its keys,
which is the order in which an answer has them, survives every trip."""


_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@([^/?#]*)")  # and the host after it
MAX_ANSWERS = 64  # of one row
MAX_LOGPROBS = 20  # beside a generated token's own


class JobState(StrEnum):
    """A job's life: queued -> running -> one of the last three; failed and cancelled jobs can be resumed.

    A job whose lease ran out is paused, from either of the first two, until somebody asks for it.
    """

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


def _require(ok: bool, name: str, value: object, remedy: str) -> None:
    if not ok:
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        raise SpecError(f"{name}: {shown} cannot be used; {remedy}")


def _require_no_password(name: str, uri: str) -> None:
    """Specifications are kept, shown and logged."""
    if (found := _PASSWORD.search(uri)) is not None:
        raise SpecError(
            f"{name}: the URI at {found[1]!r} holds credentials; leave them out, and give them where the storage's "
            "library looks for them (its environment variables or files)"
        )


@dataclass(frozen=True)
class Job:
    """Who asked. No field changes the answers."""

    name: str = ""  # for people
    key: str = ""  # names the work, never the attempt; the service takes it from the URL
    lease_hours: float | None = None  # the service pauses a job that nobody asked about for so long; None: never

    def __post_init__(self) -> None:
        hours = self.lease_hours
        _require(hours is None or 0 < hours < math.inf, "job.lease_hours", hours, "give hours above 0, or leave it out")


@dataclass(frozen=True)
class Input:
    """The table to read."""

    uri: str | tuple[str, ...]  # file, glob, folder or a list of them; any fsspec scheme
    # auto: by the file name's ending, which cannot tell OpenAI's batch files from other JSONL
    format: Literal["auto", "parquet", "arrow", "csv", "jsonl", "openai_jsonl"] = "auto"
    columns: tuple[str, ...] | None = None  # the input columns carried to the output; None: all
    id_column: str | None = None  # checked to exist; the row's ordinal is the key when there is none
    filter: str | None = None  # only the rows for which this is true, as in "lang == 'de' and score > 0.5"
    limit: int | None = None  # only the first rows, of those that pass the filter
    shard: str | None = None  # "i/n", i from 0: a contiguous share of the rows, of which each keeps its index
    # Folders that are named like lang=de are columns: those below `uri`, those in it too, or none.
    partitions: Literal["folder", "uri", "off"] = "folder"

    def __post_init__(self) -> None:
        for uri in self.uris:
            _require_no_password("input.uri", uri)
        _require(bool(self.uris) and all(self.uris), "input.uri", self.uri, "name at least one file, folder or glob")
        _require("\0" not in "".join(self.uris), "input.uri", self.uri, "a name cannot hold a null byte")
        _require(self.limit is None or self.limit >= 0, "input.limit", self.limit, "give 0 or more rows")
        if self.filter is not None:
            parse(self.filter)
        _require(self.shard is None or _SHARD.fullmatch(self.shard) is not None, "input.shard", self.shard,
                 "give i/n, as in 0/4 for the first of four")  # fmt: skip
        index, count = self.shard_of
        _require(index < count, "input.shard", self.shard, "shards are numbered from 0; the last of 4 is 3/4")

    @property
    def uris(self) -> tuple[str, ...]:
        return (self.uri,) if isinstance(self.uri, str) else self.uri

    @property
    def shard_of(self) -> tuple[int, int]:
        """This shard's number, from 0, and how many there are."""
        index, count = (self.shard or "0/1").split("/")
        return int(index), int(count)


@dataclass(frozen=True)
class Prompt:
    """How a row becomes a prompt: exactly one of the first four."""

    column: str | None = None  # raw text
    messages_column: str | None = None  # chat messages: a list of {role, content}, or that list as JSON text
    template: str | None = None  # text with {column} places; {{ and }} are literal braces
    token_ids_column: str | None = None  # ids, used as they are
    system: str | None = None  # a system message; makes raw text and templates go through the chat template
    chat: bool = False  # send raw text or the template through the chat template as one user message
    continuation_column: str | None = None  # task score: the text whose likelihood after the prompt is asked for
    on_null: Literal["skip"] = "skip"  # a row without a prompt (or continuation) gets status skipped_null
    on_too_long: Literal["error", "truncate_left", "truncate_right"] = "error"

    def __post_init__(self) -> None:
        ways = ("column", "messages_column", "template", "token_ids_column")
        given = [way for way in ways if getattr(self, way) is not None]
        _require(len(given) == 1, "prompt", given, f"give exactly one of {', '.join(ways)}")
        if self.token_ids_column is not None:
            _require(not self.chat and self.system is None, "prompt.token_ids_column", self.token_ids_column,
                     "ids are used as they are: leave out prompt.chat and prompt.system")  # fmt: skip


@dataclass(frozen=True)
class Model:
    """The checkpoint folder (config.json, tokenizer.json, *.safetensors)."""

    uri: str
    revision: str | None = None  # recorded in the manifest; part of the fingerprint
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as the checkpoint says
    # What experts' weights become when they are loaded: 8 bits with a scale per output take half of bfloat16's memory
    # and change answers; the manifest says how far.
    weights: Literal["as_stored", "int8", "fp8"] = "as_stored"

    def __post_init__(self) -> None:
        _require_no_password("model.uri", self.uri)
        _require(bool(self.uri) and "\0" not in self.uri, "model.uri", self.uri, "name a checkpoint folder")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; vLLM's names and order (penalty, temperature, min_p, top_k, top_p)."""

    max_tokens: int  # at most this many generated tokens; the tasks classify and score generate none
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and answer; 1: none
    stop: tuple[str, ...] = ()  # the answer ends before the first of these
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own end tokens
    ignore_eos: bool = False  # go on past the model's end tokens
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, remedy in (
            ("max_tokens", self.max_tokens >= 1, "give 1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "give 0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "give a value in (0, 1]"),
            ("top_k", self.top_k >= 0, "give 0 (all) or more"),
            ("min_p", 0 <= self.min_p <= 1, "give a value in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "give a value above 0"),
            ("stop", all(self.stop), "a stop string cannot be empty"),
            ("stop_token_ids", all(i >= 0 for i in self.stop_token_ids), "token ids are 0 or more"),
            ("seed", 0 <= self.seed < 1 << 63, "give 0 up to 2**63 - 1"),
        ):
            _require(ok, f"sampling.{name}", getattr(self, name), remedy)

    def override(self, values: typing.Mapping[str, Any]) -> Sampling:
        """These parameters with a row's own on top; null means "as the job says".

        Raises:
            SpecError: an unknown name, a wrong type or a value out of range.
        """
        own = {name: value for name, value in values.items() if value is not None}
        return from_mapping(Sampling, {**dataclasses.asdict(self), **own}, "sampling")


@dataclass(frozen=True)
class JobSampling(Sampling):
    """The job's parameters, and where rows may bring their own (not `n` and `logprobs`, which decide columns)."""

    n: int = 1  # answers per row; where it is more than 1, the columns that hold answers are lists
    logprobs: int | None = None  # column logprobs: of each generated token, and of so many of the likeliest beside it
    params_column: str | None = None  # a struct, map or JSON text of overrides per row
    param_columns: tuple[str, ...] = ()  # same-named columns of overrides, e.g. [max_tokens, seed]

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(1 <= self.n <= MAX_ANSWERS, "sampling.n", self.n, f"give 1 to {MAX_ANSWERS} answers")
        varied = self.temperature > 0 or self.params_column is not None or "temperature" in self.param_columns
        _require(self.n == 1 or varied, "sampling.n", self.n, "greedy answers are all the same; set a temperature")
        _require(self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "sampling.logprobs", self.logprobs,
                 f"give 0 to {MAX_LOGPROBS}, or leave it out")  # fmt: skip
        known = {f.name for f in dataclasses.fields(Sampling)}
        for name in self.param_columns:
            _require(name in known, "sampling.param_columns", name, f"name some of {', '.join(sorted(known))}")

    @property
    def params(self) -> Sampling:
        return Sampling(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Sampling)})


@dataclass(frozen=True)
class Iceberg:
    """A table in a catalog that pyiceberg is configured for."""

    table: str  # with its namespace, as in lake.answers
    catalog: str = "default"

    def __post_init__(self) -> None:
        _require("." in self.table.strip("."), "output.iceberg.table", self.table,
                 "give namespace and name, as in lake.answers")  # fmt: skip


@dataclass(frozen=True)
class Output:
    """The table to write."""

    uri: str  # a folder; parts, manifest and _SUCCESS go there
    format: Literal["parquet", "arrow", "openai_jsonl"] = "parquet"
    rows_per_part: int = 16_384
    partition_by: tuple[str, ...] = ()  # input columns; rows go to folders named after their values, as in lang=de
    prefix: str = ""  # put before every output column's name, where names collide with the input's
    include: tuple[str, ...] = ()  # extra columns: token_ids, prompt_rendered
    on_length: Literal["null", "keep"] = "null"  # whether `output` holds an answer that was cut at max_tokens
    mode: Literal["create", "new_run"] = "create"  # create: resume what is there; new_run: remove it first
    iceberg: Iceberg | None = None  # the table that finished parts are registered in

    def __post_init__(self) -> None:
        _require_no_password("output.uri", self.uri)
        _require(bool(self.uri) and "\0" not in self.uri, "output.uri", self.uri, "name a folder")
        _require(self.rows_per_part >= 1, "output.rows_per_part", self.rows_per_part, "give 1 or more")
        plain = self.format == "parquet" and not self.partition_by
        _require(self.iceberg is None or plain, "output.iceberg", self.iceberg,
                 "it takes parts with all their columns: format parquet, without partition_by")  # fmt: skip
        _require(len(set(self.partition_by)) == len(self.partition_by), "output.partition_by", self.partition_by,
                 "name each column once")  # fmt: skip
        _require(self.format != "openai_jsonl" or not self.include, "output.include", self.include,
                 "openai_jsonl has no place for it")  # fmt: skip
        for name in self.include:
            _require(name in ("token_ids", "prompt_rendered"), "output.include", name,
                     "choose from token_ids, prompt_rendered")  # fmt: skip


@dataclass(frozen=True)
class PlanOverrides:
    """Batch sizes fixed by hand; None leaves the choice to the planner."""

    attention_tokens: int | None = None  # tokens per attention micro-batch
    expert_tokens: int | None = None  # tokens per expert chunk
    pass_tokens: int | None = None  # tokens per pass: every decode token and the prefill that fits
    level_tokens: int | None = None  # towards the end of a job, rows wait while passes have so many tokens
    page_tokens: int | None = None  # tokens per KV page
    kv_pages: int | None = None  # pages in the pool
    state_slots: int | None = None  # sequences of a model with recurrent layers that run at once
    group_experts: int | None = None  # consecutive experts that move together
    resident_groups: int | None = None  # groups of every layer that stay where they are multiplied
    stream_slots: int | None = None  # places that the other groups pass through
    stream_depth: int | None = None  # groups read ahead; 0: each is read when it is needed
    reader_threads: int | None = None  # threads that read groups from disk
    kv_home: Literal["device", "host"] = "device"  # on a GPU: which memory has the pages
    share_prefix: bool = True  # what nearly all prompts begin with is computed once, in pages that all rows read
    latent_kv: bool = True  # layers with latent attention keep latents; false: keys and values of all heads
    free_windows: bool = True  # keys and values outside the windows of their layers are given up
    kv_dtype: Literal["auto", "int8"] = "auto"  # of pages; auto: the model's. int8 changes answers

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            if item.name in ("kv_home", "latent_kv", "share_prefix", "free_windows", "kv_dtype"):
                continue
            value, least = getattr(self, item.name), int(item.name not in ("resident_groups", "stream_depth"))
            _require(value is None or value >= least, f"engine.plan.{item.name}", value, f"give {least} or more")


@dataclass(frozen=True)
class Engine:
    """Where to run, and within what."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    host_memory: str | None = None  # how much host memory the job may use, as in 12GiB; None: most of what is free
    device_memory: str | None = None  # how much of the device's own memory; None: most of what is free
    plan: PlanOverrides = field(default_factory=PlanOverrides)


@dataclass(frozen=True)
class Checkpoint:
    """What a crash may cost, and how long a silent runner keeps its job."""

    journal_seconds: float = 30.0  # a finished row is on storage after about so long, before its part is complete
    lease_seconds: float = 60.0  # a runner that gives no sign of life for so long has lost the job

    def __post_init__(self) -> None:
        for name, least in (("journal_seconds", 0.05), ("lease_seconds", 0.5)):
            value = getattr(self, name)
            _require(least <= value < math.inf, f"checkpoint.{name}", value, f"give {least} seconds or more")


@dataclass(frozen=True)
class Errors:
    """What rows without an answer mean for the job."""

    on_row_error: Literal["record", "fail_fast"] = "record"  # fail_fast: the first row that fails ends the job
    max_error_rate: float = 0.05  # a larger share of failed rows ends the job after 1,000 rows, or denies it _SUCCESS
    max_failed_rows: int | None = None  # one failed row more ends the job at once; None: only the share counts
    quarantine_after: int = 3  # crashes of the engine with a row in it, the last one with that row alone

    def __post_init__(self) -> None:
        _require(0 <= self.max_error_rate <= 1, "errors.max_error_rate", self.max_error_rate, "give a share in [0, 1]")
        _require(self.max_failed_rows is None or self.max_failed_rows >= 0, "errors.max_failed_rows",
                 self.max_failed_rows, "give 0 or more rows")  # fmt: skip
        _require(self.quarantine_after >= 2, "errors.quarantine_after", self.quarantine_after, "give 2 or more")


@dataclass(frozen=True)
class Limits:
    """Where a job stops although rows are left; raised or taken away, the same command goes on."""

    deadline: str | None = None  # a time with its offset, as in 2026-11-22T06:00:00+00:00
    max_total_tokens: int | None = None  # of prompts and answers, over all runs of the job

    def __post_init__(self) -> None:
        _require(self.deadline is None or self.deadline_at is not None, "limits.deadline", self.deadline,
                 "give a time with its offset from UTC, as in 2026-11-22T06:00:00+00:00")  # fmt: skip
        _require(self.max_total_tokens is None or self.max_total_tokens >= 0, "limits.max_total_tokens",
                 self.max_total_tokens, "give 0 or more tokens")  # fmt: skip

    @property
    def deadline_at(self) -> float | None:
        """Unix time in seconds."""
        try:
            at = datetime.fromisoformat(self.deadline or "")
        except ValueError:
            return None
        return at.timestamp() if at.tzinfo is not None else None


@dataclass(frozen=True)
class JobSpec:
    """One job: a table in, a table out."""

    input: Input
    prompt: Prompt
    model: Model
    sampling: JobSampling
    output: Output
    job: Job = field(default_factory=Job)
    engine: Engine = field(default_factory=Engine)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    errors: Errors = field(default_factory=Errors)
    limits: Limits = field(default_factory=Limits)

    task: Literal["generate", "classify", "score"] = "generate"  # write; choose among choices; rate a continuation
    # What generated answers must be: one of the next three at most.
    output_schema: JsonText | None = None  # JSON that this JSON Schema admits; also parsed, as column output_json
    choices: tuple[str, ...] = ()  # one of these texts, as the model would write it; classify needs them
    regex: str | None = None  # a text that this expression matches as a whole
    # exact: rows that ask for the same for certain (greedy, or rated) are run once and all have that answer.
    dedup: Literal["exact", "off"] = "exact"

    def __post_init__(self) -> None:
        folder = self.output.uri.rstrip("/") + "/"
        for uri in self.input.uris:
            _require(not folder.startswith(uri.rstrip("/") + "/"), "output.uri", self.output.uri,
                     f"it lies in the input {uri!r} and would be read as input; name another folder")  # fmt: skip
        given = [name for name in ("output_schema", "choices", "regex") if getattr(self, name)]
        _require(len(given) <= 1, "output_schema, choices, regex", given, "give at most one of them")
        _require(all(self.choices), "choices", self.choices, "a choice cannot be empty")
        _require(len(set(self.choices)) == len(self.choices), "choices", self.choices, "name each choice once")
        _require(self.regex != "", "regex", self.regex, "give an expression, or leave it out")
        _require(not (given and self.sampling.ignore_eos), "sampling.ignore_eos", True,
                 f"an answer that is bound by {', '.join(given)} ends where it is complete; leave it out")  # fmt: skip
        self._check_task(given)

    def _check_task(self, given: list[str]) -> None:
        """What the task needs, and what it has no use for."""
        continuation = self.prompt.continuation_column
        if self.task == "classify":
            _require(len(self.choices) >= 2, "choices", self.choices, "task classify chooses between two or more")
        if self.task == "score":
            _require(continuation is not None, "prompt.continuation_column", continuation,
                     "task score needs the column whose text is rated")  # fmt: skip
            _require(not given, "task", self.task, f"score rates a given text; leave out {', '.join(given)}")
        else:
            _require(
                continuation is None, "prompt.continuation_column", continuation, "only task score has a use for it"
            )
        if self.output.format == "openai_jsonl":
            _require(
                self.task == "generate", "task", self.task, "output.format=openai_jsonl has places for answers only"
            )
            _require(self.sampling.logprobs is None, "sampling.logprobs", self.sampling.logprobs,
                     "output.format=openai_jsonl has no place for token ids")  # fmt: skip
        if self.task != "generate":
            _require(self.sampling.n == 1, "sampling.n", self.sampling.n, f"task {self.task} samples nothing")
            _require(self.sampling.logprobs is None, "sampling.logprobs", self.sampling.logprobs,
                     f"task {self.task} samples nothing")  # fmt: skip
            _require("token_ids" not in self.output.include, "output.include", "token_ids",
                     f"task {self.task} generates nothing")  # fmt: skip

    @property
    def repeats(self) -> bool:
        """Whether a row may have another's answer. An answer that is drawn at random is its row's own."""
        sampling = self.sampling
        varied = sampling.params_column is not None or "temperature" in sampling.param_columns
        return self.dedup == "exact" and (self.task != "generate" or sampling.temperature == 0 or varied)

    @property
    def bound(self) -> bool:
        """Whether generated answers must be of a given form."""
        return self.task == "generate" and bool(self.output_schema or self.choices or self.regex)

    @classmethod
    def from_mapping(cls, mapping: typing.Mapping[str, Any]) -> JobSpec:
        """Raises `SpecError` when `mapping` is not a complete and valid specification."""
        if isinstance(mapping, typing.Mapping) and mapping.get("task") in ("classify", "score"):
            sampling = mapping.get("sampling") or {}
            if isinstance(sampling, typing.Mapping):  # nothing is generated, so max_tokens need not be given
                mapping = {**mapping, "sampling": {"max_tokens": 1, **sampling}}
        mapping = _with_openai_columns(mapping)
        return from_mapping(cls, mapping, "")

    @classmethod
    def read(cls, path: str | Path, overrides: typing.Iterable[str] = ()) -> JobSpec:
        """A YAML or JSON file, with `a.b=c` overrides on top (each c is read as YAML)."""
        mapping = read_mapping(Path(path))
        for override in overrides:
            set_field(mapping, override)
        return cls.from_mapping(mapping)

    def to_mapping(self) -> dict[str, Any]:
        """The plain form: `from_mapping` of it (also after a trip through JSON) gives an equal specification."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Canonical: sorted keys, no spaces, so that equal specifications are equal strings."""
        return json.dumps(self.to_mapping(), sort_keys=True, separators=(",", ":"))


def _with_openai_columns(mapping: typing.Mapping[str, Any]) -> typing.Mapping[str, Any]:
    """Where the input is an OpenAI batch file, prompts and parameters come from its lines unless something is said."""
    sections = [mapping.get(name) if isinstance(mapping, typing.Mapping) else None for name in ("input", "sampling")]
    table, sampling = ({} if section is None else section for section in sections)
    if not isinstance(table, typing.Mapping) or table.get("format") != "openai_jsonl":
        return mapping
    found = {**mapping, "prompt": mapping.get("prompt") or {"messages_column": "messages"}}
    found["input"] = {"id_column": "custom_id", **table}
    if isinstance(sampling, typing.Mapping):
        found["sampling"] = {"params_column": "params", **sampling}
    return found


def set_field(mapping: dict[str, Any], override: str) -> None:
    """Applies one `a.b=c` to a plain mapping; raises `SpecError` when it is not of that form."""
    import yaml

    path, equals, text = override.partition("=")
    _require(bool(equals and path), "--set", override, "write --set section.field=value")
    *parents, last = path.strip().split(".")
    node = mapping
    for parent in parents:
        node = node.setdefault(parent, {})
        _require(isinstance(node, dict), "--set", override, f"{parent} is not a section")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {path}: {text!r} is not a YAML value: {error}") from error


def from_mapping(cls: type[_T], mapping: object, path: str) -> _T:
    """A dataclass from a mapping, strictly: unknown keys, missing keys and wrong types are errors."""
    where = path or "the specification"
    if not isinstance(mapping, typing.Mapping):
        raise SpecError(f"{where}: {mapping!r} is not a mapping; write its fields as keys")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in mapping:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(fields))}"
            raise SpecError(f"{_join(path, str(key))}: unknown key; {hint}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, item in fields.items():
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], _join(path, name))
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise SpecError(f"{_join(path, name)}: missing; it has no default")
    return cls(**values)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is JsonText:
        return _json_text(value, path)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_mapping(hint, value if value is not None else {}, path)
    if origin is Literal:
        value = "off" if value is False and "off" in args else value  # YAML's word for false
        _require(value in args, path, value, f"choose from {', '.join(map(repr, args))}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [option for option in args if option is not type(None)]
        if len(options) == 2 and isinstance(value, (list, tuple)):  # str | tuple[str, ...]
            return _convert(options[1], value, path)
        return _convert(options[0], value, path)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            value = [value]  # one item may be written without brackets
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if hint is str and isinstance(value, date):  # a datetime is one too; what YAML makes of 2026-11-22
        return value.isoformat()
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        _require(abs(value) < 1 << 1000, path, value, "give a number that a double can hold")
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    matches = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    _require(matches, path, value, f"give {_ARTICLES.get(hint, hint.__name__)}")
    return value


def _json_text(value: Any, path: str) -> JsonText:
    try:
        mapping = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(mapping, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SpecError(f"{path}: is not JSON: {error}; give a mapping of JSON values, or it as JSON text") from error
    _require(isinstance(mapping, dict), path, value, "give a mapping, or it as JSON text")
    return JsonText(text)


_ARTICLES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
