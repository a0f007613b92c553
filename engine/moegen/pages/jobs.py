"""`/jobs`: the queue, and what has ended."""

from __future__ import annotations

from moegen.job.store import JobStore
from moegen.pages.frame import environment
from moegen.pages.glance import Glance
from moegen.spec import JobState

JOBS_PER_PAGE = 50  # of those that have ended: each is a file to read

_JOBS = """\
{% extends "frame" %}
{% from "refresh" import refreshing %}
{% macro table(jobs, caption) %}
<table>
<caption>{{ caption }}</caption>
<thead><tr><th scope="col">job</th><th scope="col">state</th><th scope="col">model</th><th scope="col">rows</th>
<th scope="col">when</th></tr></thead>
<tbody>
{% for job in jobs %}
<tr><th scope="row"><a href="jobs/{{ job.key }}"><bdi>{{ job.name }}</bdi></a><small>{{ job.key }}</small></th>
<td><span class="state {{ job.state.value }}">{{ job.state.value }}</span><small>{{ job.standing }}</small></td>
<td><bdi>{{ job.model }}</bdi></td>
<td>{% if job.rows_total %}<progress aria-label="rows done" max="1" value="{{ '%.4f' % job.share }}"></progress>
{% endif %}{{ job.rows }}</td>
<td>{{ job.when }}</td></tr>
{% endfor %}
</tbody></table>
{% endmacro %}
{% block body %}
<main>
<h1>{{ title }}</h1>
{{ refreshing(refresh_s, live) }}
<section>
<h2>Queue</h2>
{% if active %}{{ table(active, "Running, then waiting, the next one first") }}
{% else %}<p class="soft">No job runs or waits.</p>
{% endif %}
</section>
<section>
<h2>History</h2>
{% if ended %}{{ table(ended, "Ended, the latest first") }}
{% else %}<p class="soft">{{ "No job has ended." if page == 1 else "No more." }}</p>
{% endif %}
<p>{% if page > 1 %}<a href="?page={{ page - 1 }}" rel="prev">Later ones</a> {% endif %}
{% if more %}<a href="?page={{ page + 1 }}" rel="next">Earlier ones</a>{% endif %}</p>
</section>
</main>
{% endblock %}
"""

_TEMPLATE = environment(jobs=_JOBS).get_template("jobs")


def jobs_page(store: JobStore, page: int, refresh_s: int, now: float) -> str:
    """Everything that runs or waits, and the `page`th (from 1) `JOBS_PER_PAGE` of what has ended.

    While a job is active the first page loads itself again every `refresh_s` seconds; 0: it does not. `now` is Unix
    time.
    """
    records = store.all()
    queue = [record.key for record in store.queue()]
    waiting = {key: place for place, key in enumerate(queue, 1)}
    active = sorted(
        (record for record in records if not record.state.ended),
        key=lambda record: 0 if record.state is JobState.RUNNING else waiting.get(record.key, 0),
    )
    ended = sorted((record for record in records if record.state.ended), key=lambda record: -(record.ended_at or 0.0))
    first, live = (page - 1) * JOBS_PER_PAGE, bool(active) and page == 1
    return _TEMPLATE.render(
        title="moegen jobs",
        refresh_s=refresh_s if live else 0,
        live=live,
        active=[Glance.of(store, record, queue, now) for record in active],
        ended=[Glance.of(store, record, queue, now) for record in ended[first : first + JOBS_PER_PAGE]],
        page=page,
        more=first + JOBS_PER_PAGE < len(ended),
    )
