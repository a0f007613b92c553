"""The report's frame (Jinja2, autoescaped): it fetches nothing."""

from moegen.report.style import STYLE

TEMPLATE = (
    """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
"""
    + STYLE
    + """\
{% for k in range(shades) %}
.heat.h{{ k }} { fill: var(--heat); background: var(--heat); fill-opacity: {{ (k + 0.3) / shades }}; }
i.heat.h{{ k }} { opacity: {{ (k + 0.3) / shades }}; }
{% endfor %}
</style>
<header>
<h1>{{ title }}</h1>
{% for line in lines %}<p class="soft">{{ line }}</p>
{% endfor %}</header>
<dl class="tiles">
{% for tile in tiles %}<div><dt>{{ tile.name }}</dt><dd>{{ tile.value }}<small>{{ tile.note }}</small></dd></div>
{% endfor %}</dl>
{% for section in sections %}<section>
<h2>{{ section.title }}</h2>
<p class="soft">{{ section.text }}</p>
{% for chart in section.charts %}{{ chart }}
{% endfor %}</section>
{% endfor %}
{% for table in tables %}<section>
<h2>{{ table.title }}</h2>
{% if table.columns %}<table>
<thead><tr>{% for name in table.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
{% else %}<dl class="pairs">
{% for name, value in table.rows %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
{% endif %}</section>
{% endfor %}
</html>
"""
)
