"""What pages look like (CSS, with Jinja2 loops): light or dark as the reader's browser says, and on paper."""

STYLE = """\
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2127; --soft: #5b6672; --rule: #dde2e8; --panel: #f6f8fa;
  --s0: #2f6fb3; --s1: #d98a1f; --s2: #c0392b; --s3: #8a94a0; --s4: #3a8f5c; --heat: #1f5fa8; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e4e8ec; --soft: #9aa5b1; --rule: #333b45;
  --panel: #1c2229; --s0: #6aa5e3; --s1: #e8a94c; --s2: #e8695a; --s3: #7b8794; --s4: #63b888; --heat: #7ab4f2; } }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --rule: #bbb; --panel: #fff;
  --s0: #2f6fb3; --s1: #d98a1f; --s2: #c0392b; --s3: #8a94a0; --s4: #3a8f5c; --heat: #1f5fa8; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  section { break-inside: avoid; } }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); } header p { overflow-wrap: anywhere; }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .6rem;
  margin: 1.2rem 0; }
dl.tiles div { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; padding: .5rem .8rem; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
dd small { display: block; font-size: .75rem; color: var(--soft); }
svg { width: 100%; height: auto; display: block; margin-top: .4rem; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } svg text.y { text-anchor: end; }
svg text.x { text-anchor: middle; } svg text.name { fill: var(--ink); }
.grid { stroke: var(--rule); fill: none; } .area { stroke: none; } .line { fill: none; stroke-width: 1.6; }
{% for k in range(5) %}
.area.s{{ k }} { fill: var(--s{{ k }}); } .line.s{{ k }} { stroke: var(--s{{ k }}); }
i.s{{ k }} { background: var(--s{{ k }}); }
{% endfor %}
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .8rem; color: var(--soft); margin-left: 4.2rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .35rem;
  vertical-align: -1px; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: normal; }
dl.pairs { columns: 24rem 2; column-gap: 2rem; margin: .3rem 0; }
.pairs div { display: flex; gap: 1rem; border-bottom: 1px solid var(--rule); padding: .15rem 0; break-inside: avoid; }
.pairs dt { flex: 0 0 45%; } .pairs dd { font-size: .85rem; overflow-wrap: anywhere; }
"""
