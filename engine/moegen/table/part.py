"""One part of the output table: its name, its place in the input order, its bytes and what its footer tells."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from moegen.errors import SpecError
from moegen.row import RowResult, Status
from moegen.storage import open_input, read_bytes
from moegen.table.openai_lines import encode_lines, read_totals
from moegen.table.source import reading

_FOOTER_KEY = b"moegen"
_NAME = re.compile(r"part-(\d{6,})-([0-9a-f]{16})\.(parquet|arrow|jsonl)")


@dataclass(frozen=True)
class Totals:
    """Rows, how many of them have which status and which error, and tokens.

    Tokens are those of rows with an answer of their own; what the others would have taken is counted beside.
    """

    rows: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    errors: dict[str, int] = field(default_factory=dict)  # error code -> rows
    dedup_rows: int = 0  # with the answer of an earlier row
    dedup_tokens: int = 0  # of their prompts and answers

    @classmethod
    def of(cls, results: Iterable[RowResult]) -> Totals:
        results = list(results)
        own = [result for result in results if result.dedup_of is None]
        copies = [result for result in results if result.dedup_of is not None]
        return cls(
            len(results),
            dict(sorted(Counter(result.status.value for result in results).items())),
            sum(result.prompt_tokens or 0 for result in own),
            sum(result.completion_tokens or 0 for result in own),
            dict(sorted(Counter(result.error.code for result in results if result.error is not None).items())),
            len(copies),
            sum((result.prompt_tokens or 0) + (result.completion_tokens or 0) for result in copies),
        )

    @property
    def failed(self) -> dict[str, int]:
        """Rows per status that counts against `errors.max_error_rate`."""
        return {status: count for status, count in self.statuses.items() if Status(status).failed}

    @property
    def error_rate(self) -> float:
        """Failed rows as a share of all; 0 without rows."""
        return sum(self.failed.values()) / self.rows if self.rows else 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.rows + other.rows,
            dict(sorted((Counter(self.statuses) + Counter(other.statuses)).items())),
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            dict(sorted((Counter(self.errors) + Counter(other.errors)).items())),
            self.dedup_rows + other.dedup_rows,
            self.dedup_tokens + other.dedup_tokens,
        )


@dataclass(frozen=True)
class Footer:
    """What a part says about itself, so that a resumed run need not read its rows."""

    job_key: str
    fingerprint: str
    index: int
    prefix: str  # before the names of the result columns
    totals: Totals

    def to_metadata(self) -> dict[bytes, bytes]:
        return {_FOOTER_KEY: json.dumps(asdict(self), sort_keys=True).encode()}

    @classmethod
    def from_metadata(cls, metadata: dict[bytes, bytes] | None, uri: str) -> Footer:
        """Raises `SpecError` when the metadata is not that of a part."""
        try:
            values = json.loads((metadata or {})[_FOOTER_KEY])
            return cls(**{**values, "totals": Totals(**values["totals"])})
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(
                f"{uri}: has a part's name but was not written by moegen; use another output.uri"
            ) from error


@dataclass(frozen=True)
class PartInfo:
    """A committed part. `sha256` is over its bytes, None where no run that wrote a manifest knows it."""

    name: str
    rows: int
    size_bytes: int
    sha256: str | None


def part_name(index: int, fingerprint: str, format_: str) -> str:
    """Sorted by name, parts are in row order; `fingerprint` is shown by its first 16 digits."""
    ending = "jsonl" if format_ == "openai_jsonl" else format_
    return f"part-{index:06d}-{fingerprint[:16]}.{ending}"


def is_part_name(name: str) -> bool:
    """Whether moegen names parts like this."""
    return _NAME.fullmatch(name) is not None


def encode(table: pa.Table, footer: Footer, format_: str) -> bytes:
    """The part's bytes, the same for the same rows: Parquet or Arrow IPC, zstd level 3, or lines of JSON.

    Raises:
        pyarrow.ArrowException: the format has no place for a column.
    """
    if format_ == "openai_jsonl":
        return encode_lines(table, footer.fingerprint, footer.prefix)
    # One chunk per column: Parquet then does not show in which batches the rows were read.
    table = table.combine_chunks().replace_schema_metadata(footer.to_metadata())
    sink = pa.BufferOutputStream()
    if format_ == "parquet":
        pq.write_table(table, sink, compression="zstd", compression_level=3)
    else:
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=3), unify_dictionaries=True)
        with pa.ipc.new_file(sink, table.schema, options=options) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


def unwritable_column(table: pa.Table, footer: Footer, format_: str) -> str | None:
    """The first column that the format cannot hold."""
    for name in table.column_names:
        try:
            encode(table.select([name]), footer, format_)
        except pa.ArrowException:
            return str(name)
    return None


def read_footer(uri: str) -> Footer:
    """Reads a stored part's footer, not its rows.

    Raises:
        InputError: the file is gone or damaged.
        SpecError: it is not a part.
        StorageError: storage refused.
    """
    if uri.endswith(".jsonl"):
        return _of_lines(uri)
    with reading(uri), closing(open_input(uri, "random")) as stored:
        if uri.endswith(".parquet"):
            metadata = pq.read_metadata(stored).metadata
        else:
            metadata = pa.ipc.open_file(stored).schema.metadata
    return Footer.from_metadata(metadata, uri)


def _of_lines(uri: str) -> Footer:
    """Lines have no footer; they tell by themselves what one would."""
    try:
        fingerprint, totals = read_totals(read_bytes(uri))
        return Footer("", fingerprint, int(uri.rpartition("part-")[2].partition("-")[0]), "", Totals(**totals))
    except (KeyError, TypeError, ValueError) as error:
        raise SpecError(f"{uri}: has a part's name but was not written by moegen; use another output.uri") from error
