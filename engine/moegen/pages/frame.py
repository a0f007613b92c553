"""What the service's pages have in common (Jinja2, autoescaped): they fetch nothing and run nothing."""

from __future__ import annotations

from jinja2 import DictLoader, Environment, StrictUndefined

from moegen.report.style import STYLE

_FRAME = (
    """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{% if refresh_s %}<meta http-equiv="refresh" content="{{ refresh_s }}">
{% endif %}
<title>{{ title }}</title>
<style>
"""
    + STYLE
    + """\
a { color: var(--s0); } nav { margin-bottom: .8rem; font-size: .85rem; } h1 { overflow-wrap: anywhere; }
.state { display: inline-block; border: 1px solid var(--soft); border-left-width: .5rem; border-radius: 4px;
  padding: 0 .4rem; font-size: .8rem; }
.state.running { border-color: var(--s0); } .state.succeeded { border-color: var(--s4); }
.state.failed { border-color: var(--s2); } h3 { font-size: .95rem; margin: 1rem 0 .2rem; }
progress { width: 100%; height: .9rem; accent-color: var(--s0); display: block; }
td.number, th.number { text-align: right; } td small, th small { display: block; color: var(--soft); }
tbody th { color: var(--ink); font-weight: inherit; } caption { text-align: left; color: var(--soft); }
.error { border-left: 3px solid var(--s2); padding-left: .7rem; overflow-wrap: anywhere; }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; padding: .6rem .8rem;
  margin: .3rem 0; font: 12px/1.45 ui-monospace, monospace; overflow: auto; max-height: 30rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
</style>
</head>
<body>
{% block body required %}{% endblock %}
</body>
</html>
"""
)

_REFRESH = """\
{% macro refreshing(refresh_s, active) %}
{% if active %}
<p class="soft">
{% if refresh_s %}
This page is loaded again every {{ refresh_s }} s; <a href="?refresh=0">stop that</a>.
{% else %}
This page stays as it is; <a href="?refresh={{ usual_s }}">load it again every {{ usual_s }} s</a>.
{% endif %}
</p>
{% endif %}
{% endmacro %}
"""

_MISSING = """\
{% extends "frame" %}
{% block body %}
<nav><a href="{{ home }}">All jobs</a></nav>
<main>
<h1>{{ title }}</h1>
<p>{{ text }}</p>
</main>
{% endblock %}
"""

REFRESH_S = 5  # how often the page of something that is going on loads itself again
MOST_CHARACTERS = 2000  # of anything that somebody else wrote


def environment(**templates: str) -> Environment:
    """Templates that may extend `frame` and import `refreshing` from `refresh`."""
    loader = DictLoader({"frame": _FRAME, "refresh": _REFRESH, "missing": _MISSING, **templates})
    found = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=loader)
    found.globals["usual_s"] = REFRESH_S
    return found


def missing_page(title: str, text: str, home: str) -> str:
    """Nothing is there, and why. `home` is the relative address of the list of jobs."""
    return _MISSING_TEMPLATE.render(title=title, text=short(text), home=home, refresh_s=0)


def short(text: object, most: int = MOST_CHARACTERS) -> str:
    """At most so many characters of it."""
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[:most]}…"


_MISSING_TEMPLATE = environment().get_template("missing")
