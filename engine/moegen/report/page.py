"""A job's statistics as one self-contained HTML page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from moegen.errors import InputError, SpecError
from moegen.job.stats_file import Stats
from moegen.report.charts import HEAT_STEPS, Series, heat_map, histogram, lines, stacked
from moegen.report.pairs import pairs
from moegen.report.passes import Passes
from moegen.report.template import TEMPLATE
from moegen.run.stats import Ints
from moegen.table.manifest import Manifest, read_manifest
from moegen.units import format_bytes, format_moment

NOT_MEASURED = "not measured"
_LOAD_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.1, 1.33, 1.75, 2.5, 4.0)  # times a layer's mean


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Charts with a word about them."""

    title: str
    text: str
    charts: Sequence[Markup] = ()


@dataclass(frozen=True)
class Table:
    """Rows of cells, under column names if they have any."""

    title: str
    rows: Sequence[Sequence[str]]
    columns: Sequence[str] | None = None


def report(output_uri: str, attempt: int | None = None) -> str:
    """The page of a job's output folder: charts of one attempt (from 1; None: the last), a line for every other.

    Raises:
        InputError: the folder holds no statistics, or files that are not those of this version.
        SpecError: there is no such attempt.
        StorageError: storage refused.
    """
    stats = Stats.read(output_uri)
    if stats is None:
        raise InputError(
            f"{output_uri}: holds no statistics (_stats.json): the job made no pass, or was run by a moegen that did "
            "not write them; run it into another folder, or with output.mode=new_run"
        )
    number = len(stats.attempts) if attempt is None else attempt
    if not 1 <= number <= len(stats.attempts):
        raise SpecError(f"--attempt: {number} cannot be shown; {output_uri} has attempts 1 to {len(stats.attempts)}")
    return _rendered(output_uri, stats, number - 1, _manifest_of(output_uri, stats))


def _manifest_of(output_uri: str, stats: Stats) -> Manifest | None:
    """The manifest, where it is of the same work: it comes last, and an unfinished job has none."""
    found = read_manifest(output_uri)
    return found if found is not None and found.fingerprint == stats.fingerprint else None


def _rendered(output_uri: str, stats: Stats, index: int, manifest: Manifest | None) -> str:
    shown = stats.attempts[index]
    passes = Passes(shown["passes"])
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE).render(
        title=f"moegen: {(manifest and (manifest.job_name or manifest.job_key)) or 'a job that has not finished'}",
        lines=_lines(output_uri, stats, index, manifest),
        shades=len(HEAT_STEPS) + 1,
        tiles=_tiles(shown),
        sections=[
            *_pass_sections(passes, shown["throughput"]),
            *_expert_sections(passes, stats.expert_counts),
        ],
        tables=[
            _attempts(stats.attempts),
            Table("Plan", pairs(shown["plan"])),
            Table("Model", pairs(shown["model"])),
            Table("Machine", pairs(shown["machine"])),
        ],
    )


def _lines(output_uri: str, stats: Stats, index: int, manifest: Manifest | None) -> list[str]:
    shown = stats.attempts[index]
    lines = [f"{output_uri}, model {shown['model_uri']}"]
    if manifest is not None:
        counts = ", ".join(f"{count:,} {status}" for status, count in manifest.statuses.items())
        lines.append(f"{manifest.rows:,} rows ({counts}), {manifest.completion_tokens:,} generated tokens in its parts")
    which = f"attempt {index + 1} of {len(stats.attempts)}" if len(stats.attempts) > 1 else "one attempt"
    when = format_moment(shown["started_at"])
    lines.append(f"Figures of {which}, {when}, moegen {shown['engine_version']}: {shown['outcome']}")
    return lines


# --- headline -------------------------------------------------------------------------------------------------------


def _tiles(shown: Mapping[str, Any]) -> list[Tile]:
    total, promised = shown["total"], shown["throughput"]
    moved = [total[name] for name in ("disk_bytes", "link_bytes")]
    return [
        Tile("generated tokens/s", f"{total['tokens_per_s']:,.1f}", f"{total['generated_tokens']:,} tokens"),
        Tile("predicted tokens/s", _known(promised["predicted_tokens_per_s"], "{:,.1f}", "none made"),
             _known(promised["difference"], "{:+.1%} against measured", "moegen probe measures what it takes")),
        Tile("passes", f"{total['passes']:,}", f"{total['running']:,.0f} sequences in flight on average"),
        Tile("time in passes", f"{total['seconds']:,.1f} s",
             _known(shown["load_s"], "{:.1f} s to load the model before")),
        Tile("S-MFU", _share(total["s_mfu"]), "of the peak FLOP/s measured"),
        Tile("S-MBU", _share(total["s_mbu"]), "of the busiest memory's peak bandwidth"),
        Tile("weights streamed", NOT_MEASURED if None in moved else format_bytes(sum(moved)),
             f"disk {_share(total['disk_utilisation'])}, link {_share(total['link_utilisation'])}"),
        Tile("starved", _known(total["waited_s"], "{:.1f} s"),
             f"waiting for weights; overlap {_share(total['overlap'])}"),
        Tile("tokens per expert", _known(total["expert_tokens_mean"], "{:,.1f}"),
             f"in a layer and pass; {_known(total['expert_tokens_min'], '{:,}')} to "
             f"{_known(total['expert_tokens_max'], '{:,}')}"),
        Tile("peak memory", _known(shown["peak_rss_bytes"] and format_bytes(shown["peak_rss_bytes"]), "{}"),
             "resident in the runner"),
    ]  # fmt: skip


def _known(value: Any, form: str, otherwise: str = NOT_MEASURED) -> str:
    return otherwise if value is None else form.format(value)


def _share(value: float | None) -> str:
    return _known(value, "{:.1%}")


# --- charts ---------------------------------------------------------------------------------------------------------


def _pass_sections(passes: Passes, throughput: Mapping[str, Any]) -> list[Section]:
    rate = Series("generated tokens/s", passes.mean_by_second("tokens_per_s"))
    running = Series("sequences in flight", passes.mean_by_pass("running"))
    return [
        Section(
            "Throughput",
            "Generated tokens per second, and the sequences in flight that they come from.",
            [_over_time(passes, "Generated tokens per second", [rate]), _over_time(passes, "Sequences", [running])],
        ),
        _comparison(passes, throughput),
        Section(
            "Time by resource per pass",
            "Where the seconds of a pass go. The rest is projections, norms, router, sampling, and the reading and "
            "writing of rows.",
            [stacked("Time by resource per pass", passes.count_edges, _parts(passes), "pass", "s per pass")],
        ),
        _utilisation(passes),
    ]


def _comparison(passes: Passes, throughput: Mapping[str, Any]) -> Section:
    title, predicted = "Predicted against measured", throughput["predicted_tokens_per_s"]
    if predicted is None:
        return Section(title, "No prediction was made: the planner wants rates of this machine (moegen probe).")
    measured = Series("measured", passes.mean_by_second("tokens_per_s"))
    promised = Series("predicted for the whole job", [predicted] * len(measured.values))
    promise = throughput["prediction"]
    text = (
        f"Predicted before the first pass: {predicted:,.1f} generated tokens/s, bound by {promise['bound']}, for "
        f"{promise['rows']:,} rows of {promise['mean_prompt_tokens']:,.0f} prompt tokens whose answers have the "
        f"{promise['mean_answer_tokens']:,.0f} tokens that they may have. Measured: "
        f"{_known(throughput['measured_tokens_per_s'], '{:,.1f}')}; the prediction is "
        f"{_known(throughput['difference'], '{:+.1%}')} off."
    )
    return Section(title, text, [_over_time(passes, title, [measured, promised])])


def _over_time(passes: Passes, title: str, series: Sequence[Series]) -> Markup:
    return lines(title, passes.second_edges, series, "seconds since the first pass", "")


def _parts(passes: Passes) -> list[Series]:
    """Seconds per pass: attention, experts, waiting and what is left; without timers, only what is known."""
    names = {"attention_s": "attention", "experts_s": "experts", "waited_s": "waiting for weights"}
    known = {name: passes.sum_per_pass(name) for name in names if passes.measured(name)}
    if {"experts_s", "waited_s"} <= known.keys():  # the experts are what waits
        known["experts_s"] = _minus(known["experts_s"], [known["waited_s"]])
    rest = _minus(passes.sum_per_pass("seconds"), list(known.values()))
    return [*(Series(names[name], values) for name, values in known.items()), Series("rest" if known else "pass", rest)]


def _minus(values: Sequence[float | None], others: Sequence[Sequence[float | None]]) -> list[float | None]:
    taken = [sum(each or 0.0 for each in column) for column in zip(*others, strict=True)] or [0.0] * len(values)
    return [None if value is None else max(value - less, 0.0) for value, less in zip(values, taken, strict=True)]


def _utilisation(passes: Passes) -> Section:
    names = {"s_mfu": "S-MFU", "s_mbu": "S-MBU", "disk_utilisation": "disk", "link_utilisation": "link"}
    known = [Series(text, passes.mean_by_second(name)) for name, text in names.items() if passes.measured(name)]
    if not known:
        return Section("Utilisation", "Not measured: rates of this machine are wanted (moegen probe).")
    text = "Shares of what this machine was measured to do. What is not drawn was not measured."
    return Section("Utilisation", text, [_over_time(passes, "Utilisation", known)])


def _expert_sections(passes: Passes, attempts: Sequence[Mapping[str, Ints]]) -> list[Section]:
    """Totals are over all attempts: their work is the same."""
    totals: dict[str, Ints] = {}
    for layers in attempts:
        for layer, counts in layers.items():
            totals[layer] = totals[layer] + counts if layer in totals else counts
    if not totals:
        return [Section(name, "Not measured.") for name in ("Tokens per expert", "Expert heat map")]
    loads = [count / (counts.mean() or 1.0) for counts in totals.values() for count in counts]
    rows = [(_layer_label(layer), counts.tolist()) for layer, counts in totals.items()]
    return [
        Section(
            "Tokens per expert",
            "How many tokens an expert of a layer meets in one pass: what its weights are fetched for. Below, how many "
            f"of the {len(loads):,} experts met how many over all attempts, in multiples of their layer's mean; the "
            "last bar is open.",
            [
                _over_time(passes, "Tokens per expert in a pass", _extremes(passes)),
                histogram("Tokens per expert", _LOAD_EDGES, _binned(loads), "times the layer's mean", "experts"),
            ],
        ),
        Section(
            "Expert heat map",
            "Tokens that each expert met, over all attempts, as a multiple of its layer's mean.",
            [heat_map("Expert heat map", rows, "expert")],
        ),
    ]


def _extremes(passes: Passes) -> list[Series]:
    return [
        Series("most", passes.most("expert_tokens_max")),
        Series("mean", passes.mean_by_pass("expert_tokens_mean")),
        Series("least", passes.least("expert_tokens_min")),
    ]


def _binned(loads: Sequence[float]) -> list[int]:
    """Experts between each edge and the next; what is above the last edge counts in the last bin."""
    last = len(_LOAD_EDGES) - 2
    found = Counter(min(sum(load >= edge for edge in _LOAD_EDGES[1:]), last) for load in loads)
    return [found[index] for index, _ in enumerate(pairwise(_LOAD_EDGES))]


def _layer_label(name: str) -> str:
    match = re.search(r"layers\.(\d+)\.", name)
    return f"layer {match[1]}" if match else name[-10:]


# --- tables ---------------------------------------------------------------------------------------------------------


def _attempts(attempts: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (str(number), format_moment(entry["started_at"]), entry["outcome"], f"{entry['resumed_rows']:,}",
         f"{entry['total']['passes']:,}", f"{entry['total']['generated_tokens']:,}",
         f"{entry['total']['seconds']:,.1f} s", f"{entry['total']['tokens_per_s']:,.1f}")
        for number, entry in enumerate(attempts, 1)
    ]  # fmt: skip
    names = ("attempt", "began", "outcome", "rows found", "passes", "generated", "time", "tokens/s")
    return Table("Attempts", rows, names)
