"""`/jobs/{key}`: one job, from its place in the queue to its manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from moegen.job.progress import Detail
from moegen.job.records import Record
from moegen.job.samples import Point
from moegen.job.store import JobStore
from moegen.pages.frame import environment, short
from moegen.pages.glance import Glance
from moegen.report.charts import Series, lines
from moegen.report.page import Tile
from moegen.report.pairs import pairs
from moegen.spec import JobState
from moegen.units import format_duration, format_moment

_LOG_LINES = 40
_LOG_CHARACTERS = 16_384
_URIS = 5  # of an input that is a list

_JOB = """\
{% extends "frame" %}
{% from "refresh" import refreshing %}
{% macro counts(title, name, rows) %}
<h3>{{ title }}</h3>
<table>
<thead><tr><th scope="col">{{ name }}</th><th scope="col" class="number">rows</th><th scope="col" class="number">
of those done</th></tr></thead>
<tbody>
{% for value, count, share in rows %}
<tr><th scope="row">{{ value }}</th> <td class="number">{{ count }}</td> <td class="number">{{ share }}</td></tr>
{% endfor %}
</tbody></table>
{% endmacro %}
{% block body %}
<nav><a href="../jobs">All jobs</a></nav>
<main>
<header>
<h1><bdi>{{ job.name }}</bdi></h1>
<p><span class="state {{ job.state.value }}">{{ job.state.value }}</span> {{ job.standing }}
<span class="soft">{{ job.when }}</span></p>
{% if error %}<p class="error"><bdi>{{ error }}</bdi></p>
{% endif %}
</header>
{{ refreshing(refresh_s, active) }}
<section>
<h2>Progress</h2>
{% if job.rows_total %}
<progress aria-label="rows done" max="1" value="{{ '%.4f' % job.share }}">{{ job.rows }}</progress>
{% endif %}
<p>{{ job.rows }}</p>
<dl class="tiles">
{% for tile in tiles %}
<div><dt>{{ tile.name }}</dt> <dd>{{ tile.value }}<small>{{ tile.note }}</small></dd></div>
{% endfor %}
</dl>
<p>{% for address, text in links %}<a href="{{ job.key }}/{{ address }}">{{ text }}</a>{{ "" if loop.last else " · " }}
{% endfor %}</p>
</section>
<section>
<h2>Throughput</h2>
{% if charts %}
<p class="soft">{{ course }}</p>
{% for chart in charts %}{{ chart }}
{% endfor %}
{% else %}
<p class="soft">No row has run.</p>
{% endif %}
</section>
<section>
<h2>Rows</h2>
{% if statuses %}
{{ counts("By status", "status", statuses) }}
{% if reasons %}{{ counts("Why rows have no answer", "error", reasons) }}
{% endif %}
<p class="soft">moegen inspect shows examples of every error; this page holds no text of a row.</p>
{% else %}
<p class="soft">No row is done.</p>
{% endif %}
</section>
<section>
<h2>Job</h2>
<dl class="pairs">
{% for name, value in facts %}
<div><dt>{{ name }}</dt> <dd><bdi>{{ value }}</bdi></dd></div>
{% endfor %}
</dl>
</section>
<section>
<h2>Plan</h2>
{% if plan %}
<dl class="pairs">
{% for name, value in plan %}
<div><dt>{{ name }}</dt> <dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% else %}
<p class="soft">No plan has been made.</p>
{% endif %}
</section>
<section>
<h2>Log</h2>
{% if log %}
<pre tabindex="0" role="region" aria-label="the end of the log">{{ log }}</pre>
{% else %}
<p class="soft">Nothing has been logged.</p>
{% endif %}
</section>
</main>
{% endblock %}
"""

_TEMPLATE = environment(job=_JOB).get_template("job")


def job_page(store: JobStore, record: Record, refresh_s: int, now: float) -> str:
    """While the job is active the page loads itself again every `refresh_s` seconds; 0: it does not."""
    status = store.status(record)
    progress, detail = status.progress or {}, Detail(**status.detail)
    job = Glance.of(store, record, [waiting.key for waiting in store.queue()], now)
    points = store.samples(record)
    active = not record.state.ended
    return _TEMPLATE.render(
        title=f"{job.state.value}: {job.name} - moegen",
        refresh_s=refresh_s if active else 0,
        active=active,
        job=job,
        error=short(record.error or ""),
        tiles=_tiles(record, progress),
        links=_links(record, progress),
        course=_course(record, points),
        charts=_charts(points),
        statuses=_counts(progress.get("statuses", {}), job.rows_done),
        reasons=_counts(detail.errors, job.rows_done),
        facts=_facts(record),
        plan=pairs(detail.plan or {}),
        log=store.log_tail(record, _LOG_LINES)[-_LOG_CHARACTERS:],
    )


# --- figures --------------------------------------------------------------------------------------------------------


def _tiles(record: Record, progress: Mapping[str, Any]) -> list[Tile]:
    """Rates are those of the last minutes while the job runs, and what they were at the end afterwards."""
    if not progress:
        return [Tile("attempts", f"{record.attempts:,}")]
    running = record.state is JobState.RUNNING
    left, engine = progress["eta_s"] if running else None, progress["engine"] or {}
    lately = "over the last minutes" if running else "over the last minutes that it ran"
    return [
        Tile("rows/s", f"{progress['rows_per_s']:,.1f}", lately),
        Tile("generated tokens/s", f"{progress['tokens_per_s']:,.1f}", lately),
        Tile("time left", "-" if left is None else format_duration(left), "at that rate"),
        Tile("rows on storage", f"{progress['rows_committed']:,}", "in parts: no crash takes them"),
        Tile("generated tokens", f"{progress['completion_tokens']:,}", "of the rows that are done"),
        Tile("prompt tokens", f"{progress['prompt_tokens']:,}", "of the rows that are done"),
        Tile("in flight", f"{engine['running']:,.0f}" if engine and running else "-", "sequences at once"),
        Tile("attempts", f"{record.attempts:,}", "runners started"),
    ]


def _counts(counts: Mapping[str, int], rows_done: int) -> list[tuple[str, str, str]]:
    """The most frequent first."""
    return [
        (name, f"{count:,}", f"{100 * count / max(rows_done, 1):.2f} %")
        for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _links(record: Record, progress: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Addresses below the job's own, and what they lead to."""
    links = [("log", "log")] if record.attempts else []
    if progress.get("engine"):
        links.append(("report", "report: every pass, every expert"))
    if record.state is JobState.SUCCEEDED:
        links.append(("manifest", "manifest"))
    return links


def _facts(record: Record) -> list[tuple[str, str]]:
    spec = record.spec
    given = spec["input"]["uri"]
    uris = [given] if isinstance(given, str) else list(given)
    more = f" and {len(uris) - _URIS:,} more" if len(uris) > _URIS else ""
    moments = {"created": record.created_at, "last start": record.started_at, "ended": record.ended_at}
    return [
        ("key", record.key),
        ("model", short(spec["model"]["uri"])),
        ("input", short(", ".join(uris[:_URIS])) + more),
        ("output", short(spec["output"]["uri"])),
        *((name, format_moment(moment)) for name, moment in moments.items() if moment is not None),
        ("owner", str(record.owner)),
        ("exit code", "-" if record.exit_code is None else str(record.exit_code)),
    ]


# --- throughput -----------------------------------------------------------------------------------------------------


def _course(record: Record, points: Sequence[Point]) -> str:
    which = "all attempts, one after the other" if record.attempts > 1 else "the attempt"
    seconds, rows, tokens = points[-1]
    return (
        f"Over the {format_duration(seconds)} in which rows ran in {which}: {rows:,.0f} rows ended, "
        f"{tokens:,.0f} tokens were generated."
    )


def _charts(points: Sequence[Point]) -> list[Markup]:
    """Rates between one point and the next; none before there are two."""
    if len(points) < 2:
        return []
    divisor, unit = _time_unit(points[-1][0])
    edges = [point[0] / divisor for point in points]
    return [
        lines(title, edges, [Series(title, _rates(points, column))], unit, "")
        for column, title in ((2, "Generated tokens per second"), (1, "Rows per second"))
    ]


def _rates(points: Sequence[Point], column: int) -> list[float | None]:
    spans = ((later[0] - first[0], later[column] - first[column]) for first, later in pairwise(points))
    return [count / seconds if seconds > 0 else None for seconds, count in spans]


def _time_unit(seconds: float) -> tuple[float, str]:
    for most, divisor, unit in ((600.0, 1.0, "seconds"), (36_000.0, 60.0, "minutes")):
        if seconds <= most:
            return divisor, unit
    return 3600.0, "hours"
